"""Submit prompts to headrace and get the generated text. Does not import torch.

from headrace import client
job = client.submit("Hello.", max_tokens=10, temperature=0)
print(job.result(timeout=60).text)
"""

from headrace import __version__
from headrace.client.async_client import AsyncClient, AsyncJob
from headrace.client.batch.errors import InputChanged, InvalidBatch, OutputRefused
from headrace.client.batch.run import BatchReport
from headrace.client.batch.scores import Score
from headrace.client.client import Client
from headrace.client.default import (
    as_completed,
    batch,
    cancel,
    choose,
    default_client,
    detokenize,
    job,
    map,  # noqa: A004  # reads as `client.map`
    score,
    score_many,
    signature,
    status,
    submit,
    submit_many,
    tokenize,
)
from headrace.client.jobs.handle import Job
from headrace.client.jobs.status import Status
from headrace.client.jobs.stream import Event
from headrace.client.wire.errors import (
    HeadraceError,
    InvalidRequest,
    JobCancelled,
    JobError,
    JobExpired,
    JobFailed,
    JobLost,
    NoCheckpoints,
    NoWorker,
    QueueFull,
    RedisRefused,
    RedisUnreachable,
    RedisUnsuitable,
    ResultNotKept,
    ResultTimeout,
    StreamChanged,
    UnknownJob,
    UnreadableRecord,
)
from headrace.client.wire.requests import SamplingParams
from headrace.client.wire.results import Choice, Result, Tokenized
from headrace.short_names import refuse_submodules as _refuse_submodules

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "BatchReport",
    "Choice",
    "Client",
    "Event",
    "HeadraceError",
    "InputChanged",
    "InvalidBatch",
    "InvalidRequest",
    "Job",
    "JobCancelled",
    "JobError",
    "JobExpired",
    "JobFailed",
    "JobLost",
    "NoCheckpoints",
    "NoWorker",
    "OutputRefused",
    "QueueFull",
    "RedisRefused",
    "RedisUnreachable",
    "RedisUnsuitable",
    "Result",
    "ResultNotKept",
    "ResultTimeout",
    "SamplingParams",
    "Score",
    "Status",
    "StreamChanged",
    "Tokenized",
    "UnknownJob",
    "UnreadableRecord",
    "__version__",
    "as_completed",
    "batch",
    "cancel",
    "choose",
    "default_client",
    "detokenize",
    "job",
    "map",
    "score",
    "score_many",
    "signature",
    "status",
    "submit",
    "submit_many",
    "tokenize",
]

_refuse_submodules(__name__)

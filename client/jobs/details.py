"""All that Redis knows about one job."""

from __future__ import annotations

import contextlib
from itertools import chain
from typing import Any, cast

import redis
from pydantic import BaseModel

from headrace.client.jobs.listing import JobLister
from headrace.client.jobs.queued import delivered_messages, queued_messages
from headrace.client.jobs.reading import JobReader
from headrace.client.wire import keys
from headrace.client.wire.adapters import is_adapter_name
from headrace.client.wire.errors import RedisRefused
from headrace.client.wire.redis import redis_errors
from headrace.client.wire.results import Outcome, Result, State, Timings, Usage, outcome_state, parse_state


class JobFault(BaseModel):
    """Why a job ended without a result: `code` is fixed, and docs/errors.md says what to do about each."""

    code: str
    message: str


class JobDetails(BaseModel):
    """One job. Times are Unix times in seconds by Redis' clock; what is not known is None.

    A job that another Celery program sent has no time of submission. Workers write when a job ended; a job that was
    computed more than once has the times of the last attempt.
    """

    id: str
    state: State
    model: str | None = None
    #: The LoRA adapter that it names; None also for a job sent as a Celery signature that has not succeeded.
    adapter: str | None = None
    #: The name of the API key that it was submitted with; "" without one; None if no list has the job.
    owner: str | None = None
    submitted_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    #: Its ETA, before which no worker begins it.
    waits_until: float | None = None
    #: Name of the worker that computes or computed it.
    worker: str | None = None
    #: How often a worker began it without being stopped.
    attempts: int = 0
    #: Whether somebody has asked to cancel it.
    cancel_requested: bool = False
    error: JobFault | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    seed: int | None = None
    finish_reasons: list[str] | None = None
    fingerprint: str | None = None
    #: The text of each sample; only on request.
    texts: list[str] | None = None
    #: The prompt, or the messages of a chat; only on request, and only while Redis has the job's message.
    prompt: Any = None


def read_details(
    url: str,
    connection: redis.Redis,
    reader: JobReader,
    lister: JobLister,
    job_id: str,
    *,
    texts: bool = False,
    prompt: bool = False,
) -> JobDetails:
    """Read what is known about a job.

    Args:
        url: of the Redis.
        connection: to it.
        reader: reads the state and the outcome.
        lister: knows the owner.
        job_id: the job.
        texts: include the texts.
        prompt: include the prompt. Searches the queue, and needs the right to read it.

    Raises:
        UnknownJob: there is no such job.
        UnreadableRecord: the job's record is not valid.
        RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
    """
    outcome, state = reader.poll(job_id)
    with redis_errors(url):
        pipe = connection.pipeline(transaction=False)
        names = ("state", "model", "submitted_at", "started_at", "worker", "attempts", "adapter")
        pipe.hmget(keys.job(job_id), *names)
        pipe.exists(keys.cancel(job_id))
        record, cancel = pipe.execute()
        fields: dict[str, str | None] = dict(zip(names, record, strict=True))
        found = _request_of(connection, fields["model"], job_id) if prompt else None
    listed = None
    with contextlib.suppress(RedisRefused):  # who may not read lists is told all else
        listed = lister.find(job_id)
    details = JobDetails(
        id=job_id,
        state=state if outcome is None else outcome_state(outcome),
        model=fields["model"],
        adapter=fields["adapter"] if is_adapter_name(fields["adapter"]) else None,
        owner=None if listed is None else listed.owner,
        submitted_at=_number(fields["submitted_at"]),
        started_at=_number(fields["started_at"]),
        ended_at=parse_state(fields["state"])[1],
        waits_until=reader.waits_until(job_id) if outcome is None and state == "queued" else None,
        worker=fields["worker"],
        attempts=max(0, int(_number(fields["attempts"]) or 0)),
        cancel_requested=bool(cancel) and outcome is None,
        prompt=found,
    )
    return details if outcome is None else details.model_copy(update=_of_outcome(outcome, texts=texts))


def _of_outcome(outcome: Outcome, *, texts: bool) -> dict[str, Any]:
    if not isinstance(outcome, Result):
        partial = {"texts": outcome.partial} if texts and outcome.partial else {}
        return {"error": JobFault(code=outcome.code, message=outcome.message), **partial}
    return {
        "model": outcome.model,
        "adapter": outcome.adapter,
        "usage": outcome.usage,
        "timings": outcome.timings,
        "seed": outcome.seed,
        "finish_reasons": [choice.finish_reason for choice in outcome.choices],
        "fingerprint": outcome.fingerprint,
        "texts": [choice.text for choice in outcome.choices] if texts else None,
    }


def _request_of(connection: redis.Redis, model: str | None, job_id: str) -> Any:
    """The prompt or the messages in the job's request; None if no message has the job."""
    queued = queued_messages(connection, model) if model else ()
    for message in chain(queued, delivered_messages(connection)):
        request = message.jobs.get(job_id)
        if isinstance(request, dict):
            return cast("Any", request.get("messages") or request.get("prompt"))
    return None


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None

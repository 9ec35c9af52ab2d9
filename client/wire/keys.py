"""The names of all keys and queues that headrace uses in Redis. All keys begin with `PREFIX`."""

from __future__ import annotations

import hashlib

PREFIX = "headrace:"

#: Celery's prefix of result records, a constant there (celery.backends.base.KeyValueStoreBackend).
_RESULT = "celery-task-meta-"

#: Public priority -> Celery's number on Redis, where 0 is the most urgent and the steps are 0, 3, 6, 9.
PRIORITIES = {"interactive": 0, "normal": 3, "bulk": 9}

#: How long the record of an unfinished job is kept. After the job has ended, `result_ttl_s` applies.
UNFINISHED_TTL_S = 30 * 86_400
#: Lifetime of a record until the job's message was sent. If Redis keeps the record and loses the message, which was
#: written next, or if the client dies in between, the record is gone soon, and nobody waits for the job without end.
UNSENT_TTL_S = 60

#: Unreadable messages: how many are kept, for how many seconds after the last one, and how many bytes of each.
DEAD_ENTRIES, DEAD_TTL_S, DEAD_TEXT_BYTES = 1_000, 7 * 86_400, 4_096

#: How many seconds a model remains known after a worker served it: jobs for it are accepted and wait for a worker.
KNOWN_MODEL_S = 86_400

#: Hints that messages wait: their lifetime in seconds, and their maximum number.
HINT_TTL_S, HINTS = 60, 64

#: Field of a job's record: the Unix time of its ETA or countdown, before which no worker begins it.
WAITS_UNTIL = "waits_until"
#: Field of a job's record: it was sent as a Celery signature, and other tasks may follow its end.
CANVAS = "canvas"
#: The most jobs that the list of one owner has; the oldest are left out. An entry takes about 120 bytes.
LISTED_JOBS = 1_000_000
#: The most messages whose jobs wait to be listed.
SUBMITTED_ENTRIES = 200_000
#: The most owners whose jobs are listed.
LISTED_OWNERS = 1_000
#: The name, in keys, of the owner of all jobs that were submitted without an API key.
NO_OWNER = "-"

_STEP_SEPARATOR = "\x06\x16"  # kombu's, between a queue's name and its priority step


def queue(model_name: str) -> str:
    """The Celery queue of a model, as Celery names it (without `PREFIX`)."""
    return f"headrace.{model_name}"


def model_of(queue_name: str) -> str:
    """The model of a queue that has the name in Celery's form."""
    return queue_name.removeprefix(queue(""))


def names_model(queue_name: str) -> bool:
    """Whether a name, in Celery's form, is that of some model's queue."""
    return queue_name.startswith(queue("")) and len(queue_name) > len(queue(""))


def queue_lists(model_name: str) -> list[str]:
    """The Redis lists of a model's queue, most urgent first: one for each priority step of kombu."""
    return priority_lists(PREFIX + queue(model_name))


def priority_lists(name: str) -> list[str]:
    """The Redis lists of a queue whose most urgent one has this name."""
    return [name if step == 0 else f"{name}{_STEP_SEPARATOR}{step}" for step in (0, 3, 6, 9)]


def hint(model_name: str) -> str:
    """List on which idle workers block; it has an element if messages may be waiting for the model."""
    return PREFIX + hint_of(queue(model_name))


def hint_of(queue_name: str) -> str:
    """The same list, from the queue's name in Celery's form, without `PREFIX`."""
    return f"hint:{queue_name}"


def dead() -> str:
    """List: unreadable messages, newest first, each as JSON with the reason."""
    return f"{PREFIX}dead"


def tag(job_id: str) -> str:
    """A short hash of a job id, for places that others can read: with the id they could read the result and cancel."""
    return hashlib.blake2b(job_id.encode(), digest_size=4).hexdigest()


def job(job_id: str) -> str:
    """Hash: the record of a job: its state, model, attempts and so on."""
    return f"{PREFIX}job:{job_id}"


def result(job_id: str) -> str:
    """String: Celery's result record as JSON. Only this record decides how a job has ended."""
    return f"{PREFIX}{_RESULT}{job_id}"


def jobs(owner: str) -> str:
    """Sorted set: an owner's jobs by the time of their submission. "" owns those without an API key.

    Each member is the job's id and its model, with a space between them.
    """
    return f"{PREFIX}jobs:{owner or NO_OWNER}"


def submitted() -> str:
    """List: the jobs that are not in the list of their owner yet, newest first; see `client.wire.job_index`."""
    return f"{PREFIX}submitted"


def owners() -> str:
    """Sorted set: the owners of jobs, each as in the key of its list, by the time of the last submission."""
    return f"{PREFIX}owners"


def cancel(job_id: str) -> str:
    """String: a request to cancel the job."""
    return f"{PREFIX}cancel:{job_id}"


def events(job_id: str) -> str:
    """Stream: the text of a job submitted with `stream=True`, as it is generated; each entry is a `StreamEvent`."""
    return f"{PREFIX}events:{job_id}"


def checkpoint(job_id: str) -> str:
    """Hash: captured tensors by name, as safetensors bytes."""
    return f"{PREFIX}checkpoint:{job_id}"


def worker(name: str) -> str:
    """Hash with a short lifetime: the last heartbeat of a worker."""
    return f"{PREFIX}worker:{name}"


def worker_of(name: str, model_name: str) -> str:
    """The name of a worker's record for one of several models."""
    return f"{name}@{model_name}"


def workers() -> str:
    """Sorted set: names of workers by the time of their last heartbeat."""
    return f"{PREFIX}workers"


def models() -> str:
    """Sorted set: names of models, and those of their adapters as in `adapter_of`, by the time of the last heartbeat of
    a worker that serves them.
    """
    return f"{PREFIX}models"


def adapter_of(model_name: str, adapter: str) -> str:
    """The name of a model's adapter in `models`. No name of a model has a slash."""
    return f"{model_name}/{adapter}"


def unacked() -> str:
    """kombu's hash of unacknowledged messages, by delivery tag."""
    return f"{PREFIX}unacked"


def unacked_index() -> str:
    """kombu's sorted set of delivery tags by the time when their lease was last renewed."""
    return f"{PREFIX}unacked_index"

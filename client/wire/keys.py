"""Every name that headrace uses in Redis, as functions. All keys lie under `PREFIX`."""

from __future__ import annotations

import hashlib

PREFIX = "headrace:"

#: Celery's own prefix of result records, fixed there (celery.backends.base.KeyValueStoreBackend).
_RESULT = "celery-task-meta-"

#: Public priority -> Celery's number on Redis, where 0 is first and steps are 0, 3, 6, 9.
PRIORITIES = {"interactive": 0, "normal": 3, "bulk": 9}

#: The record of a job that no worker has finished is forgotten after 30 days; when it ends, RESULT_TTL_S counts.
UNFINISHED_TTL_S = 30 * 86_400

#: Messages that could not be understood: how many are kept, how long after the last one, and how much of each.
DEAD_ENTRIES, DEAD_TTL_S, DEAD_TEXT_BYTES = 1_000, 7 * 86_400, 4_096

#: A model that some worker served is known for so long: jobs for it wait where no worker serves it now.
KNOWN_MODEL_S = 86_400

#: Hints that messages wait: how long they last, and how many at most.
HINT_TTL_S, HINTS = 60, 64

_STEP_SEPARATOR = "\x06\x16"  # kombu's, between a queue's name and its priority step


def queue(model_name: str) -> str:
    """The Celery queue of a model, as Celery names it (without `PREFIX`)."""
    return f"headrace.{model_name}"


def model_of(queue_name: str) -> str:
    """The model of a queue, as Celery names it."""
    return queue_name.removeprefix(queue(""))


def queue_lists(model_name: str) -> list[str]:
    """The Redis lists in which a model's jobs wait, most urgent first: one for each priority step of kombu."""
    name = PREFIX + queue(model_name)
    return [name if step == 0 else f"{name}{_STEP_SEPARATOR}{step}" for step in (0, 3, 6, 9)]


def hint(model_name: str) -> str:
    """List: something to wait for; it holds an element if messages may wait for the model."""
    return PREFIX + hint_of(queue(model_name))


def hint_of(queue_name: str) -> str:
    """The same for a queue as Celery names it (without `PREFIX`)."""
    return f"hint:{queue_name}"


def dead() -> str:
    """List: messages that could not be understood, newest first, each as JSON with the reason."""
    return f"{PREFIX}dead"


def tag(job_id: str) -> str:
    """What stands for a job where others may read: who knows an id may read the result and cancel."""
    return hashlib.blake2b(job_id.encode(), digest_size=4).hexdigest()


def job(job_id: str) -> str:
    """Hash: the life of a job until its result is there."""
    return f"{PREFIX}job:{job_id}"


def result(job_id: str) -> str:
    """String: Celery's result record, JSON; the truth about how a job ended."""
    return f"{PREFIX}{_RESULT}{job_id}"


def cancel(job_id: str) -> str:
    """String: a request to cancel the job."""
    return f"{PREFIX}cancel:{job_id}"


def events(job_id: str) -> str:
    """Stream: the text of a job that asked for streaming, as it came; each entry a `StreamEvent`."""
    return f"{PREFIX}events:{job_id}"


def checkpoint(job_id: str) -> str:
    """Hash: checkpoint tensor by name, as safetensors bytes."""
    return f"{PREFIX}checkpoint:{job_id}"


def worker(name: str) -> str:
    """Hash with a short life: what a worker last said of itself."""
    return f"{PREFIX}worker:{name}"


def worker_of(name: str, model_name: str) -> str:
    """The name that the record of a worker has which tells of one of several models."""
    return f"{name}@{model_name}"


def workers() -> str:
    """Sorted set: names of workers by the time of their last word."""
    return f"{PREFIX}workers"


def models() -> str:
    """Sorted set: names of models by the time when a worker last said that it serves them."""
    return f"{PREFIX}models"


def unacked() -> str:
    """Hash of kombu's: messages that workers hold, by delivery tag."""
    return f"{PREFIX}unacked"


def unacked_index() -> str:
    """Sorted set of kombu's: delivery tags by the time their lease was last renewed."""
    return f"{PREFIX}unacked_index"

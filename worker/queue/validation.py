"""Message validation: what a worker refuses before Celery or the pool looks at it.

Anybody who can reach the queue may have written a message, and Celery trusts what it reads. Refused are messages that
are not JSON, are compressed, are too large, or hold too many jobs. Where requests are signed, tasks other than
headrace's and jobs without a valid signature are refused as well: they reach neither Celery nor the pool, so they
cannot replace the job that they name. An envelope is not signed, so its instructions to Celery (wait, store
no result, call other tasks afterwards) are removed. Reasons and log lines never quote the body of a message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NoReturn

import structlog
from kombu import compression

from headrace.client.wire.celery import GROUP_TASK_NAME, JOBS_HEADER, TASK_NAME
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import is_job_id
from headrace.client.wire.signing import verified
from headrace.client.wire.tracing import CONTEXT_HEADERS, TRACES_HEADER
from headrace.client.wire.unicode import check_unicode
from headrace.worker.queue.message_options import compression_of, encoding_of
from headrace.worker.queue.messages import argument

log = structlog.get_logger("headrace.worker")

#: Above the size of the largest message that the client sends: a prompt of 128 KiB of control characters, escaped, or
#: messages and variables for their template.
MAX_MESSAGE_BYTES = 2**21
#: The client puts at most 16 jobs into a message.
MAX_GROUP_JOBS = 256

#: The headers of an unsigned envelope that are kept.
UNSIGNED_HEADERS = (
    *("id", "task", "lang", "origin", "argsrepr", "kwargsrepr"),
    *(JOBS_HEADER, TRACES_HEADER, *CONTEXT_HEADERS),
)


def reason_to_refuse(message: Any, *, signed_only: bool) -> str | None:
    """Return why a message is refused, or None. With `signed_only`, also remove the unsigned parts of its envelope."""
    if message.content_type != "application/json":
        return f"its content type is {str(message.content_type)[:80]!r}; only application/json is read"
    if reason := compression_of(message) or encoding_of(message):
        return reason
    if len(message.body) > MAX_MESSAGE_BYTES:
        return f"it has {len(message.body)} bytes; at most {MAX_MESSAGE_BYTES} are read"
    try:
        payload = message.payload
    except Exception as error:
        return f"it cannot be read ({type(error).__name__})"
    task, task_id = message.headers.get("task"), message.headers.get("id")
    if not isinstance(task, str) or not _is_task_body(payload):
        return "it is not a task in Celery's protocol 2"
    if not isinstance(task_id, str):  # no result could be stored under it, so it would be redelivered for ever
        return f"its task id is of type {type(task_id).__name__}; expected str"
    try:
        check_unicode(message.headers, "headers")  # they become names of keys in Redis, which must be encoded
    except InvalidRequest as error:
        return f"{error.field} is not valid Unicode"
    jobs = argument(task, *payload[:2])
    if task == GROUP_TASK_NAME and isinstance(jobs, list) and len(jobs) > MAX_GROUP_JOBS:
        return f"it holds {len(jobs)} jobs; at most {MAX_GROUP_JOBS} are read"
    if signed_only:
        if task not in (TASK_NAME, GROUP_TASK_NAME):
            return "this worker computes only signed jobs, and this task is not one that a client sends"
        _remove_unsigned_options(message, payload)
    return None


def take_out_unsigned(message: Any, keys: Iterable[bytes], model: str) -> tuple[list[str], int]:
    """Remove from a message the jobs that have no valid signature for this model.

    Returns:
        The valid ids among the removed jobs, and how many jobs the message still holds.
    """
    args, kwargs, _ = message.payload
    task, given = message.headers["task"], argument(message.headers["task"], args, kwargs)
    if task == TASK_NAME:
        job_id = message.headers["id"]
        signed = verified(keys, job_id, model, given)
        return [job_id] if not signed and is_job_id(job_id) else [], int(signed)
    members = [member for member in given if isinstance(member, dict)] if isinstance(given, list) else []
    named = [member for member in members if is_job_id(member.get("id"))]
    kept = [member for member in named if verified(keys, member["id"], model, member.get("request"))]
    if len(kept) < len(named):
        _write_body(message, [[kept], {}, {}])
    kept_ids = {member["id"] for member in kept}
    return [member["id"] for member in named if member["id"] not in kept_ids], len(kept)


def forbid_compression() -> None:
    """Refuse compressed messages in this process: kombu would decompress them, to any size, before validation."""
    kombu: Any = compression  # it has no types
    for name in kombu.encoders():
        kombu.register(kombu.get_encoder(name)[0], _refuse_to_decompress, name)


def _refuse_to_decompress(body: bytes) -> NoReturn:
    raise ValueError(f"{len(body)} compressed bytes; compressed messages are not read")


def _is_task_body(payload: Any) -> bool:
    """Whether this is the body of a task: arguments, named arguments, and what Celery does afterwards."""
    if not isinstance(payload, list) or len(payload) != 3:
        return False
    return isinstance(payload[0], list) and isinstance(payload[1], dict) and isinstance(payload[2], dict)


def _remove_unsigned_options(message: Any, payload: list[Any]) -> None:
    message.headers = {name: message.headers[name] for name in UNSIGNED_HEADERS if name in message.headers}
    if any(payload[2].values()):
        log.warning("message.trimmed", message_id=message.headers["id"][:128])
        _write_body(message, [*payload[:2], {}])


def _write_body(message: Any, payload: list[Any]) -> None:
    message.body, message.content_encoding = json.dumps(payload), "utf-8"
    message._decoded_cache = None

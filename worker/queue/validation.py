"""What a worker lets in. Anybody who reaches the queue may have written a message; Celery trusts what it reads.

Refused before any of it is worked on: what is no JSON, is compressed, is too large, or holds too many jobs. Where
requests are signed, also tasks that are not ours, and jobs whose signature does not hold: nothing behind here, neither
Celery nor the pool, hears of them, so they cannot take the place of a job that they name. What Celery would do on the
word of an unsigned envelope (wait, store nothing, call other tasks afterwards) is left out. What is said of a message
quotes nothing of its body.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NoReturn

import structlog
from kombu import compression

from headrace.client.wire.celery import GROUP_TASK_NAME, JOBS_HEADER, TASK_NAME
from headrace.client.wire.requests import is_job_id
from headrace.client.wire.signing import verified
from headrace.client.wire.tracing import CONTEXT_HEADERS, TRACES_HEADER
from headrace.worker.tasks import argument

log = structlog.get_logger("headrace.worker")

#: The largest message that `client.wire.requests` allows takes half of it: 64 KiB of control characters, escaped.
MAX_MESSAGE_BYTES = 2**20
#: Our client puts 16 jobs at most into a message.
MAX_GROUP_JOBS = 256

#: What is kept of an envelope that nobody signs.
UNSIGNED_HEADERS = (
    *("id", "task", "lang", "origin", "argsrepr", "kwargsrepr"),
    *(JOBS_HEADER, TRACES_HEADER, *CONTEXT_HEADERS),
)


def reason_to_refuse(message: Any, *, signed_only: bool) -> str | None:
    """Why a message is not worked on, or None. With `signed_only` it also takes out of it what nobody signed."""
    if message.content_type != "application/json":
        return f"its content type is {str(message.content_type)[:80]!r}; only application/json is read"
    if len(message.body) > MAX_MESSAGE_BYTES:
        return f"it has {len(message.body)} bytes; at most {MAX_MESSAGE_BYTES} are read"
    try:
        payload = message.payload
    except Exception as error:
        return f"it cannot be read ({type(error).__name__})"
    task, task_id = message.headers.get("task"), message.headers.get("id")
    if not isinstance(task, str) or not _is_call(payload):
        return "it is no task in Celery's protocol 2"
    if not isinstance(task_id, str):  # no result could be stored under it, so it would come again for ever
        return f"its task id is of the kind {type(task_id).__name__}"
    jobs = argument(task, *payload[:2])
    if task == GROUP_TASK_NAME and isinstance(jobs, list) and len(jobs) > MAX_GROUP_JOBS:
        return f"it holds {len(jobs)} jobs; at most {MAX_GROUP_JOBS} are read"
    if signed_only:
        if task not in (TASK_NAME, GROUP_TASK_NAME):
            return "only signed jobs are computed here, and this is no message of a client's"
        _leave_out_the_unsigned(message, payload)
    return None


def take_out_unsigned(message: Any, keys: Iterable[bytes], model: str) -> tuple[list[str], int]:
    """Take those jobs out of a message of ours that nobody with a key has signed for this model.

    Returns their ids, as far as they have any, and how many jobs stay in the message.
    """
    args, kwargs, _ = message.payload
    task, given = message.headers["task"], argument(message.headers["task"], args, kwargs)
    if task == TASK_NAME:
        job_id = message.headers["id"]
        good = verified(keys, job_id, model, given)
        return [job_id] if not good and is_job_id(job_id) else [], int(good)
    members = [member for member in given if isinstance(member, dict)] if isinstance(given, list) else []
    named = [member for member in members if is_job_id(member.get("id"))]
    signed = [member for member in named if verified(keys, member["id"], model, member.get("request"))]
    if len(signed) < len(named):
        _write_body(message, [[signed], {}, {}])
    ours = {member["id"] for member in signed}
    return [member["id"] for member in named if member["id"] not in ours], len(signed)


def forbid_compression() -> None:
    """Let no message be unpacked in this process: kombu would do so, to any size, before anybody sees it."""
    kombu: Any = compression  # it has no types
    for name in kombu.encoders():
        kombu.register(kombu.get_encoder(name)[0], _refuse_to_unpack, name)


def _refuse_to_unpack(body: bytes) -> NoReturn:
    raise ValueError(f"{len(body)} compressed bytes; messages are not compressed here")


def _is_call(payload: Any) -> bool:
    """Whether this is the body of a task: arguments, named arguments, and what Celery does afterwards."""
    if not isinstance(payload, list) or len(payload) != 3:
        return False
    return isinstance(payload[0], list) and isinstance(payload[1], dict) and isinstance(payload[2], dict)


def _leave_out_the_unsigned(message: Any, payload: list[Any]) -> None:
    message.headers = {name: message.headers[name] for name in UNSIGNED_HEADERS if name in message.headers}
    if any(payload[2].values()):
        log.warning("message.trimmed", message_id=message.headers["id"][:128])
        _write_body(message, [*payload[:2], {}])


def _write_body(message: Any, payload: list[Any]) -> None:
    message.body, message.content_encoding = json.dumps(payload), "utf-8"
    message._decoded_cache = None

"""Messages that were refused: the jobs that they name, and the dead letter list in Redis with the reasons."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME
from headrace.client.wire.requests import is_job_id
from headrace.worker.queue.messages import argument, read_group
from headrace.worker.queue.validation import MAX_MESSAGE_BYTES


def dead_letter(connection: Any, queue: str, message: bytes, reason: str) -> None:
    """Append a refused message to the dead letter list. Raises redis.RedisError."""
    text = message[: keys.DEAD_TEXT_BYTES].decode(errors="replace")
    entry = {"reason": reason, "at": time.time(), "queue": queue, "bytes": len(message), "message": text}
    pipe = connection.pipeline()
    pipe.lpush(keys.dead(), json.dumps(entry))
    pipe.ltrim(keys.dead(), 0, keys.DEAD_ENTRIES - 1)
    pipe.expire(keys.dead(), keys.DEAD_TTL_S)
    pipe.execute()


def original(message: Any) -> tuple[str, bytes]:
    """The queue of a message that kombu could read, and its text as it was delivered."""
    return (message.delivery_info or {}).get("routing_key", ""), json.dumps(message._raw).encode()


def named_jobs(message: Any) -> list[str]:
    """The valid job ids in a message, whose content may have any shape."""
    headers = message.headers
    try:
        if headers.get("task") == GROUP_TASK_NAME and len(message.body) <= MAX_MESSAGE_BYTES:
            args, kwargs, _ = message.payload
            return list(read_group(argument(GROUP_TASK_NAME, args, kwargs)))
    except Exception:  # the message has already been refused for this error
        return []
    return [headers["id"]] if is_job_id(headers.get("id")) else []


def jobs_in_text(text: bytes | str) -> list[str]:
    """The valid job ids in a message, or in an entry of kombu's `unacked` hash, that kombu could not read."""
    if len(text) > 2 * MAX_MESSAGE_BYTES:
        return []
    try:
        found = json.loads(text)
        envelope = found[0] if isinstance(found, list) else found
        headers = envelope["headers"]
        if headers.get("task") != GROUP_TASK_NAME:
            return [headers["id"]] if is_job_id(headers["id"]) else []
        args, kwargs, _ = json.loads(base64.b64decode(envelope["body"]))
        return list(read_group(argument(GROUP_TASK_NAME, args, kwargs)))
    except Exception:  # the text may be anything
        return []

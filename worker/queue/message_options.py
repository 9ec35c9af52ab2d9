"""What a message asks of Celery and of the worker beside its jobs: honoured, or refused with a reason.

A message that is refused for its options is kept in the dead letter list, and its jobs fail with the reason.
"""

from __future__ import annotations

import math
from typing import Any

from celery.utils.time import maybe_iso8601

from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.worker.queue.messages import ADDRESSED_TO, MODEL_HEADER, model_of

#: The encodings in which a body of JSON is read. Python knows others, some of which decompress.
ENCODINGS = ("utf-8", "utf8", "us-ascii", "ascii", "binary", "")
#: What Celery does after a task, by its name in the body of a message.
_AFTERWARDS = {"callbacks": "link", "errbacks": "link_error", "chain": "chain", "chord": "chord"}
_STEP_SEPARATOR = "\x06"


def compression_of(message: Any) -> str | None:
    """Return why a compressed message is refused, or None if the message is not compressed."""
    if not (compression := message.headers.get("compression")):
        return None
    return f"its body is compressed ({str(compression)[:40]}); send it without `compression`"


def encoding_of(message: Any) -> str | None:
    """Return why the encoding of the body is refused, or None."""
    encoding = message.content_encoding
    if encoding is None or (isinstance(encoding, str) and encoding.lower() in ENCODINGS):
        return None
    return f"its content encoding is {str(encoding)[:40]!r}; only utf-8 is read"


def reason_to_refuse_options(message: Any, *, limits: bool) -> str | None:
    """Return why a message that can be read is refused for what it asks, or None.

    Args:
        message: its content type, its body's form, and the types of its id and task have been checked.
        limits: whether the pool keeps Celery's time limit.
    """
    if message.headers["task"] not in (TASK_NAME, GROUP_TASK_NAME):
        return None
    grouped = message.headers["task"] == GROUP_TASK_NAME
    return (
        _other_model(message)
        or _expires(message)
        or _time_limit(message, limits and not grouped)
        or _afterwards(message, grouped)
    )


def _other_model(message: Any) -> str | None:
    """A message must not be computed by another model than the one it names."""
    delivery = message.delivery_info
    model, address = model_of(delivery), delivery.get(ADDRESSED_TO)
    address = address.removeprefix(keys.PREFIX).partition(_STEP_SEPARATOR)[0] if isinstance(address, str) else ""
    if keys.names_model(address) and keys.model_of(address) != model:
        return (
            f"it is addressed to the queue {address[:160]!r} and was in {delivery['routing_key']!r}; jobs of one model "
            "are not computed by another: submit them again for this model"
        )
    named = message.headers.get(MODEL_HEADER)
    if named not in (None, model):
        return (
            f"its header {MODEL_HEADER!r} names {str(named)[:160]!r} and it was in the queue "
            f"{delivery['routing_key']!r}; send it to the queue of the model that is meant"
        )
    return None


def _expires(message: Any) -> str | None:
    expires = message.headers.get("expires")
    try:
        maybe_iso8601(expires)
    except (ValueError, TypeError, AttributeError):
        return f"its expires is {str(expires)[:80]!r}; expected a time in ISO 8601"
    return None


def _time_limit(message: Any, kept: bool) -> str | None:
    """Celery's header `timelimit`: the hard and the soft limit in seconds. None and 0 mean none."""
    limits = message.headers.get("timelimit") or (None, None)
    if not isinstance(limits, list | tuple) or len(limits) != 2 or not all(map(_is_limit, limits)):
        return f"its time limit is {str(limits)[:80]}; expected the hard limit in seconds, and null for the soft one"
    hard, soft = limits
    if soft:
        return "it has a soft_time_limit; a job cannot clean up before it ends: give it a time_limit or expires_at"
    if hard and not kept:
        return "it has a time_limit, which is kept only for single jobs in headrace's own pool: use expires_at"
    return None


def _is_limit(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _afterwards(message: Any, grouped: bool) -> str | None:
    """The jobs of a message with several have no task of their own that Celery could call others after."""
    embedded = message.payload[2]
    asked = [option for name, option in _AFTERWARDS.items() if embedded.get(name)]
    if grouped and asked:
        return f"it holds several jobs, and has {', '.join(asked)}; only messages of one job are followed by others"
    return None

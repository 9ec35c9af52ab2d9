"""The envelope that kombu writes around a Celery message: reads and checks it."""

from __future__ import annotations

from typing import Any

from kombu.utils.json import loads

from headrace.client.wire.unicode import check_unicode
from headrace.client.wire.values import to_whole


def read_envelope(message: bytes | str) -> dict[str, Any]:
    """Parse a message as it is stored in a queue: the envelope with its body, headers and properties.

    Raises:
        ValueError: it is not a valid envelope; the text says what is wrong.
    """
    return _check_envelope(_parse(message))


def check_unacked_entry(entry: bytes | str) -> None:
    """Check an entry of kombu's `unacked` hash: an envelope, its exchange and its routing key.

    Raises:
        ValueError: the entry is not valid; the text says what is wrong.
    """
    fields = _parse(entry)
    if not isinstance(fields, list) or len(fields) != 3:
        raise ValueError("it is not a message with its exchange and routing key")
    _check_envelope(fields[0])


def _parse(text: bytes | str) -> Any:
    try:
        return loads(as_text(text))  # type: ignore[no-untyped-call]
    except Exception as error:  # invalid JSON, or whatever kombu raises for the typed objects in it
        raise ValueError(f"it is not JSON that can be read ({type(error).__name__})") from error


def _check_envelope(envelope: Any) -> dict[str, Any]:
    properties = envelope.get("properties") if isinstance(envelope, dict) else None
    if not isinstance(properties, dict):
        raise ValueError("it is not a message: its properties are missing")
    for name, value, kind in (
        ("body", envelope.get("body"), str),
        ("headers", envelope.get("headers"), dict),
        ("delivery_info", properties.get("delivery_info"), dict),
        ("priority", to_whole(properties.get("priority") or 0), int),  # kombu takes null and 3.0 too
        ("body_encoding", properties.get("body_encoding") or "", str),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"its {name} is of type {type(value).__name__}; expected {kind.__name__}")
    check_unicode(properties, "its properties")  # the delivery tag is the name of a field in Redis
    return envelope  # type: ignore[no-any-return]


def as_text(value: bytes | str) -> str:
    """Decode what a Redis connection returns, which depends on `decode_responses`."""
    return value if isinstance(value, str) else value.decode()

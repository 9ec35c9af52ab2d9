"""Values of request fields as callers write them, converted before pydantic checks them."""

from __future__ import annotations

from typing import Any

from headrace.client.wire.activations import CHECKPOINT_TENSORS
from headrace.client.wire.values import is_missing, to_python, to_whole

MAX_BIASES = 1_024


def to_list(value: Any) -> Any:
    """A tuple or an array as a list; any other value as plain Python."""
    return list(value) if isinstance(value, tuple) else to_python(value)


def string_list(value: Any) -> Any:
    """One text as a list of it; else as `to_list`."""
    return [value] if isinstance(value, str) else to_list(value)


def bias_map(value: Any) -> Any:
    """JSON has no integer keys, so '50256' means 50256. Parquet gives each row of a column the keys of all rows, so a
    null is the same as no entry."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:  # checked here: pydantic would keep a kilobyte for each wrong entry
        raise ValueError("size")
    pairs = [
        (int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() else to_whole(key), to_python(bias))
        for key, bias in value.items()
        if not is_missing(bias)
    ]
    if not all(isinstance(key, int) for key, _ in pairs) or len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("no token id, or the same one twice")
    return dict(pairs)


def checkpoint_list(value: Any) -> Any:
    """All checkpoints for `all`; else as `to_list`."""
    return sorted(CHECKPOINT_TENSORS) if isinstance(value, str) and value == "all" else to_list(value)

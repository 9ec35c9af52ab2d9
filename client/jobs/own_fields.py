"""The fields of a submission that are not part of the request: its id, its model, its time limit."""

from __future__ import annotations

from typing import Any

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import is_job_id
from headrace.client.wire.values import show, to_python
from headrace.config.model_names import served_name


def check_timeout_s(timeout_s: Any) -> float:
    """A time limit in seconds. Raises InvalidRequest."""
    seconds = to_python(timeout_s)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < 1e9:
        raise InvalidRequest("timeout_s", show(timeout_s), "a number of seconds above 0, or None")
    return seconds


def check_id(job_id: Any) -> str:
    """A job id. Raises InvalidRequest."""
    if not is_job_id(job_id):
        raise InvalidRequest("id", show(job_id), "1 to 128 letters, digits, '.', '_', '-' or ':'")
    return job_id


def check_model(model: Any) -> str:
    """The served name that a request means; see `served_name`. Raises InvalidRequest."""
    name = served_name(model) if isinstance(model, str) else None
    if name is None:
        expected = "the name of a model that a worker serves; a path belongs into the worker's HEADRACE_MODEL"
        raise InvalidRequest("model", show(model), expected)
    return name

"""Celery's result records -> outcomes of jobs."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from client.errors import JobCancelled, JobError, JobExpired, JobFailed
from client.schema import Result, State

_ERRORS: dict[str, type[JobError]] = {cls.__name__: cls for cls in (JobFailed, JobCancelled, JobExpired)}
_STATES: dict[type[JobError], State] = {JobFailed: "failed", JobCancelled: "cancelled", JobExpired: "expired"}

Outcome = Result | JobError


def parse_outcome(record: str | None) -> Outcome | None:
    """What a job came to, from its result record; None while it has not ended.

    A record that cannot be read becomes a JobFailed that says so: its job did end.
    """
    if record is None:
        return None
    try:
        meta = json.loads(record)
        status, value = meta["status"], meta["result"]
        if status == "SUCCESS":
            return Result.model_validate(value)
        if status == "REVOKED":
            return JobCancelled(message="the job was revoked through Celery")
        return _failure(value) if status == "FAILURE" else None
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        return JobFailed("unreadable_result", f"the result record cannot be read ({type(error).__name__})")


def outcome_state(outcome: Outcome) -> State:
    """The job state that an outcome means."""
    return "succeeded" if isinstance(outcome, Result) else _STATES[type(outcome)]


def _failure(value: dict[str, Any]) -> JobError:
    name, arguments = value["exc_type"], value["exc_message"]
    if name in _ERRORS and isinstance(arguments, list) and len(arguments) == 3:
        code, message, partial = arguments
        return _ERRORS[name](str(code), str(message), [str(text) for text in partial])
    if name == "TimeLimitExceeded":
        return JobExpired(message="Celery's time limit for the task passed")
    return JobFailed("worker_error", f"{name}: {arguments}")

"""Celery's result records -> outcomes of jobs."""

from __future__ import annotations

import json
from typing import Any, TypeGuard

from headrace.client.wire.errors import JobCancelled, JobError, JobExpired, JobFailed
from headrace.client.wire.requests import Result, State

_ERRORS: dict[str, type[JobError]] = {cls.__name__: cls for cls in (JobFailed, JobCancelled, JobExpired)}
_STATES: dict[type[JobError], State] = {JobFailed: "failed", JobCancelled: "cancelled", JobExpired: "expired"}

Outcome = Result | JobError

#: Characters of a code and of a message; those of our own workers are shorter.
MAX_CODE, MAX_MESSAGE = 64, 1_000


def parse_outcome(record: str | None) -> Outcome | None:
    """What a job came to, from its result record; None while it has not ended.

    A record that cannot be read becomes a JobFailed that says so: its job did end.
    """
    if record is None:
        return None
    try:
        record.encode()  # no lone surrogates: bytes that were no text
        meta = json.loads(record)
        status, value = meta["status"], meta["result"]
        if status == "SUCCESS":
            result = Result.model_validate(value)
            if not result.choices:
                raise ValueError("a result without a sample")
            return result
        if status == "REVOKED":
            return JobCancelled(message="the job was revoked through Celery")
        return _failure(value) if status == "FAILURE" else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return JobFailed("unreadable_result", f"the result record cannot be read ({type(error).__name__})")


def outcome_state(outcome: Outcome) -> State:
    """The job state that an outcome means."""
    return "succeeded" if isinstance(outcome, Result) else _STATES[type(outcome)]


def _failure(value: dict[str, Any]) -> JobError:
    name, arguments = value["exc_type"], value["exc_message"]
    if name in _ERRORS and isinstance(arguments, list) and len(arguments) == 3:
        code, message, partial = arguments
        if not isinstance(code, str) or not isinstance(message, str) or not _are_texts(partial):
            raise TypeError("not as an error of ours is written")
        return _ERRORS[name](_shortened(code, MAX_CODE), _shortened(message, MAX_MESSAGE), partial)
    if name == "TimeLimitExceeded":
        return JobExpired(message="Celery's time limit for the task passed")
    # Another exception, as Celery wrote it: its arguments may be anything.
    said = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return JobFailed("worker_error", f"{_shortened(str(name), MAX_CODE)}: {_shortened(said, MAX_MESSAGE)}")


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _shortened(text: str, limit: int) -> str:
    """Text of a stranger's, fit for terminals and logs."""
    text = text.encode(errors="replace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."

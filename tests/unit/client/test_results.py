"""Celery's result records, as its Redis backend writes them, become outcomes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client.wire.errors import JobCancelled, JobError, JobExpired, JobFailed
from headrace.client.wire.results import Result, has_ended, outcome_state, parse_outcome

RESULT = {
    "id": "a", "model": "demo", "seed": 1,
    "choices": [{"index": 0, "text": "x", "token_ids": [87], "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    "timings": {"waiting_s": 0, "prefill_s": 0, "decode_s": 0},
}  # fmt: skip


def record(status: str, result: Any) -> str:
    return json.dumps({"status": status, "result": result, "traceback": None, "children": [], "task_id": "a"})


def failure(name: str, *args: Any) -> str:
    return record("FAILURE", {"exc_type": name, "exc_message": list(args), "exc_module": "headrace.client.wire.errors"})


def test_a_success_is_a_result() -> None:
    outcome = parse_outcome(record("SUCCESS", RESULT))
    assert isinstance(outcome, Result)
    assert outcome_state(outcome) == "succeeded"


def test_a_result_of_a_later_worker_is_read_and_what_is_new_in_it_passed_over() -> None:
    def more(value: Any) -> Any:
        if isinstance(value, list):
            return [more(item) for item in value]
        return {**{k: more(v) for k, v in value.items()}, "colour": "red"} if isinstance(value, dict) else value

    assert parse_outcome(record("SUCCESS", {**more(RESULT), "schema_version": 2})) == parse_outcome(
        record("SUCCESS", {**RESULT, "schema_version": 2})
    )


@pytest.mark.parametrize(
    ("name", "kind", "state"),
    [
        ("JobFailed", JobFailed, "failed"),
        ("JobCancelled", JobCancelled, "cancelled"),
        ("JobExpired", JobExpired, "expired"),
    ],
)
def test_errors_of_jobs_are_decoded_with_code_message_and_partial_text(
    name: str, kind: type[JobError], state: str
) -> None:
    outcome = parse_outcome(failure(name, "some_code", "what to do", ["half a te"]))
    assert isinstance(outcome, kind)
    assert (outcome.code, outcome.message, outcome.partial) == ("some_code", "what to do", ["half a te"])
    assert outcome_state(outcome) == state


def test_revoked_is_cancelled_and_celerys_time_limit_is_expired() -> None:
    for arguments in (["expired"], "expired"):
        outcome = parse_outcome(record("REVOKED", {"exc_type": "TaskRevokedError", "exc_message": arguments}))
        assert isinstance(outcome, JobCancelled)
        assert "`expires`" in outcome.message
    for arguments in (["revoked"], ["terminated"], [], 5):
        value = {"exc_type": "TaskRevokedError", "exc_message": arguments}
        assert isinstance(parse_outcome(record("REVOKED", value)), JobCancelled)
    assert isinstance(parse_outcome(record("REVOKED", None)), JobCancelled)
    assert isinstance(parse_outcome(record("REVOKED", {"exc_type": "TaskRevokedError"})), JobCancelled)
    assert isinstance(parse_outcome(failure("TimeLimitExceeded", 5)), JobExpired)


def test_any_other_exception_is_a_failure_that_names_it() -> None:
    outcome = parse_outcome(failure("MemoryError", "out"))
    assert isinstance(outcome, JobFailed)
    assert outcome.code == "worker_error"
    assert "MemoryError" in outcome.message


@pytest.mark.parametrize("status", ["PENDING", "STARTED", "RETRY"])
def test_unfinished_states_are_no_outcome(status: str) -> None:
    assert parse_outcome(record(status, None)) is None
    assert parse_outcome(None) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', "{}", record("SUCCESS", {"id": "\ud83d"}), record("FAILURE", "x")]
)
def test_an_unreadable_record_is_a_failed_job(text: str) -> None:
    outcome = parse_outcome(text)
    assert isinstance(outcome, JobFailed)
    assert outcome.code == "unreadable_result"


def test_the_repr_of_an_error_contains_no_text_of_a_user() -> None:
    assert "secret" not in repr(JobCancelled(message="the job was cancelled", partial=["secret"]))


@given(
    st.sampled_from(["SUCCESS", "FAILURE", "REVOKED", "STARTED", "RETRY", "", 1, None, [], {}]),
    st.sampled_from([RESULT, None, {}, [], "x", {"exc_type": "X", "exc_message": []}]),
    st.sampled_from(["{status, result}", "{status}", "{result}", "[status]", "status", "cut"]),
)
def test_whether_a_job_has_ended_is_seen_without_its_result(status: Any, result: Any, form: str) -> None:
    whole = json.dumps({"status": status, "result": result})
    text = {
        "{status, result}": whole,
        "{status}": json.dumps({"status": status}),
        "{result}": json.dumps({"result": result}),
        "[status]": json.dumps([status]),
        "status": json.dumps(status),
        "cut": whole[:-1],
    }[form]
    assert has_ended(text) == (parse_outcome(text) is not None)
    assert not has_ended(None)

"""Celery's result backend as a worker uses it: the end of every job is recorded, whatever its sender asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
from celery import Celery
from celery.app.task import Context
from celery.app.trace import build_tracer

from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.errors import JobCancelled, JobError, JobExpired, JobFailed, ResultNotKept
from headrace.client.wire.results import Outcome, Result, State, outcome_state, parse_outcome
from headrace.config import load_settings
from headrace.worker import tasks
from headrace.worker.celery import make_app
from tests.unit.client.test_results import RESULT

#: How a task body ends -> the state of its job.
ENDS: list[tuple[Any, State]] = [
    (RESULT, "succeeded"),
    (JobFailed("nan_logits", "what to do", ["half a te"]), "failed"),
    (JobCancelled("cancelled", "it was cancelled", ["half a te"]), "cancelled"),
    (JobExpired("expired", "too late", ["half a te"]), "expired"),
    (RuntimeError("a fault of the worker"), "failed"),
]


@pytest.fixture
def app() -> Iterator[Celery]:
    made = make_app(load_settings(redis_url="redis://localhost:1/0"))
    made.backend.client = fakeredis.FakeStrictRedis()
    yield made
    made.close()


def stored(app: Celery, job_id: str = "job") -> Outcome | None:
    name = keys.result(job_id).removeprefix(keys.PREFIX)
    (found,) = [key for key in app.backend.client.keys("*") if key.decode().endswith(name)] or [None]
    return None if found is None else parse_outcome(app.backend.client.get(found).decode())


def run(app: Celery, end: Any, monkeypatch: pytest.MonkeyPatch, **headers: Any) -> None:
    """Run the task as Celery's pools do, with a body that ends like this."""

    class Service:
        def generate(self, *_: Any) -> Any:
            if isinstance(end, BaseException):
                raise end
            return end

    monkeypatch.setattr(tasks, "service_for", lambda _: Service())
    tracer = build_tracer(TASK_NAME, app.tasks[TASK_NAME], app=app)
    tracer("job", ({"prompt": "Hello."},), {}, {"id": "job", "task": TASK_NAME, "is_eager": False, **headers})


@pytest.mark.parametrize(("end", "state"), ENDS)
@pytest.mark.parametrize("asked_by", ["message", "task"])
def test_a_job_whose_result_is_ignored_ends_without_its_text(
    app: Celery, end: Any, state: State, asked_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.tasks[TASK_NAME], "ignore_result", asked_by == "task")
    headers = {"ignore_result": True} if asked_by == "message" else {}
    run(app, end, monkeypatch, **headers)
    outcome = stored(app)
    assert isinstance(outcome, JobError)
    assert outcome_state(outcome) == state
    assert isinstance(outcome, ResultNotKept) == (state == "succeeded")
    assert outcome.partial == []
    kept = b"".join(app.backend.client.mget(app.backend.client.keys()))
    assert b"half a te" not in kept
    assert b"token_ids" not in kept


def test_a_result_that_is_not_ignored_is_stored_whole(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    run(app, RESULT, monkeypatch, ignore_result=False)
    assert isinstance(stored(app), Result)


def test_errors_keep_their_text_if_the_worker_stores_them_although_ignored(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.tasks[TASK_NAME], "store_errors_even_if_ignored", True)
    run(app, JobFailed("nan_logits", "what to do", ["half a te"]), monkeypatch, ignore_result=True)
    outcome = stored(app)
    assert isinstance(outcome, JobFailed)
    assert outcome.partial == ["half a te"]


@pytest.mark.parametrize("reason", ["revoked", "expired", "terminated"])
def test_a_revoked_job_whose_result_is_ignored_has_ended(app: Celery, reason: str) -> None:
    """Celery's own pools pass `store_result` from the message."""
    request = Context(id="job", task=TASK_NAME, ignore_result=True)
    app.backend.mark_as_revoked("job", reason, request=request, store_result=False)
    assert isinstance(stored(app), JobCancelled)


def test_the_message_of_a_group_and_tasks_of_others_keep_nothing(app: Celery) -> None:
    for task in (GROUP_TASK_NAME, "celery.chord_unlock", "somebody.elses"):
        request = Context(id="job", task=task, ignore_result=True)
        app.backend.mark_as_done("job", None, request=request, store_result=False)
        app.backend.mark_as_failure("job", ValueError("x"), request=request, store_result=False)
        app.backend.mark_as_revoked("job", "revoked", request=request, store_result=False)
        assert stored(app) is None


def test_a_result_that_was_not_kept_says_why() -> None:
    outcome = parse_outcome(json.dumps({"status": "SUCCESS", "result": None}))
    assert isinstance(outcome, ResultNotKept)
    assert outcome.code == "result_not_kept"
    assert "ignore_result=True" in str(outcome)

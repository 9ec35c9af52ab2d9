"""The observers of jobs: what log, counters and metrics record for each end."""

from __future__ import annotations

from typing import Any

import pytest
from celery.exceptions import TaskRevokedError, TimeLimitExceeded
from structlog.testing import capture_logs

from headrace.client.wire.errors import JobCancelled, JobExpired, JobFailed
from headrace.client.wire.keys import tag
from headrace.client.wire.results import Result, Timings, Usage
from headrace.worker.jobs.observers import (
    LATENCY_JOBS,
    SHOWN_FAILURES,
    Ending,
    JobCounts,
    JobLog,
    JobObserver,
    MetricsObserver,
    Observers,
    SpanObserver,
    StartedJobs,
    as_outcome,
)


def result() -> Result:
    usage = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    timings = Timings(waiting_s=0, prefill_s=0, decode_s=0)
    return Result(id="a", model="demo", choices=[], seed=0, usage=usage, timings=timings)


def ending(outcome: Any, job_id: str = "a", *, routine: bool = False) -> Ending:
    return Ending(job_id, "demo", outcome, routine)


def test_each_end_is_counted_and_the_last_failures_are_kept_by_model() -> None:
    counts = JobCounts()
    for outcome in (result(), result(), JobCancelled(), JobExpired(), RuntimeError("logged where it was raised")):
        counts.ended(ending(outcome))
    for number in range(SHOWN_FAILURES + 2):
        counts.ended(ending(JobFailed("nan_logits"), str(number)))
    assert counts.finished == {"succeeded": 2, "failed": SHOWN_FAILURES + 2, "cancelled": 1, "expired": 1}
    assert [failure["job"] for failure in counts.failures["demo"]] == [
        tag(str(number)) for number in range(2, SHOWN_FAILURES + 2)
    ]
    assert {failure["code"] for failure in counts.failures["demo"]} == {"nan_logits"}
    assert not counts.failures["other"]
    assert counts.summary("demo")["ended"] == counts.finished


def test_latencies_are_percentiles_of_the_last_jobs_by_nearest_rank() -> None:
    counts = JobCounts()
    nothing = {"jobs": 0, "first_token_s": [], "total_s": []}
    assert counts.summary("demo") == {"ended": dict.fromkeys(counts.finished, 0), "latency": nothing}
    for hundredths in (*[10_000] * LATENCY_JOBS, *range(LATENCY_JOBS, 0, -1)):
        timings = Timings(waiting_s=hundredths / 200, prefill_s=hundredths / 200, decode_s=1)
        counts.ended(ending(result().model_copy(update={"timings": timings})))
    # 256 values 0.01, 0.02, ... 2.56: ranks 128, 231 (230.4 rounded up) and 254 (253.44 rounded up)
    expected = {"jobs": 256, "first_token_s": [1.28, 2.31, 2.54], "total_s": [2.28, 3.31, 3.54]}
    assert counts.summary("demo")["latency"] == expected


@pytest.mark.parametrize("routine", [False, True])
def test_the_log_has_a_line_for_each_end_and_routine_successes_at_debug_level(routine: bool) -> None:
    job_log = JobLog()
    with capture_logs() as lines:
        job_log.ended(ending(result(), routine=routine))
        job_log.ended(ending(JobFailed("nan_logits"), routine=routine))
        job_log.ended(ending(RuntimeError(), routine=routine))
    succeeded, failed = lines
    assert succeeded == {
        "event": "job.finished",
        "log_level": "debug" if routine else "info",
        "job_id": "a",
        "state": "succeeded",
        "model": "demo",
        "prompt_tokens": 3,
        "completion_tokens": 2,
    }
    assert (failed["log_level"], failed["state"], failed["code"]) == ("info", "failed", "nan_logits")


def test_the_log_has_the_trace_of_an_observer_that_was_added_later() -> None:
    class Spans:
        def ended(self, job_id: str, outcome: Any) -> str:
            return f"trace of {job_id}"

    observers = Observers(JobLog())
    observers.add(SpanObserver(Spans()))  # type: ignore[arg-type]
    with capture_logs() as lines:
        observers.ended(ending(result()))
    assert [line["trace_id"] for line in lines] == ["trace of a"]


def test_metrics_get_results_and_errors_of_jobs_only() -> None:
    counted: list[Any] = []

    class Metrics:
        def ended(self, outcome: Any, model_name: str) -> None:
            counted.append((outcome, model_name))

    observer = MetricsObserver(Metrics())  # type: ignore[arg-type]
    error = JobFailed("nan_logits")
    for outcome in (error, RuntimeError()):
        observer.ended(ending(outcome))
    assert counted == [(error, "demo")]


def test_started_jobs_are_taken_once() -> None:
    started = StartedJobs()
    for job_id in "ab":
        started.started(job_id)
    assert started.take() == ["a", "b"]
    assert started.take() == []


def test_observer_methods_do_nothing_by_default() -> None:
    observer: JobObserver = StartedJobs()
    observer.computed("a")
    observer.ended(ending(result()))
    observer.returned(["a"])


def test_celerys_exceptions_become_errors_of_the_job() -> None:
    revoked, late = as_outcome(TaskRevokedError("revoked")), as_outcome(TimeLimitExceeded(3))
    assert isinstance(revoked, JobCancelled)
    assert isinstance(late, JobExpired)
    assert as_outcome(error := JobFailed("nan_logits")) is error

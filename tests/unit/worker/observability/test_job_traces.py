"""The spans of jobs in a worker: the pool with a real engine, a store in memory, and OpenTelemetry's own SDK."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from headrace.client.wire.tracing import TRACES_HEADER
from headrace.config import SettingsError, load_settings
from headrace.config.tracing import setup_tracing
from tests.patience import PATIENCE_S
from tests.unit.worker.engine.engine_helpers import build
from tests.unit.worker.jobs.memory_store import MemoryStore
from tests.unit.worker.jobs.test_pool import Make, Message, deliver, make
from tests.unit.worker.jobs.test_stall import BlockedRunner, until

__all__ = ["make"]  # the fixture

#: The trace and the span of a client, by the number of its job.
CLIENT = "00-{0:032x}-{0:016x}-0{1}"


def message(*job_ids: str, sampled: bool = True, **request: Any) -> Message:
    """A group whose jobs have the parent spans 1, 2, ... in as many traces."""
    made = Message(*job_ids)
    (members,) = made.request_dict["args"]
    for member in members:
        member["request"] = member["request"] | request
    carriers = {j: {"traceparent": CLIENT.format(i, int(sampled))} for i, j in enumerate(job_ids, 1)}
    made.request_dict[TRACES_HEADER] = carriers  # type: ignore[assignment]
    return made


def visits(spans: InMemorySpanExporter) -> dict[Any, ReadableSpan]:
    """The spans of jobs, by job."""
    return {
        span.attributes["headrace.job_id"]: span
        for span in spans.get_finished_spans()
        if span.attributes and "headrace.job_id" in span.attributes
    }


def parts(spans: InMemorySpanExporter, of: ReadableSpan) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.parent == of.context]


def test_a_job_is_a_span_under_its_clients_with_what_the_time_went_to(make: Make, spans: InMemorySpanExporter) -> None:
    before = time.time_ns()
    assert deliver(make(MemoryStore()), message("a", "b", seed=7, stop=["secret"])).over.wait(PATIENCE_S)
    found = visits(spans)
    assert found.keys() == {"a", "b"}
    for number, span in enumerate((found["a"], found["b"]), 1):
        assert (span.name, span.kind) == ("text_completion demo", SpanKind.CONSUMER)
        assert span.status.status_code == StatusCode.UNSET
        assert span.parent is not None
        assert span.context is not None
        assert (span.context.trace_id, span.parent.span_id) == (number, number)
        assert before <= (span.start_time or 0) < (span.end_time or 0) <= time.time_ns()
        inside = parts(spans, span)
        assert [part.name for part in inside] == ["wait", "prefill", "decode", "store"]
        marks = [inside[0].start_time, *[part.end_time for part in inside]]
        assert marks == sorted(marks)  # type: ignore[type-var]
        assert [part.start_time for part in inside] == marks[:-1], "each phase begins when the one before ends"
        assert (marks[0], marks[-1]) == (span.start_time, span.end_time)
    assert dict(found["a"].attributes or {}) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0,
        "gen_ai.request.seed": 7,
        "gen_ai.response.id": "a",
        "gen_ai.response.model": "demo",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 4,
        "messaging.system": "celery",
        "messaging.operation.type": "process",
        "messaging.operation.name": "process",
        "messaging.destination.name": "headrace.demo",
        "headrace.job_id": "a",
        "headrace.attempt": 1,
        "headrace.redelivered": False,
        "headrace.state": "succeeded",
    }
    everything = "".join(span.to_json() for span in spans.get_finished_spans())
    assert "Hello" not in everything
    assert "secret" not in everything


def test_a_job_that_fails_has_status_error_and_the_code(make: Make, spans: InMemorySpanExporter) -> None:
    assert deliver(make(MemoryStore()), message("a", prompt=[60000])).over.wait(PATIENCE_S)
    span = visits(spans)["a"]
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "invalid_token_id")
    assert span.attributes is not None
    assert (span.attributes["error.type"], span.attributes["headrace.state"]) == ("invalid_token_id", "failed")
    assert [part.name for part in parts(spans, span)] == ["wait", "store"]


def test_the_span_of_a_redelivered_job_has_its_attempt(make: Make, spans: InMemorySpanExporter) -> None:
    again = message("a")
    again.request_dict["delivery_info"] = {"redelivered": True}  # type: ignore[assignment]
    assert deliver(make(MemoryStore(attempts={"a": 1})), again).over.wait(PATIENCE_S)
    attributes = visits(spans)["a"].attributes
    assert attributes is not None
    assert (attributes["headrace.attempt"], attributes["headrace.redelivered"]) == (2, True)


def test_the_span_of_a_returned_job_says_so(make: Make, spans: InMemorySpanExporter) -> None:
    go_on = threading.Event()
    store = MemoryStore()
    pool = make(store, build(runner=type("Blocked", (BlockedRunner,), {"go_on": go_on}), slots=4))
    deliver(pool, message("a"))
    until(lambda: store.states.get("a") == "running")
    pool.finish_within(0)
    threading.Timer(0.2, go_on.set).start()
    pool.on_terminate()
    span = visits(spans)["a"]
    assert (span.attributes or {})["headrace.state"] == "returned"
    assert [part.name for part in parts(spans, span)] == ["wait", "compute"]


def test_the_span_of_a_cancelled_job_has_no_error_status(make: Make, spans: InMemorySpanExporter) -> None:
    assert deliver(make(MemoryStore(cancels={"a"})), message("a")).over.wait(PATIENCE_S)
    span = visits(spans)["a"]
    assert span.status.status_code == StatusCode.UNSET
    assert (span.attributes or {})["headrace.state"] == "cancelled"


def test_jobs_that_the_client_does_not_sample_are_not_recorded(make: Make, spans: InMemorySpanExporter) -> None:
    store = MemoryStore()
    assert deliver(make(store), message("a", sampled=False)).over.wait(PATIENCE_S)
    assert "a" in store.results
    assert spans.get_finished_spans() == ()


def test_invalid_trace_headers_cause_no_failure(make: Make, spans: InMemorySpanExporter) -> None:
    """OpenTelemetry's protocol cannot encode such numbers, and the export of all spans would fail."""
    odd = message("a", seed=2**80, top_k=-(2**70))
    odd.request_dict[TRACES_HEADER] = {"a": {"traceparent": ["00"], "tracestate": {}}}  # type: ignore[assignment]
    store = MemoryStore()
    assert deliver(make(store), odd).over.wait(PATIENCE_S)
    span = visits(spans)["a"]
    assert span.parent is None
    assert not {"gen_ai.request.seed", "gen_ai.request.top_k"} & (span.attributes or {}).keys()


def test_without_opentelemetry_the_setting_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(SettingsError, match=r"pip install '\.\[otel\]' -c constraints.txt` in a clone"):
        setup_tracing(load_settings(otel=True), "test")


def test_an_existing_tracer_provider_is_not_replaced(spans: InMemorySpanExporter) -> None:
    from opentelemetry import trace

    before = trace.get_tracer_provider()
    setup_tracing(load_settings(otel=True), "test")()
    assert trace.get_tracer_provider() is before

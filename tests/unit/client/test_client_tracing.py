"""Spans of submissions, and the trace context in messages, exported by OpenTelemetry's SDK."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from headrace.client import AsyncClient, Client, QueueFull
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.client.wire.tracing import TRACES_HEADER, carried, context_of, sending
from headrace.config.tracing import find_tracer


@pytest.fixture
def client(redis_url: str, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client with a separate queue."""
    with Client(redis_url=redis_url, model=f"traces-{abs(hash(request.node.name))}") as made:
        yield made


def headers_of(client: Client) -> list[dict[str, Any]]:
    """The headers of the messages in the client's queue, in the order of sending."""
    names = keys.queue_lists(client.model_name)
    with connect(client.url) as connection:
        return [json.loads(text)["headers"] for name in names for text in reversed(connection.lrange(name, 0, -1))]  # type: ignore[arg-type]


def parent_in(span: ReadableSpan) -> str:
    """The traceparent that names a span, as W3C writes it."""
    context = span.get_span_context()
    assert context is not None
    return f"00-{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}-{context.trace_flags:02x}"


def test_a_job_is_sent_within_the_callers_span(client: Client, spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("caller").start_as_current_span("caller"):
        job = client.submit("a secret", stop="secret")
    sent, caller = spans.get_finished_spans()
    assert (sent.name, sent.kind) == (f"send headrace.{client.model_name}", SpanKind.PRODUCER)
    assert sent.parent == caller.get_span_context()
    assert dict(sent.attributes or {}) == {
        "messaging.system": "celery",
        "messaging.operation.type": "send",
        "messaging.operation.name": "send",
        "messaging.destination.name": f"headrace.{client.model_name}",
        "headrace.job_id": job.id,
    }
    (headers,) = headers_of(client)
    assert headers["traceparent"] == parent_in(sent)
    assert "secret" not in sent.to_json()


def test_each_job_of_a_message_has_its_own_context(client: Client, spans: InMemorySpanExporter) -> None:
    jobs = client.submit_many(["Hello."] * 20)
    sent = {(span.attributes or {})["headrace.job_id"]: span for span in spans.get_finished_spans()}
    assert len({span.context.trace_id for span in sent.values() if span.context}) == 20, "a trace a job"
    found = [headers[TRACES_HEADER] for headers in headers_of(client)]
    assert [len(traces) for traces in found] == [16, 4]
    assert found[0] | found[1] == {job.id: {"traceparent": parent_in(sent[job.id])} for job in jobs}


def test_the_asyncio_client_continues_the_callers_trace(client: Client, spans: InMemorySpanExporter) -> None:
    async def submit() -> None:
        async with AsyncClient(redis_url=client.url, model=client.model_name) as other:
            with trace.get_tracer("caller").start_as_current_span("caller"):
                await other.submit("Hello.")

    asyncio.run(submit())
    sent, caller = spans.get_finished_spans()
    assert sent.parent == caller.get_span_context()


def test_a_job_that_could_not_be_sent_has_a_span_with_the_code(spans: InMemorySpanExporter) -> None:
    with pytest.raises(QueueFull), sending(["a", "b"], "headrace.demo"):
        raise QueueFull("headrace.demo", 2, 2)
    for span in spans.get_finished_spans():
        assert (span.status.status_code, (span.attributes or {})["error.type"]) == (StatusCode.ERROR, "queue_full")
        assert span.events == (), "what the error says may be somebody's words"


def test_a_program_without_opentelemetry_submits(client: Client) -> None:
    """Importing opentelemetry raises here; redis-py tries to import it too."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None; from headrace.client import Client; "
        f"Client(redis_url={client.url!r}, model={client.model_name!r}).submit('Hello.')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    (headers,) = headers_of(client)
    assert "traceparent" not in headers


def test_a_program_that_has_not_set_it_up_has_no_tracer() -> None:
    assert find_tracer() is None


GOOD = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # the example in W3C's Trace Context specification


@pytest.mark.parametrize(
    "carrier",
    [
        None,
        7,
        [GOOD],
        {"traceparent": 7},
        {"traceparent": [GOOD]},
        {"traceparent": ""},
        {"traceparent": GOOD.upper()},
        {"traceparent": GOOD + "-more"},
        {"traceparent": GOOD.replace("00-", "ff-", 1)},
        {"traceparent": "00-" + "0" * 32 + "-b7ad6b7169203331-01"},
        {"traceparent": "0" * 1_000_000},
        {"tracestate": "a=b"},
    ],
)
def test_an_invalid_context_is_ignored(carrier: Any) -> None:
    assert context_of(carrier) == {}
    for headers in (carrier, {TRACES_HEADER: carrier}, {TRACES_HEADER: {"job": carrier}}):
        if isinstance(headers, dict):
            assert carried(headers, "job", grouped=True) == {}


def test_a_tracestate_that_is_too_long_is_left_out() -> None:
    state = ",".join(f"k{i}={'v' * 200}" for i in range(30))
    span = trace.get_current_span(context_of({"traceparent": GOOD, "tracestate": state})).get_span_context()
    assert format_trace_id(span.trace_id) == "0af7651916cd43dd8448eb211c80319c"
    assert len(span.trace_state) == 0

"""One trace from the request to the stored result: real workers and a real server that export to a collector."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id

from headrace.client import Client, JobFailed
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.collector import Collector
from tests.integration.http_server import HttpServer
from tests.integration.processes import WorkerProcess, attempts, paced, wait_until, worker_on
from tests.patience import PATIENCE_S

KEY = "key-" * 8
#: The example in W3C's Trace Context specification.
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as made:
        yield made


@pytest.fixture
def client(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client that signs, because trace contexts are not signed."""
    monkeypatch.setenv("HEADRACE_SIGNING_KEY", KEY)
    with Client(redis_url=server.url) as made:
        yield made


def traced_worker(server: EmbeddedRedis, collector: Collector, log: Path, patch: str = "") -> WorkerProcess:
    return worker_on(server, log, patch=patch, HEADRACE_SIGNING_KEY=KEY, **collector.settings)


def test_a_job_is_one_trace_from_submit_to_result_through_a_worker_that_dies(
    server: EmbeddedRedis, client: Client, collector: Collector, spans: InMemorySpanExporter, tmp_path: Path
) -> None:
    with traced_worker(server, collector, tmp_path / "first.log", paced(0.05)) as first:
        first.wait_ready()
        with trace.get_tracer("caller").start_as_current_span("caller") as caller:
            job = client.submit("Hello.", max_tokens=200, temperature=0, ignore_eos=True)
        wait_until(lambda: attempts(client, job.id) == 1 and job.status() == "running")
    with traced_worker(server, collector, tmp_path / "second.log") as second:
        assert job.result(PATIENCE_S).usage.completion_tokens == 200
        bad, group = client.submit([60000]), client.submit_many(["Hello."] * 3, max_tokens=2)
        with pytest.raises(JobFailed):
            bad.result(PATIENCE_S)
        for one in group:
            one.result(PATIENCE_S)
        with HttpServer(tmp_path, server.url, HEADRACE_SIGNING_KEY=KEY, **collector.settings) as http:
            headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
            body = {"model": "demo", "prompt": "Hello.", "max_tokens": 2}
            answer = httpx.post(f"{http.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE_S)
            assert answer.status_code == 200
            assert http.end() == 0
        second.signal(signal.SIGTERM)
        assert second.wait() == 0  # the last spans are sent by then
        logged = {line["job_id"]: line["trace_id"] for line in second.events("job.finished")}

    sent = {(s.attributes or {}).get("headrace.job_id"): s.get_span_context() for s in spans.get_finished_spans()}
    assert None not in sent.values()
    (again,) = collector.of_job(job.id)
    assert again.trace_id == format_trace_id(caller.get_span_context().trace_id) == logged[job.id]
    assert again.parent_id == format_span_id(sent[job.id].span_id)  # type: ignore[union-attr]
    assert (again.attributes["headrace.attempt"], again.attributes["headrace.redelivered"]) == (2, True)
    assert again.service == "headrace-worker"
    inside = [span for span in collector.spans if span.parent_id == again.span_id]
    assert [span.name for span in sorted(inside, key=lambda s: s.start)] == ["wait", "prefill", "decode", "store"]
    (failed,) = collector.of_job(bad.id)
    assert (failed.status, failed.attributes["error.type"]) == (2, "invalid_token_id")
    for one in group:
        (visit,) = collector.of_job(one.id)
        assert visit.parent_id == format_span_id(sent[one.id].span_id)  # type: ignore[union-attr]
    _check_request(collector)
    assert b"Hello" not in collector.raw


def _check_request(collector: Collector) -> None:
    """The request, the message and the job are one chain in the trace that the request named."""
    (visit,) = [span for span in collector.spans if span.trace_id == TRACE and span.kind == 5]
    by_id = {span.span_id: span for span in collector.spans}
    sent = by_id[visit.parent_id]
    asked = by_id[sent.parent_id]
    assert (asked.name, asked.parent_id, asked.service) == ("POST /v1/completions", SPAN, "headrace-serve")
    assert asked.attributes["http.response.status_code"] == 200
    assert asked.start <= sent.start <= visit.start <= visit.end <= asked.end

"""An OpenTelemetry collector for tests: it receives spans over HTTP and decodes them with opentelemetry-proto."""

from __future__ import annotations

import http.server
import threading
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Collected:
    """A received span, with the name of the service that sent it."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    status: int
    start: int
    end: int
    attributes: dict[str, Any]


class Collector:
    """Listens at `url` in a `with` block; `spans` has the received spans, `raw` the bytes."""

    def __init__(self) -> None:
        self.spans: list[Collected] = []
        self.raw = b""
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    collector.take(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def settings(self) -> dict[str, str]:
        """The environment of a program that sends its spans here with a short delay."""
        delay = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
        return {"HEADRACE_OTEL": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": self.url, **delay}

    def take(self, body: bytes) -> None:
        """Decode the body of a request."""
        self.raw += body
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _attributes(sent.resource.attributes)["service.name"]
            for span in [span for scope in sent.scope_spans for span in scope.spans]:
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                times = (span.start_time_unix_nano, span.end_time_unix_nano)
                found = _attributes(span.attributes)
                self.spans.append(Collected(service, span.name, *ids, span.kind, span.status.code, *times, found))

    def of_job(self, job_id: str) -> list[Collected]:
        """The spans that workers created for a job, in the order of arrival."""
        return [s for s in self.spans if s.attributes.get("headrace.job_id") == job_id and s.kind == 5]


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}

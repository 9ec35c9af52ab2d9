"""The HTTP port for probes and metrics. It is meant for a private network: anyone who can reach it can read everything,
and change nothing.

    /livez    200, or 503 if a restart would help: the engine is stuck in a step (HEADRACE_STALL_S)
    /readyz   200, or 503 and why no job would be taken now
    /metrics  for Prometheus
"""

from __future__ import annotations

import http.server
import socket
import socketserver
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from headrace.config import Settings
from headrace.extras import how_to_install

if TYPE_CHECKING:
    from headrace.worker.observability.metrics import Metrics

log = structlog.get_logger("headrace.worker")

#: A connection that sends nothing for this many seconds is closed.
REQUEST_TIMEOUT_S = 5.0
PLAIN = "text/plain; charset=utf-8"
LOADING = "the model is being loaded"

MISSING = (
    "HEADRACE_METRICS_PORT is set, and that needs the package prometheus_client; to install it "
    f"{how_to_install('metrics')}, or unset HEADRACE_METRICS_PORT"
)


class ProbesError(RuntimeError):
    """Raised when the port cannot be opened, or a package is missing; the message says what to do."""


class Health(Protocol):
    """What the probes report."""

    def why_not_alive(self) -> str:
        """The problem that a restart would solve; empty if there is none."""

    def why_not_ready(self) -> str:
        """Why no job would be taken now; empty if one would."""


def open_probes(settings: Settings) -> Probes | None:
    """Listen at the port of the settings. Returns None if they have none. Raises ProbesError."""
    if not settings.metrics_port:
        return None
    try:
        from headrace.worker.observability.metrics import Metrics
    except ImportError as error:
        raise ProbesError(MISSING) from error
    return Probes(settings.metrics_host, settings.metrics_port, Metrics(*settings.models))


class Probes:
    """An HTTP server that listens as soon as it is created, so that a taken port is found before a model is loaded.

    Args:
        host: the address or host name to listen at.
        port: 0 chooses a free port.
        metrics: what `/metrics` shows.

    Raises:
        ProbesError: the address or the port cannot be used.
    """

    def __init__(self, host: str, port: int, metrics: Metrics) -> None:
        self.metrics = metrics
        self._health: Health | None = None
        try:
            self._server = _Server(host, port, self)
        except OSError as error:
            raise ProbesError(
                f"cannot listen at {host}, port {port} ({error.strerror or error}); set HEADRACE_METRICS_HOST to an "
                "address of this machine and HEADRACE_METRICS_PORT to a free port, one for each worker, or to 0"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="headrace-probes", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens at."""
        return int(self._server.server_address[1])

    def watch(self, health: Health) -> None:
        """The model is loaded: report this health from now on."""
        self._health = health

    def stop(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """Return status, content type and body for a path."""
        if path == "/metrics":
            return 200, *self.metrics.render(accept)
        health = self._health
        if path == "/livez":
            fault = health.why_not_alive() if health else ""
        elif path == "/readyz":
            fault = health.why_not_ready() if health else LOADING
        else:
            return 404, PLAIN, b"there are /livez, /readyz and /metrics\n"
        return 503 if fault else 200, PLAIN, f"{fault or 'ok'}\n".encode()


class _Server(socketserver.ThreadingTCPServer):
    """One thread for each request: a slow client must not make the worker look dead."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, probes: Probes) -> None:
        self.probes = probes
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = addresses[0][0], addresses[0][4]
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type]

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Called by socketserver while it handles an exception."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # the client closed the connection
            log.error("probes.failed", error=repr(error))


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "headrace", ""
    timeout = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        """Called by http.server."""
        path = self.path.partition("?")[0]
        status, content_type, body = self.server.probes.answer(path, self.headers.get("Accept", ""))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Do not log requests: the lines of probes would hide all others."""

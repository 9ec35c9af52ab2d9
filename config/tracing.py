"""OpenTelemetry for headrace programs. Needs the extra `otel`, and imports OpenTelemetry only when it is enabled.

If a program has set up OpenTelemetry itself, headrace uses that provider: a library must not install an exporter.
"""

from __future__ import annotations

import functools
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from headrace import __version__
from headrace.config.settings import Settings, SettingsError
from headrace.extras import how_to_install

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer, TracerProvider

#: Seconds that a program waits at its end for the collector to accept the last spans.
FLUSH_S = 3.0

MISSING = (
    f"HEADRACE_OTEL is set, but OpenTelemetry is not installed; to install it {how_to_install('otel')}, "
    "or unset HEADRACE_OTEL"
)


def find_tracer() -> Tracer | None:
    """The tracer, or None if this program has not set up OpenTelemetry; then it costs only a dict lookup."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace  # waits if another thread is importing it

    provider = trace.get_tracer_provider()
    return None if isinstance(provider, trace.ProxyTracerProvider) else _tracer_of(provider)


@functools.lru_cache(1)
def _tracer_of(provider: TracerProvider) -> Tracer:
    return provider.get_tracer("headrace", __version__)


def setup_tracing(settings: Settings, service: str) -> Callable[[], None]:
    """Export spans over OTLP/HTTP, configured by the standard variables OTEL_*, if `settings.otel` is set.

    Does nothing if the program has already set up OpenTelemetry, as `opentelemetry-instrument` does.

    Args:
        service: the resource attribute `service.name`, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES sets it.

    Returns:
        A function to call before the program ends: it sends the last spans and waits at most `FLUSH_S` seconds.

    Raises:
        SettingsError: OpenTelemetry is not installed.
    """
    if not settings.otel or find_tracer() is not None:
        return lambda: None
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(MISSING) from error
    own = {
        "service.name": service,
        "service.version": __version__,
        "service.instance.id": f"{socket.gethostname()}-{os.getpid()}",
    }
    resource = Resource.create(own | dict(OTELResourceDetector().detect().attributes))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return functools.partial(_flush, provider.shutdown)


def _flush(shutdown: Callable[[], None]) -> None:
    """Shut down within `FLUSH_S`: for an unreachable collector, OpenTelemetry itself would wait half a minute."""
    ending = threading.Thread(target=shutdown, name="headrace-spans", daemon=True)
    ending.start()
    ending.join(FLUSH_S)

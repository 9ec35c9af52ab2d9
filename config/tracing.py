"""OpenTelemetry, set up by the program that starts, as logging is. Needs the extra `otel`; imports nothing until asked.

Whatever a program has set up itself is used: a library has no exporter of its own.
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
from headrace.config.extras import how_to_install
from headrace.config.settings import Settings, SettingsError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer, TracerProvider

#: How long the end of a program waits for a collector to take the last spans.
FLUSH_S = 3.0

MISSING = (
    f"HEADRACE_OTEL is set, and that needs packages of OpenTelemetry; to install them {how_to_install('otel')}, "
    "or unset HEADRACE_OTEL"
)


def find_tracer() -> Tracer | None:
    """A tracer, if this program has set OpenTelemetry up; None otherwise, at the cost of looking into a dict."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace  # waits, where another thread is just importing it

    provider = trace.get_tracer_provider()
    return None if isinstance(provider, trace.ProxyTracerProvider) else _tracer_of(provider)


@functools.lru_cache(1)
def _tracer_of(provider: TracerProvider) -> Tracer:
    return provider.get_tracer("headrace", __version__)


def setup_tracing(settings: Settings, service: str) -> Callable[[], None]:
    """Send spans over OTLP/HTTP, as the standard variables OTEL_* say, if the settings ask for it.

    Nothing is done where the program has set OpenTelemetry up before, as `opentelemetry-instrument` does.

    Args:
        service: `service.name`, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES has another.

    Returns:
        What to call in the end: it sends the last spans, for `FLUSH_S` at most.

    Raises:
        SettingsError: packages are missing.
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
    """A collector that is away must not hold up the end: OpenTelemetry itself would wait half a minute for it."""
    ending = threading.Thread(target=shutdown, name="headrace-spans", daemon=True)
    ending.start()
    ending.join(FLUSH_S)

"""Trace context in messages: W3C `traceparent` and `tracestate` for each job.

A message with one job has them as headers, like other instrumentations of Celery. A message with several jobs has them
by job id in the header `TRACES_HEADER`. They are not signed: anyone who can write to the queue can choose them. They
only decide to which trace a span belongs, and whether it is sampled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headrace.config.tracing import find_tracer

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

#: Headers of a message with one job.
CONTEXT_HEADERS = ("traceparent", "tracestate")
#: Longer values are ignored. W3C requires that a `tracestate` of up to this length is propagated.
MAX_CHARS = 512
#: Header of a message with several jobs: {job id: {"traceparent": ..., "tracestate": ...}}.
TRACES_HEADER = "traces"


@contextlib.contextmanager
def sending(job_ids: Sequence[str], queue: str) -> Iterator[dict[str, Any]]:
    """Start a span for each job while its message is sent. Yields the headers of the message, empty without tracing.

    The spans are children of the caller's current span, if there is one.
    """
    if (tracer := find_tracer()) is None:
        yield {}
        return
    from opentelemetry.trace import StatusCode, use_span

    attributes = {
        "messaging.system": "celery",
        "messaging.operation.type": "send",
        "messaging.operation.name": "send",
        "messaging.destination.name": queue,
    }
    spans = {job_id: _start(tracer, queue, attributes | {"headrace.job_id": job_id}) for job_id in job_ids}
    carriers = {job_id: carrier for job_id, span in spans.items() if (carrier := carrier_of(span))}
    first = spans[job_ids[0]]
    try:
        if len(spans) > 1:
            yield {TRACES_HEADER: carriers} if carriers else {}
        else:  # as the current span, so that spans of an instrumentation of Celery become its children
            with use_span(first, record_exception=False, set_status_on_exception=False):
                yield carriers.get(job_ids[0], {})
    except BaseException as error:
        for span in spans.values():
            span.set_attribute("error.type", getattr(error, "code", type(error).__name__))
            span.set_status(StatusCode.ERROR)
        raise
    finally:
        for span in spans.values():
            span.end()


def _start(tracer: Tracer, queue: str, attributes: dict[str, str]) -> Any:
    from opentelemetry.trace import SpanKind

    return tracer.start_span(f"send {queue}", kind=SpanKind.PRODUCER, attributes=attributes)


def carrier_of(span: Any) -> dict[str, str]:
    """The headers with the context of a span; empty if it has none."""
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier


def context_of(carrier: Any) -> Context:
    """The context in headers, which may come from anyone; empty if they are not valid."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    given = carrier if isinstance(carrier, Mapping) else {}
    values = {name: given.get(name) for name in CONTEXT_HEADERS}
    texts = {name: text for name, text in values.items() if isinstance(text, str) and len(text) <= MAX_CHARS}
    return TraceContextTextMapPropagator().extract(texts)


def carried(headers: Mapping[str, Any], job_id: str, *, grouped: bool) -> Context:
    """The context of a job in the headers of its message."""
    if not grouped:
        return context_of(headers)
    by_job = headers.get(TRACES_HEADER)
    return context_of(by_job.get(job_id) if isinstance(by_job, dict) else None)

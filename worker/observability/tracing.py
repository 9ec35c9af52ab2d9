"""OpenTelemetry spans of a worker's jobs: one span for each attempt at a job, with child spans for its phases.

    send headrace.demo         the client's span, client/wire/tracing.py
      text_completion demo     from the arrival of the message to the stored result
        wait                   until the job has a slot
        prefill                until the first token
        decode                 until the last token
        store                  until Redis has the result

Spans are created when the job has ended, in the threads that store results; the engine's thread only records times. A
worker that is killed leaves no span; the span of the next worker says which attempt it was.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id, set_span_in_context

from headrace.client.wire.errors import JobCancelled, JobError
from headrace.client.wire.keys import queue
from headrace.client.wire.requests import is_job_id
from headrace.client.wire.results import Result, outcome_state
from headrace.client.wire.tracing import carried

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

log = structlog.get_logger("headrace.worker")

#: Parameters of a request that become attributes, under the names of OpenTelemetry's GenAI conventions. Others may
#: contain text of users.
PARAMETERS = {
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
}


@dataclass
class _Visit:
    """A job that this worker holds. Times are Unix times in nanoseconds."""

    context: Context
    model: str
    request: Any
    attempt: int
    redelivered: bool
    arrived: int
    started: int | None = None
    computed: int | None = None


class JobTraces:
    """Records the times of a job's events, and creates its spans. May be used from any thread."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._lock = threading.Lock()
        self._visits: dict[str, _Visit] = {}

    def arrived(
        self,
        job_id: str,
        request: Any,
        headers: Mapping[str, Any],
        *,
        model: str,
        grouped: bool,
        ago_s: float,
        attempt: int,
    ) -> None:
        """A job arrived that is to be computed here.

        Args:
            job_id: its id.
            request: as it was sent, which need not be valid.
            headers: the headers of its message, as Celery passes them on.
            model: the model that computes it.
            grouped: its message can hold several jobs.
            ago_s: how many seconds ago the message was delivered.
            attempt: 1 for the first, and one more for each worker that ended while it had the job.
        """
        if not is_job_id(job_id):
            return  # somebody else's message, whose id may not be text that can be exported
        info = headers.get("delivery_info")
        redelivered = bool(isinstance(info, dict) and info.get("redelivered"))
        visit = _Visit(
            carried(headers, job_id, grouped=grouped),
            model,
            request,
            attempt,
            redelivered,
            time.time_ns() - int(ago_s * 1e9),
        )
        with self._lock:
            self._visits[job_id] = visit

    def started(self, job_id: str) -> None:
        """The job has a slot."""
        if (visit := self._visits.get(job_id)) is not None:
            visit.started = time.time_ns()

    def computed(self, job_id: str) -> None:
        """The job has an outcome, which is not stored yet."""
        if (visit := self._visits.get(job_id)) is not None:
            visit.computed = time.time_ns()

    def ended(self, job_id: str, outcome: Result | BaseException) -> str | None:
        """The outcome of the job is stored. Returns the id of its trace if it is recorded."""
        return self._close(job_id, outcome)

    def returned(self, job_ids: Iterable[str]) -> None:
        """Jobs were returned to the queue."""
        for job_id in job_ids:
            self._close(job_id, None)

    def _close(self, job_id: str, outcome: Result | BaseException | None) -> str | None:
        with self._lock:
            visit = self._visits.pop(job_id, None)
        if visit is None:
            return None
        try:
            return self._create_spans(job_id, visit, outcome, time.time_ns())
        except Exception:
            # An error in an exporter or sampler must not fail a job or end a thread.
            log.error("traces.failed", job_id=job_id, trace=traceback.format_exc())
            return None

    def _create_spans(self, job_id: str, visit: _Visit, outcome: Result | BaseException | None, now: int) -> str | None:
        span = self._tracer.start_span(
            f"text_completion {visit.model}",
            visit.context,
            SpanKind.CONSUMER,
            self._request_attributes(job_id, visit),
            start_time=visit.arrived,
        )
        if not span.is_recording():
            return None
        span.set_attributes(_outcome_attributes(job_id, outcome))
        if isinstance(outcome, BaseException) and not isinstance(outcome, JobCancelled):
            span.set_status(StatusCode.ERROR, _code(outcome))
        inside = set_span_in_context(span, visit.context)
        for name, start, end in _phases(visit, outcome, now):
            self._tracer.start_span(name, inside, start_time=start).end(end)
        span.end(now)
        return format_trace_id(span.get_span_context().trace_id)

    def _request_attributes(self, job_id: str, visit: _Visit) -> dict[str, Any]:
        given = visit.request if isinstance(visit.request, dict) else {}
        return {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "headrace",
            "gen_ai.request.model": visit.model,
            **{attribute: given[name] for name, attribute in PARAMETERS.items() if _is_number(given.get(name))},
            "messaging.system": "celery",
            "messaging.operation.type": "process",
            "messaging.operation.name": "process",
            "messaging.destination.name": queue(visit.model),
            "headrace.job_id": job_id,
            "headrace.attempt": visit.attempt,
            "headrace.redelivered": visit.redelivered,
        }


def _outcome_attributes(job_id: str, outcome: Result | BaseException | None) -> dict[str, Any]:
    if outcome is None:
        return {"headrace.state": "returned"}
    if not isinstance(outcome, Result):
        state = outcome_state(outcome) if isinstance(outcome, JobError) else "failed"
        return {"headrace.state": state, "error.type": _code(outcome)}
    return {
        "headrace.state": "succeeded",
        "gen_ai.response.id": job_id,
        "gen_ai.response.model": outcome.model,
        "gen_ai.response.finish_reasons": [choice.finish_reason for choice in outcome.choices],
        "gen_ai.usage.input_tokens": outcome.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": outcome.usage.completion_tokens,
    }


def _phases(visit: _Visit, outcome: Result | BaseException | None, now: int) -> Iterable[tuple[str, int, int]]:
    """The phases of a job, each with its name, start and end.

    Without a result it is not known when decoding began, so prefill and decode are one phase, `compute`.
    """
    computed = visit.computed or now
    if visit.started is None:
        yield "wait", visit.arrived, computed
    else:
        yield "wait", visit.arrived, visit.started
        if isinstance(outcome, Result):
            first = max(visit.started, computed - int(outcome.timings.decode_s * 1e9))
            yield "prefill", visit.started, first
            yield "decode", first, computed
        else:
            yield "compute", visit.started, computed
    if outcome is not None:
        yield "store", computed, now


def _code(error: BaseException) -> str:
    return error.code if isinstance(error, JobError) else "internal_error"


def _is_number(value: Any) -> bool:
    """Whether OpenTelemetry's protocol can encode it: with a larger number, the whole export would fail."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63

"""Observers of jobs: the log, the metrics, the spans and the counters learn here what happens to each job."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from headrace.client.wire.errors import JobCancelled, JobError, JobExpired, JobFailed
from headrace.client.wire.keys import tag
from headrace.client.wire.results import Result, State, outcome_state
from headrace.worker.jobs.deliveries import Delivery

log = structlog.get_logger("headrace.worker")

#: How many failures the record of a worker shows.
SHOWN_FAILURES = 10
#: The latencies in the record of a worker are those of so many jobs, the last that succeeded.
LATENCY_JOBS = 256
#: The percentiles of these latencies.
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Arrival:
    """A job that is to be computed here.

    Attributes:
        request: as it was sent, which need not be valid.
        attempt: 1 for the first, and one more for each worker that ended while it had the job.
    """

    job_id: str
    request: Any
    delivery: Delivery
    attempt: int


@dataclass(frozen=True)
class Ending:
    """The end of a job, whose result is stored.

    Attributes:
        outcome: its result, or the exception that it ended with.
        routine: log a success at debug level. A log line costs more than a short job, so grouped jobs are routine.
        details: more fields for the log. An observer may add some for those that follow it.
    """

    job_id: str
    model: str
    outcome: Result | BaseException
    routine: bool
    details: dict[str, Any] = field(default_factory=dict)


class JobObserver:
    """Is notified about each job of this process, from several threads. All methods do nothing unless overridden."""

    def received(self, delivery: Delivery) -> None:
        """A message was delivered."""

    def arrived(self, arrival: Arrival) -> None:
        """A job is to be computed here."""

    def started(self, job_id: str) -> None:
        """A job has a slot. Called in the engine's thread."""

    def computed(self, job_id: str) -> None:
        """A job has an outcome, which is not stored yet. Called in the engine's thread."""

    def ended(self, ending: Ending) -> None:
        """The result of a job is stored."""

    def returned(self, job_ids: Iterable[str]) -> None:
        """Jobs have been returned to the queue, or were ended by another worker."""


class Observers(JobObserver):
    """Passes everything on to other observers, in the order in which they were added."""

    def __init__(self, *observers: JobObserver) -> None:
        self._observers = list(observers)

    def add(self, observer: JobObserver) -> None:
        """Add an observer, in front of the others: the log comes last and has the details that all others added."""
        self._observers.insert(0, observer)

    def received(self, delivery: Delivery) -> None:
        for observer in self._observers:
            observer.received(delivery)

    def arrived(self, arrival: Arrival) -> None:
        for observer in self._observers:
            observer.arrived(arrival)

    def started(self, job_id: str) -> None:
        for observer in self._observers:
            observer.started(job_id)

    def computed(self, job_id: str) -> None:
        for observer in self._observers:
            observer.computed(job_id)

    def ended(self, ending: Ending) -> None:
        for observer in self._observers:
            observer.ended(ending)

    def returned(self, job_ids: Iterable[str]) -> None:
        for observer in self._observers:
            observer.returned(job_ids)


class JobCounts(JobObserver):
    """Counts how jobs ended, and remembers the last failures of each model."""

    def __init__(self) -> None:
        #: How many jobs ended in each state.
        self.finished: dict[str, int] = {"succeeded": 0, "failed": 0, "cancelled": 0, "expired": 0}
        #: The last jobs that failed, by model, as the worker's record shows them.
        self.failures: defaultdict[str, deque[dict[str, str | float]]] = defaultdict(
            lambda: deque(maxlen=SHOWN_FAILURES)
        )
        self._by_model: defaultdict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(self.finished, 0))
        self._latencies: defaultdict[str, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=LATENCY_JOBS))

    def ended(self, ending: Ending) -> None:
        if not isinstance(ending.outcome, (Result, JobError)):
            return
        state = outcome_state(ending.outcome)
        self.finished[state] += 1
        self._by_model[ending.model][state] += 1
        if isinstance(ending.outcome, Result) and ending.outcome.usage.completion_tokens:  # it had a first token
            timings = ending.outcome.timings
            first_s = timings.waiting_s + timings.prefill_s
            self._latencies[ending.model].append((first_s, first_s + timings.decode_s))
        if isinstance(error := ending.outcome, JobFailed):
            failure: dict[str, str | float] = {"job": tag(ending.job_id), "code": error.code}
            self.failures[ending.model].append({**failure, "at": round(time.time(), 1)})

    def summary(self, model: str) -> dict[str, Any]:
        """How many jobs of a model ended in each state since the start, and percentiles of the last latencies.

        Returns:
            `ended`, counts by state, and `latency`: `jobs`, and for `first_token_s` and `total_s`, both from the
            arrival in the engine, the values of PERCENTILES in seconds; empty lists before the first job succeeded.
        """
        latencies = tuple(self._latencies[model])
        values = {name: sorted(pair[i] for pair in latencies) for i, name in enumerate(("first_token_s", "total_s"))}
        shown = {
            name: [round(_percentile(found, p), 4) for p in PERCENTILES if found] for name, found in values.items()
        }
        return {"ended": dict(self._by_model[model]), "latency": {"jobs": len(latencies), **shown}}


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of a hundred values do not exceed (nearest rank)."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


class StartedJobs(JobObserver):
    """Remembers which jobs have got a slot until the heartbeat writes it into their records."""

    def __init__(self) -> None:
        self._job_ids: deque[str] = deque()

    def started(self, job_id: str) -> None:
        self._job_ids.append(job_id)

    def take(self) -> list[str]:
        """The jobs that have started since the last call."""
        return [self._job_ids.popleft() for _ in range(len(self._job_ids))]


class JobLog(JobObserver):
    """Writes a log line for each job that ended."""

    def ended(self, ending: Ending) -> None:
        outcome = ending.outcome
        if not isinstance(outcome, (Result, JobError)):
            return  # it was logged where it was raised
        details = {**ending.details, "job_id": ending.job_id, "state": outcome_state(outcome), "model": ending.model}
        if isinstance(outcome, JobError):
            log.info("job.finished", **details, code=outcome.code)
            return
        usage = outcome.usage
        details |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        log_success = log.debug if ending.routine else log.info
        log_success("job.finished", **details)


class JobMetrics(Protocol):
    """What `MetricsObserver` needs of `observability.metrics.Metrics`."""

    def ended(self, outcome: Result | JobError, model_name: str) -> None:
        """Count the end of a job."""

    def redelivered(self, model_name: str) -> None:
        """Count a message that a worker had before."""


class MetricsObserver(JobObserver):
    """Updates the Prometheus metrics."""

    def __init__(self, metrics: JobMetrics) -> None:
        self._metrics = metrics

    def received(self, delivery: Delivery) -> None:
        if delivery.headers.get("delivery_info", {}).get("redelivered"):
            self._metrics.redelivered(delivery.model)

    def ended(self, ending: Ending) -> None:
        if isinstance(ending.outcome, (Result, JobError)):
            self._metrics.ended(ending.outcome, ending.model)


class JobSpans(Protocol):
    """What `SpanObserver` needs of `observability.tracing.JobTraces`."""

    def arrived(
        self,
        job_id: str,
        request: Any,
        headers: Any,
        *,
        model: str,
        grouped: bool,
        ago_s: float,
        attempt: int,
    ) -> None:
        """A job arrived `ago_s` seconds ago."""

    def started(self, job_id: str) -> None:
        """It has a slot."""

    def computed(self, job_id: str) -> None:
        """It has an outcome."""

    def ended(self, job_id: str, outcome: Result | BaseException) -> str | None:
        """Its result is stored. Returns the id of its trace, if it is recorded."""

    def returned(self, job_ids: Iterable[str]) -> None:
        """Jobs were returned to the queue."""


class SpanObserver(JobObserver):
    """Makes the OpenTelemetry spans of each job, and gives the log the id of its trace."""

    def __init__(self, spans: JobSpans) -> None:
        self._spans = spans

    def arrived(self, arrival: Arrival) -> None:
        delivery = arrival.delivery
        self._spans.arrived(
            arrival.job_id,
            arrival.request,
            delivery.headers,
            model=delivery.model,
            grouped=delivery.grouped,
            ago_s=time.monotonic() - delivery.received_at,
            attempt=arrival.attempt,
        )

    def started(self, job_id: str) -> None:
        self._spans.started(job_id)

    def computed(self, job_id: str) -> None:
        self._spans.computed(job_id)

    def ended(self, ending: Ending) -> None:
        if trace_id := self._spans.ended(ending.job_id, ending.outcome):
            ending.details["trace_id"] = trace_id

    def returned(self, job_ids: Iterable[str]) -> None:
        self._spans.returned(job_ids)


def as_outcome(outcome: Result | BaseException) -> Result | BaseException:
    """Translate Celery's exceptions for a revoked task and a passed time limit into errors of the job."""
    if isinstance(outcome, TaskRevokedError):
        return JobCancelled(message="revoked")
    if isinstance(outcome, TimeLimitExceeded):
        return JobExpired(message="time limit")
    return outcome


def state_of(outcome: Result | BaseException) -> State:
    """The state in which a job ended with a result or an exception."""
    outcome = as_outcome(outcome)
    return outcome_state(outcome) if isinstance(outcome, (Result, JobError)) else "failed"

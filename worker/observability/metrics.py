"""Prometheus metrics of a worker. The names are vLLM's under another prefix, so its dashboards need only be renamed.

Counters and histograms are updated once for each job that ended. Everything else is read when Prometheus scrapes, so it
costs the engine nothing. A worker is one process, so prometheus_client's multiprocess mode is not used. Needs
prometheus_client, the extra `metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from headrace import __version__
from headrace.client.wire.errors import JobError
from headrace.client.wire.results import Result
from headrace.worker.observability.adapter_metrics import AdapterMetrics

if TYPE_CHECKING:
    from headrace.worker.engine.engine import Engine
    from headrace.worker.engine.registry import ModelRegistry
    from headrace.worker.engine.stats import EngineStats

PREFIX = "headrace_"

# Upper bounds of the buckets in seconds and in tokens: vLLM's (v1/metrics/loggers.py), and lower ones for small models.
_FIRST_TOKEN_S: tuple[float, ...] = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_TOKEN_S: tuple[float, ...] = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
)
_REQUEST_S: tuple[float, ...] = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960),
    *(1920, 7680),
)
_TOKENS: tuple[float, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)

#: Histograms, which observe each job that succeeded: buckets and help text.
HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    "time_to_first_token_seconds": (_FIRST_TOKEN_S, "From a job's arrival in the engine to its first token."),
    "time_per_output_token_seconds": (_TOKEN_S, "From one token of a sample to the next, on average over a job."),
    "e2e_request_latency_seconds": (_REQUEST_S, "From a job's arrival in the engine to its last token."),
    "request_queue_time_seconds": (_REQUEST_S, "From a job's arrival in the engine to its slot."),
    "request_prefill_time_seconds": (_REQUEST_S, "From a job's slot to its first token."),
    "request_decode_time_seconds": (_REQUEST_S, "From a job's first token to its last."),
    "request_prompt_tokens": (_TOKENS, "Tokens of a job's prompt."),
    "request_generation_tokens": (_TOKENS, "New tokens of a job, all its samples together."),
}

#: Gauges and counters that are read at each scrape: help texts.
GAUGES = {
    "model_loaded": "1 if the model is in memory, else 0: it was idle, and is loaded when a job for it arrives.",
    "num_requests_running": "Samples that have a slot.",
    "num_requests_waiting": "Samples that wait in this worker for a slot, or jobs that wait for the model to load.",
    "kv_cache_usage_perc": "Share of the KV cache's memory that running samples hold; 1 is all of it.",
    "slots": "Samples that can have a slot at the same time.",
    "leases": "Messages for the model that this worker holds; it renews their leases.",
    "last_step_age_seconds": "Seconds that the engine's current step has taken so far; 0 between steps.",
    "ready": "1 if the worker takes jobs, else 0; the same as /readyz.",
    "redis_up": "1 if Redis accepted the worker's last heartbeat, else 0.",
    "selftest_ok": "1 if the self-test found results independent of the batch composition, else 0.",
}
COUNTERS = {
    "prompt_tokens": "Prompt tokens computed; those reused from the prefix of another prompt are not counted.",
    "generation_tokens": "New tokens of all jobs, however they end.",
    "prefix_cache_queries": "Prompt tokens, for each sample.",
    "prefix_cache_hits": "Prompt tokens that were reused from another prompt, running or ended.",
    "spec_decode_num_draft_tokens": "Tokens proposed by speculative decoding.",
    "spec_decode_num_accepted_tokens": "Proposed tokens that were accepted.",
}


class HeldJobs(Protocol):
    """What metrics need of the worker's deliveries."""

    def held_jobs(self, model: str) -> int:
        """How many jobs for a model the worker holds."""

    def held_messages(self, model: str) -> int:
        """How many messages for a model are in the pool."""


class WaitingMessages(Protocol):
    """What metrics need of the messages that wait for their ETA, a countdown or a rate limit."""

    def waiting_for(self, model: str) -> int:
        """How many messages for a model wait."""


class WorkerHealth(Protocol):
    """What metrics need of the worker's health."""

    @property
    def redis_answers(self) -> bool:
        """Whether Redis accepted the last heartbeat."""

    def why_not_ready(self) -> str:
        """Why the worker takes no jobs; empty if it does."""


class QueueDepths(Protocol):
    """What metrics need of the heartbeat."""

    @property
    def name(self) -> str:
        """The name of the worker."""

    @property
    def queued(self) -> Mapping[str, Mapping[str, int]]:
        """Jobs that no worker holds, by model and priority."""


class Metrics:
    """The metrics of one worker, all with the label `model_name`. May be used from any thread."""

    def __init__(self, *model_names: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it would add a second series to each metric
        self._model_names = model_names
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._histograms = {name: self._histogram(name) for name in HISTOGRAMS}
        self._succeeded = self._counter(
            "request_success", "Jobs that succeeded; `length` if a sample reached max_tokens.", "finished_reason"
        )
        self._failed = self._counter(
            "request_failure", "Jobs that ended otherwise: `cancelled`, `expired`, or a failure's code.", "code"
        )
        self._exceeded = self._counter("attempts_exceeded", "Jobs that failed with `max_attempts`.")
        self._redelivered = self._counter(
            "redeliveries", "Messages that were delivered again after a worker had held them."
        )
        self._retried = self._counter(
            "result_write_retries",
            "Retries of storing results in Redis, of all models together under the first one's name.",
        )
        self._retried.labels(model_names[0])
        for name in model_names:  # start at 0, because a rate needs two values
            self._succeeded.labels(name, "stop")
            self._succeeded.labels(name, "length")
            self._exceeded.labels(name)
            self._redelivered.labels(name)
            for histogram in self._histograms.values():
                histogram.labels(name)

    def _histogram(self, name: str) -> Histogram:
        buckets, text = HISTOGRAMS[name]
        return Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", *labels], registry=self._registry)

    def watch(
        self,
        held: HeldJobs,
        waiting: WaitingMessages,
        models: ModelRegistry,
        health: WorkerHealth,
        queues: QueueDepths,
    ) -> None:
        """Add the metrics that are read from these at each scrape."""
        self._registry.register(_Live(self._model_names, held, waiting, models, health, queues))

    def ended(self, outcome: Result | JobError, model_name: str) -> None:
        """Count a job for the model that ended with this outcome."""
        if isinstance(outcome, JobError):
            self._failed.labels(model_name, outcome.code).inc()
            if outcome.code == "max_attempts":
                self._exceeded.labels(model_name).inc()
            return
        reasons = [choice.finish_reason for choice in outcome.choices]
        self._succeeded.labels(model_name, "length" if "length" in reasons else "stop").inc()
        for name, value in observed(outcome).items():
            self._histograms[name].labels(model_name).observe(value)

    def redelivered(self, model_name: str) -> None:
        """Count a message for the model that a worker had held before."""
        self._redelivered.labels(model_name).inc()

    def retried(self) -> None:
        """Count a retry of storing a result."""
        self._retried.labels(self._model_names[0]).inc()

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Return content type and text in the format that the header `Accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self._registry)


def observed(result: Result) -> dict[str, float]:
    """The values that the histograms observe for a job, by metric; times in seconds."""
    timings, usage = result.timings, result.usage
    each = usage.completion_tokens / len(result.choices)
    values = {
        "time_to_first_token_seconds": timings.waiting_s + timings.prefill_s,
        "e2e_request_latency_seconds": timings.waiting_s + timings.prefill_s + timings.decode_s,
        "request_queue_time_seconds": timings.waiting_s,
        "request_prefill_time_seconds": timings.prefill_s,
        "request_decode_time_seconds": timings.decode_s,
        "request_prompt_tokens": usage.prompt_tokens,
        "request_generation_tokens": usage.completion_tokens,
    }
    if each > 1:
        values["time_per_output_token_seconds"] = timings.decode_s / (each - 1)
    return values


class _Live:
    """A collector for metrics that are read at each scrape."""

    def __init__(
        self,
        model_names: tuple[str, ...],
        held: HeldJobs,
        waiting: WaitingMessages,
        models: ModelRegistry,
        health: WorkerHealth,
        queues: QueueDepths,
    ) -> None:
        self._model_names, self._held, self._models = model_names, held, models
        self._waiting, self._health, self._queues = waiting, health, queues
        self._adapters = AdapterMetrics()

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client at each scrape."""
        engines = self._models.loaded
        stats = {model: engine.stats() for model, engine in engines.items()}
        values = {model: self._values(model, engines.get(model), stats.get(model)) for model in self._model_names}
        for kind, texts in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, text in texts.items():
                family = kind(PREFIX + name, text, labels=["model_name"])
                for model in [model for model in values if name in values[model]]:
                    family.add_metric([model], values[model][name])
                yield family
        yield from self._adapters.collect(PREFIX, {model: each.adapters for model, each in stats.items()})
        queued = GaugeMetricFamily(
            f"{PREFIX}num_requests_queued",
            "Jobs in the queue that no worker holds. All workers of a model report the same number: take the maximum.",
            labels=["model_name", "priority"],
        )
        for model, counts in self._queues.queued.items():
            for priority, count in counts.items():
                queued.add_metric([model, priority], count)
        yield queued
        info = GaugeMetricFamily(
            f"{PREFIX}engine_info", "Always 1.", labels=["model_name", "worker", "version", "fingerprint"]
        )
        for model in self._model_names:
            fingerprint = engines[model].fingerprint if model in engines else ""
            info.add_metric([model, self._queues.name, __version__, fingerprint], 1)
        yield info

    def _values(self, model: str, engine: Engine | None, stats: EngineStats | None) -> dict[str, float]:
        """The values of a model, without those of its engine if it is not loaded."""
        of_process = {
            "leases": self._held.held_messages(model) + self._waiting.waiting_for(model),
            "ready": not self._health.why_not_ready(),
            "redis_up": self._health.redis_answers,
        }
        if engine is None or stats is None:
            waiting = self._held.held_jobs(model)
            return {**of_process, "model_loaded": 0, "num_requests_running": 0, "num_requests_waiting": waiting}
        return {
            **of_process,
            "model_loaded": 1,
            "num_requests_running": stats.running,
            "num_requests_waiting": stats.waiting,
            "kv_cache_usage_perc": stats.cache_usage,
            "slots": stats.slots,
            "last_step_age_seconds": stats.step_age_s,
            "selftest_ok": "batch-invariant" in engine.fingerprint.split("/"),
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": stats.tokens,
            "prefix_cache_queries": stats.prefix_queries,
            "prefix_cache_hits": stats.prefix_hits,
            "spec_decode_num_draft_tokens": stats.proposed,
            "spec_decode_num_accepted_tokens": stats.accepted,
        }

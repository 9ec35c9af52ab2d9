"""Metrics of LoRA adapters. The number of series is bounded: a directory may have thousands of adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

#: The most adapters of a model that have a label, and the label of all others together; no adapter has that name.
LABELLED, OTHERS = 50, "(others)"

GAUGES = {
    "adapters_loaded": "LoRA adapters in memory.",
    "adapter_bytes": "Memory of the LoRA adapters in memory.",
}
COUNTERS = {
    "adapter_requests": "Jobs that were accepted for a LoRA adapter.",
    "adapter_generation_tokens": "New tokens of jobs with a LoRA adapter, however they end.",
}


class CountedAdapter(Protocol):
    """What metrics need of `worker.engine.stats.AdapterStats`."""

    @property
    def name(self) -> str:
        """The name of the adapter."""

    @property
    def loaded(self) -> bool:
        """Whether it is in memory."""

    @property
    def nbytes(self) -> int:
        """Its memory."""

    @property
    def jobs(self) -> int:
        """Jobs that were accepted for it."""

    @property
    def tokens(self) -> int:
        """New tokens of these jobs."""


class AdapterMetrics:
    """Makes the metrics of each scrape. The first LABELLED adapters of a model that get a job have a label."""

    def __init__(self) -> None:
        self._labelled: dict[str, list[str]] = {}

    def collect(self, prefix: str, adapters: Mapping[str, Sequence[CountedAdapter]]) -> Iterator[Metric]:
        """The metrics, whose names begin with `prefix`, of the adapters of each model that is loaded."""
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(prefix + name, text, labels=["model_name"])
            for model, found in adapters.items():
                loaded = [each for each in found if each.loaded]
                gauge.add_metric([model], len(loaded) if name == "adapters_loaded" else sum(e.nbytes for e in loaded))
            yield gauge
        jobs, tokens = (
            CounterMetricFamily(prefix + name, text, labels=["model_name", "adapter"])
            for name, text in COUNTERS.items()
        )
        for model, found in adapters.items():
            for label, counted in self._by_label(model, found).items():
                jobs.add_metric([model, label], sum(each.jobs for each in counted))
                tokens.add_metric([model, label], sum(each.tokens for each in counted))
        yield from (jobs, tokens)

    def _by_label(self, model: str, adapters: Iterable[CountedAdapter]) -> dict[str, list[CountedAdapter]]:
        """The adapters that have had jobs, by their label."""
        labelled = self._labelled.setdefault(model, [])
        found: dict[str, list[CountedAdapter]] = {}
        for each in (each for each in adapters if each.jobs):
            if each.name not in labelled and len(labelled) < LABELLED:
                labelled.append(each.name)
            found.setdefault(each.name if each.name in labelled else OTHERS, []).append(each)
        return found

"""Metrics of LoRA adapters. The number of series is bounded: a directory may have thousands of adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from headrace.worker.engine.stats import AdapterStats

#: The most adapters of a model that have a label, and the label of all others together; no adapter has that name.
LABELLED, OTHERS = 50, "(others)"

GAUGES = {
    "adapters_loaded": "LoRA adapters in memory.",
    "adapter_bytes": "Memory of the LoRA adapters in memory.",
}
#: Metrics by adapter, and the fields of `AdapterStats` that they count.
RUNNING = ("adapter_requests_running", "Jobs of a LoRA adapter that wait or run in this worker.", "running")
COUNTERS = (
    ("adapter_requests", "Jobs of a LoRA adapter that succeeded.", "jobs"),
    ("adapter_generation_tokens", "New tokens of these jobs.", "tokens"),
)


class AdapterMetrics:
    """Makes the metrics of each scrape. The first LABELLED adapters of a model that get a job have a label."""

    def __init__(self) -> None:
        self._labelled: dict[str, list[str]] = {}

    def collect(self, prefix: str, adapters: Mapping[str, Sequence[AdapterStats]]) -> Iterator[Metric]:
        """The metrics, whose names begin with `prefix`, of the adapters of each model that is loaded."""
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(prefix + name, text, labels=["model_name"])
            for model, found in adapters.items():
                loaded = [each for each in found if each.loaded]
                gauge.add_metric([model], len(loaded) if name == "adapters_loaded" else sum(e.nbytes for e in loaded))
            yield gauge
        labelled = {model: self._by_label(model, found) for model, found in adapters.items()}
        for kind, metrics in ((GaugeMetricFamily, [RUNNING]), (CounterMetricFamily, COUNTERS)):
            for name, text, field in metrics:
                family = kind(prefix + name, text, labels=["model_name", "adapter"])
                for model, labels in labelled.items():
                    for label, counted in labels.items():
                        family.add_metric([model, label], sum(getattr(each, field) for each in counted))
                yield family

    def _by_label(self, model: str, adapters: Iterable[AdapterStats]) -> dict[str, list[AdapterStats]]:
        """The adapters that have or had jobs, by their label."""
        labelled = self._labelled.setdefault(model, [])
        found: dict[str, list[AdapterStats]] = {}
        for each in (each for each in adapters if each.jobs or each.running):
            if each.name not in labelled and len(labelled) < LABELLED:
                labelled.append(each.name)
            found.setdefault(each.name if each.name in labelled else OTHERS, []).append(each)
        return found

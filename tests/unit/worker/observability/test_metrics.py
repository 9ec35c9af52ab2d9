"""A worker's metrics for known jobs, read with prometheus_client's own parser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from headrace.client.wire.adapters import is_adapter_name
from headrace.client.wire.errors import JobCancelled, JobExpired, JobFailed
from headrace.client.wire.results import Choice, Result, Timings, Usage
from headrace.worker.engine.stats import AdapterStats
from headrace.worker.observability.adapter_metrics import LABELLED, OTHERS, AdapterMetrics
from headrace.worker.observability.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metrics
from headrace.worker.queue.held import HeldMessage, HeldMessages
from tests.unit.worker.engine.engine_helpers import ask, build, drive, models_of, tokens_of

Sample = tuple[str, tuple[tuple[str, str], ...]]

#: The suffixes of vLLM that are promised.
OF_VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total"),
    *("generation_tokens_total", "request_success_total", "time_to_first_token_seconds"),
    *("time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"),
}


def shown(metrics: Metrics) -> dict[Sample, float]:
    """Every sample by its name and its labels other than `model_name`."""
    return {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))): sample.value
        for family in parse(metrics.render()[1].decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return shown(metrics)["headrace_" + name, tuple(sorted(labels.items()))]


def result(*reasons: Any, tokens: int, waiting: float = 0.0, prefill: float = 0.0, decode: float = 0.0) -> Result:
    return Result(
        id="a",
        model="demo",
        choices=[Choice(index=i, text="", token_ids=[], finish_reason=reason) for i, reason in enumerate(reasons)],
        usage=Usage(prompt_tokens=3, completion_tokens=tokens, total_tokens=3 + tokens),
        seed=0,
        timings=Timings(waiting_s=waiting, prefill_s=prefill, decode_s=decode),
    )


def test_a_job_is_observed_once_in_every_histogram() -> None:
    metrics = Metrics("demo")
    metrics.ended(result("length", tokens=11, waiting=0.25, prefill=0.5, decode=2.0), "demo")
    expected = {
        "time_to_first_token_seconds": 0.75,
        "time_per_output_token_seconds": 0.2,
        "e2e_request_latency_seconds": 2.75,
        "request_queue_time_seconds": 0.25,
        "request_prefill_time_seconds": 0.5,
        "request_decode_time_seconds": 2.0,
        "request_prompt_tokens": 3.0,
        "request_generation_tokens": 11.0,
    }
    assert set(expected) == set(HISTOGRAMS)
    for name, seen in expected.items():
        assert value(metrics, name + "_sum") == pytest.approx(seen)
        assert value(metrics, name + "_count") == 1
    assert value(metrics, "time_per_output_token_seconds_bucket", le="0.15") == 0
    assert value(metrics, "time_per_output_token_seconds_bucket", le="0.2") == 1
    assert value(metrics, "request_generation_tokens_bucket", le="10.0") == 0
    assert value(metrics, "request_generation_tokens_bucket", le="20.0") == 1


def test_samples_share_the_time_and_a_single_token_has_no_next() -> None:
    metrics = Metrics("demo")
    metrics.ended(result("stop", "stop", tokens=10, decode=1.0), "demo")  # five each, so four steps
    assert value(metrics, "time_per_output_token_seconds_sum") == pytest.approx(0.25)
    metrics.ended(result("stop", tokens=1, prefill=1.0), "demo")
    metrics.ended(result("length", tokens=0, prefill=1.0), "demo")
    assert value(metrics, "time_per_output_token_seconds_count") == 1
    assert value(metrics, "time_to_first_token_seconds_count") == 3


def test_every_end_is_counted_under_its_reason() -> None:
    metrics = Metrics("demo")
    assert value(metrics, "request_success_total", finished_reason="stop") == 0
    for reasons in (["stop"], ["length"], ["stop", "length"]):
        metrics.ended(result(*reasons, tokens=2), "demo")
    for error in (JobCancelled(), JobExpired(), JobFailed("nan_logits"), JobFailed("nan_logits")):
        metrics.ended(error, "demo")
    assert value(metrics, "attempts_exceeded_total") == 0
    metrics.ended(JobFailed("max_attempts"), "demo")
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    assert value(metrics, "request_success_total", finished_reason="length") == 2
    failures = {"cancelled": 1, "expired": 1, "nan_logits": 2, "max_attempts": 1}
    assert {code: value(metrics, "request_failure_total", code=code) for code in failures} == failures
    assert value(metrics, "attempts_exceeded_total") == 1
    metrics.redelivered("demo")
    metrics.retried()
    assert value(metrics, "redeliveries_total") == value(metrics, "result_write_retries_total") == 1


@pytest.fixture
def watched() -> Iterator[tuple[Metrics, Any, Any]]:
    """Metrics over an engine that is stepped by hand; the other sources return what the test sets."""
    metrics, engine = Metrics("demo"), build(slots=2, budget_positions=1024, draft_tokens=7, fingerprint="a/b")
    held = SimpleNamespace(held_messages=lambda _: 3, held_jobs=lambda _: 3)
    health = SimpleNamespace(redis_answers=True, why_not_ready=lambda: "")
    queues = SimpleNamespace(name="host-1", queued={"demo": {"interactive": 4, "normal": 5, "bulk": 6}})
    waiting = HeldMessages()
    waiting.wait(HeldMessage("parked", model="demo", until=1e10))
    waiting.wait(HeldMessage("of another", model="chat"))
    metrics.watch(held, waiting, models_of(engine), health, queues)
    yield metrics, engine, health
    engine.stop()


def test_gauges_show_the_state_of_the_engine(watched: tuple[Metrics, Any, Any]) -> None:
    metrics, engine, health = watched
    assert value(metrics, "kv_cache_usage_perc") == 0
    futures = [engine.submit(ask(tokens_of(40, i), max_tokens=60, ignore_eos=True)) for i in range(3)]
    engine.step()
    assert value(metrics, "num_requests_running") == 2
    assert value(metrics, "num_requests_waiting") == 1
    assert value(metrics, "kv_cache_usage_perc") == pytest.approx(2 * 128 / 1024)
    assert value(metrics, "slots") == 2
    assert value(metrics, "prompt_tokens_total") == 80
    drive(engine, *futures)
    assert value(metrics, "num_requests_running") == value(metrics, "num_requests_waiting") == 0
    assert value(metrics, "prompt_tokens_total") == 120
    assert value(metrics, "generation_tokens_total") == 180
    drafted = value(metrics, "spec_decode_num_draft_tokens_total")
    assert drafted == engine.stats().proposed
    assert 0 <= value(metrics, "spec_decode_num_accepted_tokens_total") <= drafted
    assert value(metrics, "leases") == 3 + 1  # in the pool, and waiting for its ETA
    assert value(metrics, "num_requests_queued", priority="bulk") == 6
    assert value(metrics, "redis_up") == value(metrics, "ready") == 1
    health.redis_answers, health.why_not_ready = False, lambda: "a reason"
    assert value(metrics, "redis_up") == value(metrics, "ready") == 0


def test_engine_information_and_the_self_test_result_are_shown(watched: tuple[Metrics, Any, Any]) -> None:
    metrics, engine, _ = watched
    assert value(metrics, "selftest_ok") == 0
    engine.fingerprint = "headrace-0/float32/batch-invariant"
    assert value(metrics, "selftest_ok") == 1
    ((_, labels),) = [sample for sample in shown(metrics) if sample[0] == "headrace_engine_info"]
    assert dict(labels)["fingerprint"] == engine.fingerprint
    assert dict(labels)["worker"] == "host-1"


def test_all_metrics_have_help_texts_and_one_label(watched: tuple[Metrics, Any, Any]) -> None:
    metrics, _, _ = watched
    families = {family.name: family for family in parse(metrics.render()[1].decode())}
    ours = {name: family for name, family in families.items() if name.startswith("headrace_")}
    names = {f"headrace_{name.removesuffix('_total')}" for name in (*OF_VLLM, *GAUGES, *COUNTERS, *HISTOGRAMS)}
    assert names <= set(ours)
    for family in ours.values():
        assert family.documentation.endswith(".")
        assert all(sample.labels["model_name"] == "demo" for sample in family.samples)
    assert {"process_resident_memory", "process_cpu_seconds"} & {n.removesuffix("_bytes") for n in families}
    assert not [name for name in families if name.endswith("_created")]


def test_openmetrics_is_returned_if_requested(watched: tuple[Metrics, Any, Any]) -> None:
    metrics, _, _ = watched
    content_type, text = metrics.render("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert content_type.startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(text.decode())}
    assert {"headrace_num_requests_running", "headrace_prompt_tokens"} <= names


def test_the_guide_lists_every_metric(watched: tuple[Metrics, Any, Any]) -> None:
    guide = (Path(__file__).parents[4] / "docs" / "deployment.md").read_text()
    listed = set(re.findall(r"`headrace_(\w+)`", guide))
    for name in shown(watched[0]):
        if name[0].startswith("headrace_"):
            plain = re.sub(r"_(bucket|sum|count)$", "", name[0].removeprefix("headrace_"))
            assert plain in listed or name[0].removeprefix("headrace_") in listed, name[0]


def test_adapters_have_a_bounded_number_of_labels() -> None:
    """A directory may have thousands of adapters, and each label is a series that Prometheus keeps."""

    def adapter(name: str, jobs: int, *, loaded: bool = False) -> AdapterStats:
        return AdapterStats(name, loaded=loaded, nbytes=100 * loaded, running=int(loaded), jobs=jobs, tokens=10 * jobs)

    made = AdapterMetrics()

    def collected(*adapters: AdapterStats) -> dict[str, dict[str, float]]:
        families = list(made.collect("x_", {"demo": adapters}))
        return {
            sample.name: {s.labels.get("adapter", ""): s.value for s in family.samples}
            for family in families
            for sample in family.samples
        }

    idle = [adapter(f"idle-{i}", 0) for i in range(1_000)]
    first = collected(*idle, adapter("pirate", 2, loaded=True), adapter("poet", 1, loaded=True))
    assert first == {
        "x_adapters_loaded": {"": 2},
        "x_adapter_bytes": {"": 200},
        "x_adapter_requests_running": {"pirate": 1, "poet": 1},
        "x_adapter_requests_total": {"pirate": 2, "poet": 1},
        "x_adapter_generation_tokens_total": {"pirate": 20, "poet": 10},
    }
    busy = [adapter(f"a-{i}", 1) for i in range(LABELLED)]
    jobs = collected(*busy, adapter("pirate", 3), adapter("poet", 1))["x_adapter_requests_total"]
    assert len(jobs) == LABELLED + 1
    assert (jobs["pirate"], jobs["poet"], jobs[OTHERS]) == (3, 1, 2), "who has a label keeps it"
    assert sum(jobs.values()) == LABELLED + 4
    assert not is_adapter_name(OTHERS)

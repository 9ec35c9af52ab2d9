"""The Grafana dashboard, Prometheus' configuration, alerts and KEDA's query: everything they refer to exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse

from headrace.client.wire.errors import JobFailed
from headrace.worker.engine.stats import AdapterStats, EngineStats
from headrace.worker.observability.metrics import Metrics
from headrace.worker.queue.held import HeldMessages

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
#: Labels that Prometheus adds.
ADDED = {"instance", "job"}


def samples() -> dict[str, set[str]]:
    """Every sample that a worker shows, with its labels."""
    zeros: dict[str, Any] = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
    stats = EngineStats(**{**zeros, "adapters": [AdapterStats("pirate", loaded=True, jobs=1)]})
    engine = SimpleNamespace(stats=lambda: stats, fingerprint="f")
    held = SimpleNamespace(held_jobs=lambda _: 0, held_messages=lambda _: 0)
    health = SimpleNamespace(redis_answers=True, why_not_ready=lambda: "")
    queues = SimpleNamespace(name="w", queued={"demo": {"normal": 0}})
    metrics = Metrics("demo")
    models = SimpleNamespace(loaded={"demo": engine})
    metrics.watch(held, HeldMessages(), models, health, queues)  # type: ignore[arg-type]
    metrics.ended(JobFailed("nan_logits"), "demo")
    found: dict[str, set[str]] = {}
    for family in parse(metrics.render()[1].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def queries() -> dict[str, str]:
    """Every query in these files, by its place."""
    found = {f"{panel['title']} {t['refId']}": t["expr"] for panel in PANELS for t in panel["targets"]}
    for group in yaml.safe_load((DOCKER / "alerts.yaml").read_text())["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    scaled = yaml.safe_load((DOCKER / "kubernetes" / "keda.yaml").read_text())
    return found | {"KEDA": scaled["spec"]["triggers"][0]["metadata"]["query"]}


@pytest.mark.parametrize(("place", "query"), queries().items(), ids=list(queries()))
def test_a_query_names_metrics_and_labels_that_exist(place: str, query: str) -> None:
    there = samples()
    named = set(re.findall(r"\b(?:headrace|process)_\w+", query))
    assert named
    assert named <= there.keys(), sorted(named - there.keys())
    labels = set().union(*(there[name] for name in named)) | ADDED
    for group in re.findall(r"\b(?:by|without|on|group_left) ?\(([\w, ]*)\)", query):
        assert {label.strip() for label in group.split(",") if label.strip()} <= labels
    assert set(re.findall(r"(\w+)=\"", query)) <= labels
    assert query.count("(") == query.count(")")
    if "histogram_quantile" in query:
        assert re.search(r"sum by \(le\) \(rate\(headrace_\w+_bucket\{", query), place
    for name in re.findall(r"(?:rate|increase)\((\w+)", query):
        assert name.endswith(("_total", "_bucket")), f"{name} is no counter"


def test_the_dashboard_shows_every_metric_of_a_worker() -> None:
    asked = " ".join(query for place, query in queries().items() if place != "KEDA")
    plain = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples() if name.startswith("headrace_")}
    assert [name for name in sorted(plain) if name not in asked] == []


def test_the_dashboard_can_be_loaded() -> None:
    assert DASHBOARD["title"] == "headrace"
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(variables) == {"datasource", "model"}
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variables["model"]["definition"]).groups()  # type: ignore[union-attr]
    assert label in samples()[metric]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= {"model", "__rate_interval"}


def test_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_prometheus_reads_the_workers_of_compose() -> None:
    config = yaml.safe_load((DOCKER / "prometheus.yaml").read_text())
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    (job,) = config["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert found["port"] == int(services["worker"]["environment"]["HEADRACE_METRICS_PORT"])
    assert set(found["names"]) <= set(services)
    mounted = {Path(volume.split(":")[1]).name for volume in services["prometheus"]["volumes"]}
    assert {"prometheus.yaml", *config["rule_files"]} <= mounted


def test_the_runbook_says_what_to_do_about_each_alert() -> None:
    guide = (ROOT / "docs" / "deployment.md").read_text()
    for group in yaml.safe_load((DOCKER / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert f"`{rule['alert']}`" in guide
            assert rule["annotations"]["summary"]

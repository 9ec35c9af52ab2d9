"""`headrace status` and its exit codes, which health checks use, with workers that exist as records only."""

from __future__ import annotations

import json
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from structlog.testing import capture_logs

from headrace.client.wire import keys
from headrace.client.wire.adapters import MAX_ADAPTERS
from headrace.client.wire.model_description import ModelDescription
from headrace.client.wire.redis import connect
from headrace.worker.cli import main
from headrace.worker.engine.stats import AdapterStats
from headrace.worker.jobs.redis_store import RedisStore
from headrace.worker.jobs.worker_record import WorkerRecord

HERE = f"{socket.gethostname()}-7"
STALLED = {"stalled": 1, "step_age_s": 99.0}


@pytest.fixture
def url(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    own = redis_url.replace("db=0", "db=8")
    connect(own).flushdb()
    monkeypatch.setenv("HEADRACE_REDIS_URL", own)
    return own


@pytest.mark.parametrize(
    ("workers", "everywhere", "here"),
    [
        ({}, 3, 3),
        ({HERE: {}}, 0, 0),
        ({"elsewhere-7": {}}, 0, 3),
        ({HERE: STALLED}, 1, 1),
        ({HERE: {}, "elsewhere-7": STALLED}, 1, 0),
        ({HERE: STALLED, "elsewhere-7": {}}, 1, 1),
        ({HERE: {"model": "another"}}, 3, 3),
        ({HERE: {}, f"{HERE.rpartition('-')[0]}-8": STALLED}, 1, 1),
        ({f"{HERE.rpartition('-')[0]}-and-more-7": {}}, 0, 3),
    ],
    ids=["none", "one", "elsewhere", "stalled", "stalled elsewhere", "stalled here", "another model", "two", "host"],
)
def test_exit_codes_say_who_serves(
    url: str, workers: dict[str, dict[str, str | int | float]], everywhere: int, here: int
) -> None:
    store = RedisStore(connect(url), result_ttl_s=60, checkpoint_ttl_s=60)
    for name, record in workers.items():
        store.heartbeat(name, {"model": "demo", "slots": 4, "running": 0, "waiting": 0, "tokens_per_s": 0.0, **record})
    for flags, code in (([], everywhere), (["--here"], here)):
        shown = CliRunner().invoke(main, ["status", *flags])
        assert shown.exit_code == code, shown.output
        as_json = CliRunner().invoke(main, ["status", "--json", *flags])
        assert as_json.exit_code == code
        own = {name for name in workers if name.rpartition("-")[0] == HERE.rpartition("-")[0]}
        assert {worker["name"] for worker in json.loads(as_json.stdout)["workers"]} == (own if flags else set(workers))
        if code == 1:
            assert "restart the worker" in shown.output


def test_without_redis_it_is_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_REDIS_URL", "redis://localhost:1/0")
    shown = CliRunner().invoke(main, ["status", "--here"])
    assert shown.exit_code == 3


def test_a_worker_without_a_heartbeat_is_not_listed(url: str) -> None:
    connection: redis.Redis = connect(url)
    RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60).heartbeat(HERE, {"model": "demo"})
    connection.delete(keys.worker(HERE))  # as Redis does when its lifetime is over
    assert CliRunner().invoke(main, ["status", "--here"]).exit_code == 3


@pytest.mark.parametrize(
    "spoilt",
    [
        {"fingerprint": b"\xff"},
        {"tokens_per_s": "nan"},
        {"started_at": "inf"},
        {"rows": "[" * 100_000},
        {"rows": '[{"job": "\\ud83d"}]'},
        {"failures": "5"},
        {"slots": "many"},
        {"description": '{"parameters": "many"}'},
        {"description": "[1]"},
    ],
)
def test_a_workers_record_that_cannot_be_read_hides_no_other(url: str, spoilt: dict[str, str | bytes]) -> None:
    connection: redis.Redis = connect(url)
    for name in (HERE, "spoilt-1"):
        RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60).heartbeat(name, {"model": "demo"})
    connection.hset(keys.worker("spoilt-1"), mapping=dict(spoilt))
    shown = CliRunner().invoke(main, ["status", "--json"])
    assert [worker["name"] for worker in json.loads(shown.stdout)["workers"]] == [HERE], shown.output
    assert CliRunner().invoke(main, ["status"]).exit_code == 0


def test_a_key_that_another_program_has_given_another_type_hides_no_worker(url: str) -> None:
    connection: redis.Redis = connect(url)
    for name, model in ((HERE, "demo"), ("other-1", "other")):
        RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60).heartbeat(name, {"model": model})
    for key in (keys.queue_lists("other")[0], keys.dead(), keys.unacked()):
        connection.set(key, "not a list")
    shown = json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)
    assert {worker["name"] for worker in shown["workers"]} == {HERE, "other-1"}
    assert [queue["model"] for queue in shown["queues"]] == ["demo", "other"]
    assert shown["dead"] is None
    connection.delete(keys.workers())
    connection.set(keys.workers(), "not a set")
    assert json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)["workers"] == []


def test_what_was_understood_of_a_model_is_shown(url: str) -> None:
    store = RedisStore(connect(url), result_ttl_s=60, checkpoint_ttl_s=60)
    described = ModelDescription(
        family="gpt_neo", parameters=125_198_592, dtype="float32", max_context=1024, positions=2048,
        tokenizer="byte-level BPE", tokenizer_size=50259, added_tokens=2, has_chat_template=True,
        eos_token_ids=[50256, 7], eos_count=2, eos_source="config.json",
        defaults={"temperature": 0.7}, notes=["v_head.* was ignored", "\x1b[31mred"],
    )  # fmt: skip
    newer = {**described.model_dump(), "invented_later": 5}
    store.heartbeat(HERE, {"model": "demo", "description": json.dumps(newer)})
    store.heartbeat("older-1", {"model": "demo"})
    store.heartbeat("idle-1", {"model": "other", "description": ""})
    shown = CliRunner().invoke(main, ["status"]).output
    assert (
        "demo: gpt_neo, 125,198,592 parameters, float32, context 1,024 of 2,048; tokenizer: byte-level BPE with 50,259 "
        "tokens, 2 of them added, with a chat template; texts end at 50256, 7 (config.json); "
        "defaults: temperature 0.7\n  v_head.* was ignored\n"
    ) in shown
    assert "\x1b[31m" not in shown
    as_json = json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)["workers"]
    assert {w["name"]: w["description"] for w in as_json} == {
        HERE: described.model_dump(), "older-1": None, "idle-1": None
    }  # fmt: skip


def test_adapters_are_shown_with_what_workers_disagree_on(url: str) -> None:
    store = RedisStore(connect(url), result_ttl_s=60, checkpoint_ttl_s=60)
    pirate = {
        "name": "pirate",
        "loaded": True,
        "rank": 8,
        "nbytes": 12_345,
        "digest": "a" * 64,
        "running": 1,
        "jobs": 3,
        "tokens": 40,
    }
    other = {**pirate, "digest": "b" * 64, "rank": 16, "jobs": 1, "tokens": 2}
    store.heartbeat(HERE, {"model": "demo", "adapters": json.dumps([pirate, {"name": "poet"}])})
    store.heartbeat("elsewhere-7", {"model": "demo", "adapters": json.dumps([other])})
    store.heartbeat("older-1", {"model": "demo"})
    store.heartbeat("many-1", {"model": "many", "adapters": json.dumps([{"name": f"a{i:03}"} for i in range(60)])})
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(main, ["status"])
    assert shown.exit_code == 0
    rows = [line.split("│")[1:-1] for line in shown.output.splitlines() if line.startswith("│")]
    cells = {tuple(cell.strip() for cell in row) for row in rows}
    assert ("pirate", "demo", "2 of 2 workers", "16", "12,345", "2", "4", "42") in cells
    assert ("poet", "demo", "0 of 1 workers", "", "", "0", "0", "0") in cells
    assert ("and 10 more", "many", "", "", "", "", "", "") in cells
    assert (
        f"Workers of demo have different adapters: pirate with different files, {'a' * 12} on {HERE}; {'b' * 12} on "
        f"elsewhere-7; poet only on {HERE}"
    ) in shown.output
    assert "of many have different" not in shown.output
    as_json = json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)["workers"]
    assert {w["name"]: w["adapters"] for w in as_json}["older-1"] is None
    assert {w["name"]: w["adapters"] for w in as_json}[HERE][0] == pirate


def test_a_record_lists_the_adapters_in_memory_first_and_keeps_the_names_of_a_model_that_is_unloaded(url: str) -> None:
    many = [AdapterStats(f"a{i:04}") for i in range(MAX_ADAPTERS)]
    loaded = SimpleNamespace(
        stats=lambda: SimpleNamespace(
            tokens=0, running=0, waiting=0, proposed=0, accepted=0, step_age_s=0.0,
            adapters=[*many, AdapterStats("pirate", loaded=True, rank=8, jobs=2)],
        ),
        running_sequences=list,
        fingerprint="",
        description=ModelDescription(),
    )  # fmt: skip
    models: Any = SimpleNamespace(names=("demo",), loaded={})
    health: Any = SimpleNamespace(stalled_for_s=0.0)
    book: Any = SimpleNamespace(held_jobs=lambda _: 0)
    store = RedisStore(connect(url), result_ttl_s=60, checkpoint_ttl_s=60)
    record = WorkerRecord(store, models, book, health, slots=1, failures={"demo": []})

    def written() -> Any:
        record.write(time.monotonic(), stalled=False)
        return json.loads(CliRunner().invoke(main, ["status", "--json"]).stdout)["workers"][0]["adapters"]

    assert written() is None, "it is not known before the model was loaded"
    models.loaded = {"demo": loaded}
    first, *others = written()
    assert (first["name"], first["loaded"], first["rank"], first["jobs"]) == ("pirate", True, 8, 2)
    assert [each["name"] for each in others] == [each.name for each in many[:-1]]
    known = connect(url).zrange(keys.models(), 0, -1)
    assert len(known) == 1 + MAX_ADAPTERS  # type: ignore[arg-type]
    assert {"demo", "demo/pirate", "demo/a0000"} <= set(known)  # type: ignore[arg-type]
    models.loaded = {}
    assert written()[0] == {**first, "loaded": False, "rank": 0, "jobs": 0}


FINGERPRINT = "headrace-1/torch-2/AVX512/float32/threads-2/weights-{}/config-b1/vocabulary-{}/batch-invariant"


@pytest.mark.parametrize(
    ("fingerprints", "told"),
    [
        ([FINGERPRINT.format("a1", "c1")] * 2, ""),
        ([FINGERPRINT.format("a1", "c1"), FINGERPRINT.format("a1", "c1").replace("float32", "bfloat16")], ""),
        ([FINGERPRINT.format("a1", "c1"), ""], ""),  # a model that is not loaded
        (
            [FINGERPRINT.format("a1", "c1"), FINGERPRINT.format("a2", "c1")],
            f"weights-a1 by {HERE}; weights-a2 by {HERE}0",
        ),
        (
            [FINGERPRINT.format("a1", "c1"), FINGERPRINT.format("a2", "c2")],
            f"weights-a1/vocabulary-c1 by {HERE}; weights-a2/vocabulary-c2 by {HERE}0",
        ),
        (
            [FINGERPRINT.format("a1", "c1/ends-e1"), FINGERPRINT.format("a1", "c1/ends-e2")],
            f"ends-e1 by {HERE}; ends-e2 by {HERE}0",
        ),
        # A worker of an earlier version does not tell its ends.
        ([FINGERPRINT.format("a1", "c1/ends-e1"), FINGERPRINT.format("a1", "c1")], ""),
    ],
    ids=["the same", "another number type", "not loaded", "weights", "weights and vocabulary", "ends", "older"],
)
def test_two_models_under_one_name_are_told(url: str, fingerprints: list[str], told: str) -> None:
    """A job's answer would depend on which worker takes it, and both workers look healthy."""
    store = RedisStore(connect(url), result_ttl_s=60, checkpoint_ttl_s=60)
    for name, fingerprint in zip((HERE, f"{HERE}0"), fingerprints, strict=True):
        store.heartbeat(name, {"model": "demo", "fingerprint": fingerprint})
    store.heartbeat("other-1", {"model": "other", "fingerprint": FINGERPRINT.format("zz", "zz")})
    shown = CliRunner().invoke(main, ["status"])
    assert shown.exit_code == 0
    assert ("serve different models as demo: " + told in shown.output) if told else "different" not in shown.output
    loaded = SimpleNamespace(
        stats=lambda: SimpleNamespace(
            tokens=0, running=0, waiting=0, proposed=0, accepted=0, step_age_s=0.0, adapters=[]
        ),
        running_sequences=list,
        fingerprint=fingerprints[1],
        description=ModelDescription(),
    )
    models: Any = SimpleNamespace(names=("demo",), loaded={"demo": loaded})
    health: Any = SimpleNamespace(stalled_for_s=0.0)
    RedisStore(connect(url), result_ttl_s=60, checkpoint_ttl_s=60).deregister(f"{HERE}0")
    record = WorkerRecord(store, models, None, health, slots=1, failures={"demo": []})  # type: ignore[arg-type]
    record.name = f"{HERE}0"
    with capture_logs() as logs:
        for _ in range(3):
            record.write(time.monotonic(), stalled=False)
    differs = [entry for entry in logs if entry["event"] == "model.differs"]
    assert len(differs) == bool(told)
    if told:
        assert f"{differs[0]['others']}; {differs[0]['here']} by {HERE}0" == told

"""Jobs with adapters in the engine: each gets its own, waits only for its own, and fails alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from headrace.client.wire.errors import JobCancelled, JobExpired
from headrace.client.wire.results import Result
from headrace.config import Settings
from headrace.model.trusted_files import ModelError
from headrace.worker.engine.adapters import Adapters
from headrace.worker.engine.build import adapters_of, find_files, load_engine
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.loaded_adapter import Packed
from tests.adapter_files import write_adapter
from tests.unit.worker.engine.engine_helpers import ask, build, demo_model, failure, tokens_of


def adapters(folder: Path, **settings: Any) -> Adapters:
    """Those in a directory, for the bundled model."""
    return adapters_of(Settings(model="demo", adapters_dir=str(folder), **settings), "demo", demo_model())


def finish(engine: Engine, *futures: Future[Result]) -> None:
    """Run steps until the futures are done, also while adapters are loaded in other threads."""
    end = time.monotonic() + 30
    while not all(future.done() for future in futures):
        assert time.monotonic() < end, "not done"
        if not engine.step():
            time.sleep(0.002)


def ran(engine: Engine, *requests: Any) -> list[Result]:
    futures = [engine.submit(request) for request in requests]
    finish(engine, *futures)
    return [future.result(timeout=0) for future in futures]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two adapters."""
    place = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("tone", "formal")):
        write_adapter(place / name, seed)
    return place


# --- names, files, errors --------------------------------------------------------------------------------------------


def test_the_fingerprint_tells_adapters_apart(folder: Path) -> None:
    engine = build(adapters=adapters(folder), fingerprint="f")
    plain, tone, formal = ran(engine, ask(), ask(adapter="tone"), ask(adapter="formal"))
    digests = {each.name: each.digest for each in engine.stats().adapters}
    assert plain.fingerprint == "f"
    assert tone.fingerprint == f"f/adapter-{digests['tone'][:12]}"
    assert formal.fingerprint == f"f/adapter-{digests['formal'][:12]}"
    assert len(set(digests.values())) == 2
    assert [(each.name, each.loaded, each.rank, each.jobs, each.tokens) for each in engine.stats().adapters] == [
        ("formal", True, 4, 1, 8),
        ("tone", True, 4, 1, 8),
    ]


def test_an_unknown_adapter_is_refused_with_the_list(folder: Path) -> None:
    engine = build(adapters=adapters(folder))
    wrong, right = engine.submit(ask(adapter="missing")), engine.submit(ask(adapter="tone"))
    finish(engine, wrong, right)
    assert failure(wrong).code == "adapter_not_found"
    assert "formal, tone" in failure(wrong).message
    assert right.result(timeout=0).usage.completion_tokens == 8
    without = build()
    refused = without.submit(ask(adapter="tone"))
    finish(without, refused)
    assert failure(refused).code == "adapter_not_found"


def cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def of_another_base(folder: Path) -> None:
    write_adapter(folder, 1, model="demo", targets=("attn.c_attn",), target_modules=["attn.c_proj"])


def hostile(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "target_modules": "' + "(a+)+" * 9 + '$"}'
    )


def not_a_number(folder: Path) -> None:
    write_adapter(folder, 1, std=float("nan"))


@pytest.mark.parametrize("damage", [cut, of_another_base, hostile, not_a_number])
def test_a_broken_adapter_fails_its_jobs_alone(tmp_path: Path, folder: Path, damage: Callable[[Path], None]) -> None:
    for name in ("good", "bad"):
        write_adapter(tmp_path / name, 0)
    damage(tmp_path / "bad")
    engine = build(adapters=adapters(tmp_path), fingerprint="f")
    bad, *others = (engine.submit(request) for request in (ask(adapter="bad"), ask(adapter="good"), ask()))
    finish(engine, bad, *others)
    assert failure(bad).code == "adapter_failed"
    assert failure(bad).message.startswith("adapter 'bad' cannot be loaded: bad/adapter_")
    assert str(tmp_path) not in failure(bad).message
    assert [future.result(timeout=0).usage.completion_tokens for future in others] == [8, 8]
    write_adapter(tmp_path / "bad", 3)
    assert ran(engine, ask(adapter="bad"))[0].fingerprint.startswith("f/adapter-")


def test_a_worker_does_not_start_with_an_adapter_that_cannot_be_loaded(tmp_path: Path) -> None:
    cut(write_adapter(tmp_path / "bad", 0))
    settings = Settings(model="demo", device="cpu", dtype="float32", threads=1, adapters=f"x={tmp_path / 'bad'}")
    with pytest.raises(ModelError, match=r"^HEADRACE_ADAPTERS: adapter 'x' cannot be loaded: .*/bad\)$"):
        load_engine(settings)


def test_a_directory_of_adapters_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    settings = Settings(model="demo", device="cpu", dtype="float32", threads=1, adapters_dir=str(tmp_path / "missing"))
    for load in (load_engine, lambda each: find_files(each, "demo")):
        with pytest.raises(ModelError, match=r"^HEADRACE_ADAPTERS_DIR is '.*/missing'; there is no such directory$"):
            load(settings)


# --- waiting ---------------------------------------------------------------------------------------------------------


class Slow:
    """A loader that waits until it may continue."""

    def __init__(self, load: Callable[[Path], Packed]) -> None:
        self.load, self.go, self.began = load, threading.Event(), threading.Event()

    def __call__(self, folder: Path) -> Packed:
        self.began.set()
        if folder.name == "tone":
            self.go.wait(60)
        return self.load(folder)


@pytest.fixture
def slow(folder: Path) -> Iterator[Slow]:
    loader = Slow(adapters(folder)._load)
    yield loader
    loader.go.set()


def test_a_job_waits_for_its_own_adapter_only(folder: Path, slow: Slow) -> None:
    engine = build(adapters=Adapters(slow, folder=folder))
    held = [engine.submit(ask(adapter="tone")) for _ in range(3)]
    assert slow.began.wait(60)
    ran(engine, ask(), ask(adapter="formal"), ask(structured_outputs={"choice": ["yes", "no"]}))
    assert not any(future.done() for future in held)
    assert engine.stats().waiting == 3
    slow.go.set()
    finish(engine, *held)
    assert [future.result().usage.completion_tokens for future in held] == [8, 8, 8]


def test_a_job_is_cancelled_while_its_adapter_is_loaded(folder: Path, slow: Slow) -> None:
    engine = build(adapters=Adapters(slow, folder=folder))
    job = engine.submit(ask(adapter="tone"), job_id="x")
    assert slow.began.wait(60)
    engine.cancel("x")
    with pytest.raises(JobCancelled):
        job.result(timeout=0)
    slow.go.set()
    ran(engine, ask(adapter="tone"))
    assert engine.stats().waiting == 0


def test_a_job_expires_while_its_adapter_is_loaded(folder: Path, slow: Slow) -> None:
    with build(adapters=Adapters(slow, folder=folder)) as engine:
        job = engine.submit(ask(adapter="tone", expires_at=time.time() + 0.2))
        with pytest.raises(JobExpired):
            job.result(timeout=30)
        slow.go.set()


def test_an_adapter_that_breaks_while_its_model_is_unloaded_harms_nothing_else(tmp_path: Path) -> None:
    place = write_adapter(tmp_path / "x", 0)
    base = {"model": "demo", "device": "cpu", "dtype": "float32", "threads": 1, "adapters": f"x={place}"}
    settings = Settings(**base, idle_unload_s=60)
    find_files(settings, "demo")
    cut(place)
    with pytest.raises(ModelError, match=r"^HEADRACE_ADAPTERS: adapter 'x' cannot be loaded: .*safetensors"):
        find_files(settings, "demo")
    engine = load_engine(settings)
    wrong, right = engine.submit(ask(adapter="x")), engine.submit(ask())
    finish(engine, wrong, right)
    assert failure(wrong).code == "adapter_failed"
    assert right.result(timeout=0).usage.completion_tokens == 8


def test_jobs_on_more_adapters_than_memory_holds_run_one_after_another(tmp_path: Path) -> None:
    names = [f"a{i}" for i in range(6)]
    for seed, name in enumerate(names):
        write_adapter(tmp_path / name, seed, targets=("attn.c_attn",))
    found = adapters(tmp_path)
    size = found.get("a0").packed.nbytes
    engine = build(adapters=adapters(tmp_path, adapter_bytes=2 * size))
    with engine:
        jobs = [engine.submit(ask(tokens_of(20, seed=i), adapter=name)) for i, name in enumerate(names * 3)]
        digests = {job.result(timeout=60).fingerprint for job in jobs}
    assert len(digests) == len(names)
    loaded = [each for each in engine.stats().adapters if each.loaded]
    assert 1 <= len(loaded) <= 2
    assert [each.jobs for each in engine.stats().adapters] == [3] * 6

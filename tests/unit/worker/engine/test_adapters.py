"""The adapters of an engine: names, loading, memory, and files that are replaced. Packed adapters are plain objects."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from headrace.client.wire.errors import JobCancelled, JobFailed
from headrace.client.wire.results import Result, Timings, Usage
from headrace.model.trusted_files import ModelError
from headrace.worker.engine.adapters import Adapters
from headrace.worker.engine.stats import AdapterStats


@dataclass(frozen=True)
class Fake:
    """What stands for a packed adapter: its files say all of it."""

    digest: str
    rank: int
    nbytes: int


def write(folder: Path, digest: str, nbytes: int = 10) -> Path:
    """An adapter of this digest and size, which replaces the files that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("adapter_config.json", json.dumps({"digest": digest, "nbytes": nbytes})),
        ("adapter_model.safetensors", digest),
    ):
        (folder / f"{name}.new").write_text(text)
        (folder / f"{name}.new").replace(folder / name)
    return folder


def read(folder: Path) -> Fake:
    found = json.loads((folder / "adapter_config.json").read_text())
    if found["digest"] == "broken":
        raise ModelError(f"{folder / 'adapter_model.safetensors'}: tensor 'x' holds a NaN or an infinity")
    return Fake(found["digest"], 4, found["nbytes"])


def adapters(tmp_path: Path, *names: str, load: Callable[[Path], Fake] = read, **more: object) -> Adapters:
    """Adapters of a directory in which these are, each of ten bytes."""
    for name in names:
        write(tmp_path / name, f"digest-of-{name}")
    return Adapters(load, folder=tmp_path, **more)  # type: ignore[arg-type]


def loaded(found: Adapters) -> list[str]:
    return [each.name for each in found.stats() if each.loaded]


def job() -> Future[Result]:
    return Future()


def finish(future: Future[Result], tokens: int = 3) -> None:
    times = Timings(waiting_s=0, prefill_s=0, decode_s=0)
    result = Result(id="x", model="demo", choices=[], usage=Usage.of(1, tokens), seed=0, timings=times, fingerprint="")
    future.set_result(result)


def failure(found: Adapters, name: str) -> JobFailed:
    with pytest.raises(JobFailed) as caught:
        found.get(name)
    return caught.value


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_settings_and_of_the_directory(tmp_path: Path) -> None:
    found = adapters(tmp_path / "many", "b", "a", named={"z": write(tmp_path / "z", "digest-of-z")})
    (tmp_path / "many" / "no-adapter").mkdir()
    (tmp_path / "many" / "file").write_text("")
    write(tmp_path / "many" / ".hidden", "digest-of-hidden")
    assert found.names() == ["a", "b", "z"]
    assert Adapters().names() == Adapters(folder=tmp_path / "missing").names() == []


@pytest.mark.parametrize(
    "name", ["missing", "../many/a", "a/../a", "/etc", "..", ".", "", "a\0", "a/", ".hidden", "demo"]
)
def test_a_name_that_is_no_adapters_is_refused_with_the_list(tmp_path: Path, name: str) -> None:
    found = adapters(tmp_path / "many", "a", "b", "demo", ".hidden", reserved=["demo"])
    error = failure(found, name)
    assert error.code == "adapter_not_found"
    assert error.message == f"adapter: {name!r} is none of this worker's: a, b"


def test_without_adapters_the_error_names_the_settings() -> None:
    assert "HEADRACE_ADAPTERS" in failure(Adapters(), "a").message


# --- loading ---------------------------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_once(tmp_path: Path) -> None:
    loads: list[Path] = []

    def load(folder: Path) -> Fake:
        loads.append(folder)
        return read(folder)

    found = adapters(tmp_path, "a", "b", load=load)
    assert not found.knows("a")
    with ThreadPoolExecutor(8) as threads:
        packed = {each.packed for each in threads.map(found.get, ["a"] * 50)}
    assert (packed, loads) == ({Fake("digest-of-a", 4, 10)}, [tmp_path / "a"])
    assert (found.knows("a"), found.knows("b")) == (True, False)


def test_an_adapter_that_is_wrong_fails_alone_and_shows_no_directory(tmp_path: Path) -> None:
    found = adapters(tmp_path, "a")
    write(tmp_path / "wrong", "broken")
    found.get("a")
    error = failure(found, "wrong")
    assert error.code == "adapter_failed"
    assert error.message == (
        "adapter 'wrong' cannot be loaded: wrong/adapter_model.safetensors: tensor 'x' holds a NaN or an infinity"
    )
    assert found.get("a").packed.digest == "digest-of-a"
    write(tmp_path / "wrong", "right")
    assert found.get("wrong").packed.digest == "right"


def test_an_error_that_nobody_foresaw_fails_the_jobs_of_the_adapter(tmp_path: Path) -> None:
    def load(folder: Path) -> Fake:
        raise RuntimeError(f"no memory for {folder}")

    found, waiting, called = adapters(tmp_path, "a", load=load), job(), threading.Event()
    found.load_then("a", waiting, called.set)
    assert called.wait(30)
    assert failure(found, "a").message == "adapter 'a' cannot be loaded: RuntimeError"


def test_an_adapter_that_failed_is_not_read_for_every_job(tmp_path: Path) -> None:
    loads: list[Path] = []

    def load(folder: Path) -> Fake:
        loads.append(folder)
        return read(folder)

    found = adapters(tmp_path, load=load)
    write(tmp_path / "wrong", "broken")
    assert len({failure(found, "wrong").message for _ in range(20)}) == len(loads) == 1
    write(tmp_path / "wrong", "broken")
    failure(found, "wrong")
    assert len(loads) == 2


def test_files_that_are_written_while_they_are_read_are_read_again(tmp_path: Path) -> None:
    place = write(tmp_path / "a", "broken")

    def load(folder: Path) -> Fake:
        try:
            return read(folder)
        finally:
            write(place, "whole")

    assert adapters(tmp_path, load=load).get("a").packed.digest == "whole"


def test_a_wrong_adapter_of_the_settings_is_named_at_the_start(tmp_path: Path) -> None:
    named = {"good": write(tmp_path / "x", "x"), "wrong": write(tmp_path / "y", "broken")}
    with pytest.raises(ModelError, match=r"^HEADRACE_ADAPTERS: adapter 'wrong' cannot be loaded: .*NaN.*/y\)$"):
        Adapters(read, named=named).load_named()


def test_replaced_files_are_loaded_for_new_jobs_and_running_ones_keep_theirs(tmp_path: Path) -> None:
    found, running = adapters(tmp_path, "a", budget_bytes=20), job()
    old = found.get("a", running)
    write(tmp_path / "a", "new")
    assert not found.knows("a")
    new = found.get("a", job())
    assert (old.packed.digest, new.packed.digest) == ("digest-of-a", "new")
    assert old.jobs == {running}
    assert found.get("a") is new
    finish(running)
    assert not old.jobs
    assert [(each.digest, each.jobs) for each in found.stats()] == [("new", 1)]
    os.utime(tmp_path / "a" / "adapter_model.safetensors", ns=(1, 1))
    assert found.get("a") is not new, "only the time has changed"


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_adapter_that_no_job_holds_is_unloaded(tmp_path: Path) -> None:
    found, held = adapters(tmp_path, "a", "b", "c", "d", budget_bytes=30), job()
    found.get("a", held)
    for name in "bc":
        finish_with(found, name)
    finish_with(found, "b")
    found.get("d")
    assert loaded(found) == ["a", "b", "d"]
    finish(held)
    found.get("c")
    assert loaded(found) == ["b", "c", "d"]


def finish_with(found: Adapters, name: str) -> None:
    ended = job()
    found.get(name, ended)
    finish(ended)


def test_those_of_the_settings_stay(tmp_path: Path) -> None:
    named = {"z": write(tmp_path / "z", "z")}
    found = adapters(tmp_path / "many", "a", "b", named=named, budget_bytes=20)
    found.load_named()
    for name in "aba":
        found.get(name)
    assert loaded(found) == ["a", "z"]


def test_an_adapter_for_which_there_can_be_no_room_is_refused(tmp_path: Path) -> None:
    found = adapters(tmp_path / "many", named={"z": write(tmp_path / "z", "z", nbytes=15)}, budget_bytes=20)
    found.load_named()
    write(tmp_path / "many" / "large", "large", nbytes=6)
    error = failure(found, "large")
    assert error.code == "adapter_failed"
    assert "takes 6 bytes; the adapters of this model may take 20, of which those that stay loaded leave 5" in str(
        error
    )
    with pytest.raises(ModelError, match="HEADRACE_ADAPTER_BYTES"):
        Adapters(read, named={"z": tmp_path / "z"}, budget_bytes=14).load_named()


def test_a_job_waits_for_memory_and_no_later_one_overtakes_it(tmp_path: Path) -> None:
    found, first, second = adapters(tmp_path, "a", "b", budget_bytes=10), job(), job()
    found.get("a", first)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(found.get, "b", second)
        while found.knows("a"):  # until the other one waits
            threading.Event().wait(0.01)
        assert not waiting.done()
        finish(first)
        assert waiting.result(timeout=30).packed.digest == "digest-of-b"
    assert loaded(found) == ["b"]
    assert not found.knows("a")


def test_a_job_that_is_cancelled_while_it_waits_ends(tmp_path: Path) -> None:
    found, waiting = adapters(tmp_path, "a", "b", budget_bytes=10), job()
    found.get("a", job())
    waiting.cancel()
    with pytest.raises(JobCancelled):
        found.get("b", waiting)
    assert loaded(found) == ["a"]


def test_the_stats_count_what_has_run(tmp_path: Path) -> None:
    found, running, failed = adapters(tmp_path, "a", "b"), job(), job()
    finish_with(found, "a")
    found.get("a", running)
    found.get("a", running)
    found.get("a", failed)
    failed.set_exception(JobFailed("nan_logits", ""))
    a = AdapterStats("a", loaded=True, rank=4, nbytes=10, digest="digest-of-a", running=1, jobs=1, tokens=3)
    assert found.stats() == [a, AdapterStats("b")]

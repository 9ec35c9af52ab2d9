"""Several engines in one thread, and models that are loaded, unloaded, or cannot be loaded."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from headrace.config import Settings
from headrace.model.hub import DEMO
from headrace.worker.engine.build import default_budget, load_engine
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.errors import EngineStopped, ModelUnavailable
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.registry import ModelRegistry
from headrace.worker.engine.step_loop import StepLoop
from tests.patience import PATIENCE_S
from tests.unit.worker.engine.engine_helpers import ask, build, expected, substance, tokens_of
from tests.unit.worker.jobs.test_stall import until


class Player:
    """Runs a number of steps, and records its name for each."""

    def __init__(self, name: str, turns: int, said: list[str]) -> None:
        self.name, self.left, self.said = name, turns, said
        self.ended = threading.Event()

    def run_step(self) -> float:
        self.said.append(self.name)
        self.left -= 1
        if not self.left:
            self.ended.set()
        return 0.0


def test_engines_run_alternately_until_one_has_ended() -> None:
    said: list[str] = []

    class Gate(Player):
        """Blocks in its step until the others have been added."""

        inside, go_on = threading.Event(), threading.Event()

        def run_step(self) -> float:
            self.inside.set()
            self.go_on.wait(PATIENCE_S)
            return super().run_step()

    turns, gate, players = StepLoop(), Gate("gate", 1, []), [Player("a", 3, said), Player("b", 5, said)]
    turns.add(gate)
    assert gate.inside.wait(PATIENCE_S)
    for player in players:
        turns.add(player)
    gate.go_on.set()
    assert all(player.ended.wait(PATIENCE_S) for player in players)
    assert "".join(said) == "abababbb"


def test_a_sleeping_loop_is_woken_and_starts_a_new_thread_after_its_end() -> None:
    class Sleeper(Player):
        def run_step(self) -> float:
            super().run_step()
            return 3600.0

    turns = StepLoop()
    for _ in range(2):
        said: list[str] = []
        sleeper = Sleeper("s", 3, said)
        turns.add(sleeper)
        while not sleeper.ended.wait(0.01):
            turns.wake()
        assert said == ["s"] * 3


def test_engines_in_one_thread_give_the_bits_that_each_gives_alone() -> None:
    requests = [ask(tokens_of(20 + 3 * i, i), max_tokens=20 + i, seed=i, temperature=0.8 * (i % 2)) for i in range(6)]
    alone = expected(*requests)
    turns, engines = StepLoop(), [build(slots=4, draft_tokens=7), build(slots=2)]
    for engine in engines:
        engine.start(turns)
    futures = [[engine.submit(request) for request in requests] for engine in engines]
    for engine in engines:
        engine.stop(finish=True)
    for each in futures:
        assert [substance(future.result(timeout=0)) for future in each] == alone


def test_an_engine_that_fails_ends_no_other() -> None:
    class NoRoom(ModelRunner):
        def fit(self, capacity: dict[int, int]) -> None:
            raise RuntimeError("no room")

    fatal: list[BaseException] = []
    turns, dying, other = StepLoop(), build(runner=NoRoom, on_fatal=fatal.append), build()
    lost = dying.submit(ask())
    for engine in (dying, other):
        engine.start(turns)
    with pytest.raises(EngineStopped, match="no room"):
        lost.result(timeout=PATIENCE_S)
    assert other.submit(ask()).result(timeout=PATIENCE_S).text
    other.stop()
    dying.stop()
    assert len(fatal) == 1


@pytest.fixture
def folder_of_model(tmp_path: Path) -> Path:
    """A copy of the bundled model, which a test may change."""
    return shutil.copytree(DEMO, tmp_path / "model", copy_function=shutil.copyfile)


def loader(*names: str, **more: Any) -> tuple[ModelRegistry, list[str]]:
    loaded: list[str] = []

    def load(name: str) -> Engine:
        loaded.append(name)
        return build(slots=1)

    return ModelRegistry(names, load, **more), loaded


def test_all_are_loaded_at_the_start_unless_idle_ones_are_unloaded() -> None:
    models, loaded = loader("a", "b")
    models.start()
    assert loaded == ["a", "b"]
    models.stop()
    found: list[str] = []
    models, loaded = loader("a", "b", "c", idle_s=5, find=found.append)
    models.start()
    assert (loaded, found) == (["a"], ["a", "b", "c"])
    models.stop()


@pytest.mark.parametrize("idle_s", [0, 5])
def test_a_missing_model_is_reported_at_the_start(idle_s: float) -> None:
    settings = Settings(model="demo,other=/nowhere", device="cpu", threads=1, idle_unload_s=idle_s)
    models = ModelRegistry.from_settings(settings)
    with pytest.raises(ModelUnavailable, match="/nowhere") as caught:
        models.start()
    assert caught.value.name == "other"
    models.stop()


def test_only_idle_models_are_unloaded_and_a_request_loads_them_again() -> None:
    models, loaded = loader("a", "b", idle_s=0.05)
    for name in ("a", "b"):
        models.get(name)
    first = models.loaded["b"]
    until(lambda: models.unload_idle({"a"}) or "b" not in models.loaded)
    assert set(models.loaded) == {"a"}
    assert first.ended.is_set()
    there = threading.Event()
    models.load_in_background(["a", "b"], there.set)
    assert there.wait(PATIENCE_S)
    assert loaded == ["a", "b", "b"]
    assert models.get("b").submit(ask()).result(timeout=PATIENCE_S).text
    models.stop()


def test_a_model_whose_files_were_replaced_while_it_was_unloaded_is_told(
    folder_of_model: Path,
) -> None:
    settings = Settings(model=f"demo,other={folder_of_model}", device="cpu", threads=1, idle_unload_s=0.01)
    models = ModelRegistry.from_settings(settings)
    with capture_logs() as logs:
        before = models.get("other").fingerprint
        for said in ([], [{"before": before}]):
            until(lambda: models.unload_idle(set()) or "other" not in models.loaded)
            if said:
                weights = load_file(folder_of_model / "model.safetensors")
                weights["transformer.ln_f.bias"].add_(1e-3)
                save_file(
                    {name: tensor.clone() for name, tensor in weights.items()}, folder_of_model / "model.safetensors"
                )
            after = models.get("other").fingerprint
            changed = [each for each in logs if each["event"] == "model.changed"]
            assert [{"before": each["before"]} for each in changed] == said
            assert (after != before) == bool(said)
    models.stop()


def test_a_model_that_is_loaded_too_late_computes_nothing() -> None:
    models, loaded = loader("a")
    models.stop()
    with pytest.raises(EngineStopped):
        models.get("a")
    assert loaded == ["a"]
    assert not models.loaded


def test_without_the_setting_none_is_unloaded() -> None:
    models, _ = loader("a", "b")
    models.start()
    models.unload_idle(set())
    assert set(models.loaded) == {"a", "b"}
    models.stop()


def test_the_models_get_equal_shares_of_the_cache() -> None:
    one = load_engine(Settings(model="demo", device="cpu", threads=1, kv_cache_bytes=2**24))
    half = load_engine(Settings(model="demo,other=demo", device="cpu", threads=1, kv_cache_bytes=2**24), "other")
    assert (one.scheduler.slots.budget_bytes, half.scheduler.slots.budget_bytes) == (2**24, 2**23)
    assert (one.model_name, half.model_name) == ("demo", "other")
    assert one.fingerprint == half.fingerprint
    import torch

    assert default_budget(2**60, torch.device("cpu"), 4) <= default_budget(2**60, torch.device("cpu"), 1) / 2

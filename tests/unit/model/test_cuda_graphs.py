"""Recorded steps. A recording of torch's operators replaces one of CUDA's kernels: both fix everything that Python
decides, including sizes and addresses, and in both it is an error to read a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from headrace.model.attention import CachedAttention, DecodeGroup
from headrace.model.cuda_graphs import MAX_SHAPES, DecodeGraphs, decode_graphs
from headrace.model.decoder import Decoder
from headrace.model.hub import DEMO
from headrace.model.kv_cache import KVCache
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.model_runner import ModelRunner
from tests.unit.worker.engine.engine_helpers import ask, build, drive, tokens_of, torch_model

CPU = torch.device("cpu")
LENGTHS = (32, 64)


class Recordings:
    """A recorder that counts."""

    def __init__(self) -> None:
        self.made = self.replayed = 0

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.made += 1
        nothing = torch.zeros(0)  # it wants an argument
        recorded = make_fx(lambda _: function())(nothing)

        def replay() -> Tensor:
            self.replayed += 1
            out: Tensor = recorded(nothing)
            return out

        return replay


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use torch's operators only, as on CUDA."""
    monkeypatch.setattr(KVCache, "decode_kernel", lambda _: None)


#: The tolerance of a block's output and of its cached values, for our error against float64.
TOLERANCE = 1e-4


def filled(capacity: int = 6, dtype: torch.dtype = torch.float32) -> KVCache:
    """A cache in which every slot has data."""
    cache = KVCache(torch_model().config, lengths=LENGTHS, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(3)
    for arena in cache.arenas.values():
        arena.resize(capacity)
        for tensor in (*arena.k, *arena.v):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return cache


def exact_model() -> Decoder:
    """The same weights in float64."""
    stored = load_file(DEMO / "model.safetensors").items()
    weights = {name.removeprefix("transformer."): tensor.double() for name, tensor in stored}
    return Decoder(torch_model().config, weights)


def plainly(model: Decoder, cache: KVCache, tokens: Sequence[int], groups: Sequence[DecodeGroup]) -> Tensor:
    positions = [position for group in groups for position in group.positions]
    attend = CachedAttention.of(cache, groups=groups, chunks=[])
    return model.forward(torch.tensor(tokens), torch.tensor(positions), attend)


def group_of(length_class: int, positions: list[int], row: int = 0) -> DecodeGroup:
    slots = list(range(len(positions)))
    return DecodeGroup(length_class, slots, positions, [1] * len(slots), row)


@torch.inference_mode()
def test_a_replay_is_the_pass_and_writes_nothing_else() -> None:
    record = Recordings()
    recorded, plain = filled(), filled(dtype=torch.float64)
    graphs, arbiter = DecodeGraphs(torch_model(), recorded, record), exact_model()
    for step in range(5):
        tokens = [11 + step, 200 + step, 3000 + step, 40 + step]
        groups = [group_of(32, [9 + step, 0 + step, 3 + step]), group_of(64, [20 + step], row=3)]
        hidden = graphs.forward(tokens, groups)
        expected = plainly(arbiter, plain, tokens, groups)
        if hidden is None:
            assert step == 0
            plainly(torch_model(), recorded, tokens, groups)
        else:
            assert hidden.shape == expected.shape
            assert (hidden - expected).abs().max() <= TOLERANCE
    assert (record.made, record.replayed) == (1, 4)
    for length in LENGTHS:
        ours, theirs = recorded.arenas[length], plain.arenas[length]
        for mine, other in zip((*ours.k, *ours.v), (*theirs.k, *theirs.v), strict=True):
            assert (mine - other).abs().max() <= TOLERANCE


@torch.inference_mode()
def test_which_steps_are_recorded_and_replayed() -> None:
    record = Recordings()
    cache = filled()
    graphs = DecodeGraphs(torch_model(), cache, record)

    def seen(*positions: int, times: int = 2) -> int:
        for _ in range(times):
            graphs.forward([1] * len(positions), [group_of(32, list(positions))])
        return record.made

    assert seen(1, 2, 3, times=1) == 0, "the first of its shape"
    assert seen(4, 5, 6, 7, times=1) == 1, "three rows are four, and eight positions are as good"
    assert seen(1, 2, 8) == 2, "the second quarter of the positions"
    assert seen(1, 2, 3, 4, 5) == 3, "more rows; six at most, as many as there are slots"
    assert graphs.forward([1], [DecodeGroup(32, [1], [5], [1], 0)]) is None, "a hole in front of it"
    graphs.forget()
    assert seen(1, 2, 3, times=1) == 3
    assert seen(1, 2, 3, times=1) == 4
    assert DecodeGraphs(torch_model(), cache, None).forward([1], [group_of(32, [1])]) is None


@torch.inference_mode()
def test_the_number_of_recordings_is_limited() -> None:
    graphs = DecodeGraphs(torch_model(), filled(), Recordings())
    known = graphs._known
    known.update({((64, i, 16),): None for i in range(MAX_SHAPES)})  # type: ignore[misc]
    graphs.forward([1], [group_of(32, [1])])
    assert len(known) == MAX_SHAPES
    assert ((64, 0, 16),) not in known


def crowd(engine: Engine) -> list[list[int]]:
    """Tokens of jobs of several lengths that arrive while others run, so that arenas grow."""
    first = [engine.submit(ask(tokens_of(n, n), max_tokens=30, ignore_eos=True)) for n in (3, 9, 30)]
    for _ in range(10):
        engine.step()
    later = [engine.submit(ask(tokens_of(n, n), max_tokens=60, ignore_eos=True)) for n in range(60, 66)]
    return [result.choices[0].token_ids for result in drive(engine, *first, *later)]


def test_an_engine_that_replays_gives_the_same_texts() -> None:
    record = Recordings()

    class Recorded(ModelRunner):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            self.graphs = DecodeGraphs(self.model, self.cache, record)

    assert crowd(build(model=torch_model(), runner=Recorded)) == crowd(build(model=torch_model()))
    assert record.made >= 2
    assert record.replayed >= 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_give_the_texts_of_plain_steps() -> None:  # pragma: no cover - needs a GPU
    from headrace.model import load_model

    model = load_model("demo", device="cuda", dtype="float32")
    plain = build(model=model)
    plain.runner.graphs = DecodeGraphs(model, plain.runner.cache, None)  # type: ignore[attr-defined]
    replaying = build(model=model)
    assert crowd(replaying) == crowd(plain)
    assert decode_graphs(model, plain.runner.cache)._recorder is not None  # type: ignore[attr-defined]

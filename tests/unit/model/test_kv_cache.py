"""The key/value cache: the contents of its arenas, and attention over it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headrace.model.attention import CachedAttention, Chunk, DecodeGroup
from headrace.model.config import ModelConfig
from headrace.model.kernels.memory import zeros
from headrace.model.kv_cache import Arena, KVCache

CONFIG = ModelConfig(n_layer=2, n_head=3, n_embd=24, n_positions=64)
CPU = torch.device("cpu")


def arena(capacity: int) -> Arena:
    made = Arena(CONFIG, 64, torch.float32, CPU)
    made.resize(capacity)
    for i, tensor in enumerate((*made.k, *made.v)):
        tensor.copy_(torch.arange(capacity)[:, None, None, None] + 10.0 * i + 1)
    return made


def test_growing_and_shrinking_keeps_the_first_slots_and_zeroes_new_ones() -> None:
    grown = arena(3)
    before = [tensor.clone() for tensor in (*grown.k, *grown.v)]
    grown.resize(5)
    assert grown.capacity == 5
    assert all(torch.equal(new[:3], old) for new, old in zip((*grown.k, *grown.v), before, strict=True))
    assert all(not new[3:].any() for new in (*grown.k, *grown.v))
    grown.resize(2)
    assert [tuple(t.shape) for t in grown.k] == [(2, 3, 64, 8)] * 2
    assert all(torch.equal(new, old[:2]) for new, old in zip((*grown.k, *grown.v), before, strict=True))
    grown.resize(0)
    grown.resize(1)
    assert not any(tensor.any() for tensor in (*grown.k, *grown.v))


@pytest.mark.parametrize("target", [1, 2, 4])
@pytest.mark.parametrize("done", range(4))
def test_an_arena_whose_resize_runs_out_of_memory_has_the_capacity_of_all_layers(
    monkeypatch: pytest.MonkeyPatch, target: int, done: int
) -> None:
    """Shrinking needs memory too. The slots up to the capacity must exist, because compiled kernels use addresses."""
    cut = arena(3)
    before = [tensor.clone() for tensor in (*cut.k, *cut.v)]
    asked: list[int] = []

    def lacking(count: int, like: Tensor) -> Tensor:
        asked.append(count)
        if len(asked) > done:
            raise MemoryError
        return zeros(count, like)

    with monkeypatch.context() as patch:
        patch.setattr("headrace.model.kv_cache.zeros", lacking)
        with pytest.raises(MemoryError):
            cut.resize(target)
    assert cut.capacity == min(target, 3)
    assert all(len(tensor) >= cut.capacity for tensor in (*cut.k, *cut.v))
    cut.resize(5)
    kept = min(target, 3)
    for new, old in zip((*cut.k, *cut.v), before, strict=True):
        assert torch.equal(new[:kept], old[:kept])
        assert not new[kept:].any()


def test_layers_do_not_share_memory() -> None:
    grown = arena(2)
    assert len({tensor.data_ptr() for tensor in (*grown.k, *grown.v)}) == 4


def test_copy_takes_the_first_positions_of_every_layer() -> None:
    made = arena(3)
    made.copy(source=2, target=0, length=10)
    for tensor in (*made.k, *made.v):
        assert torch.equal(tensor[0, :, :10], tensor[2, :, :10])
        assert (tensor[0, :, 10:] == tensor[1, :, 10:] - 1).all(), "positions past the length have changed"


def test_clear_zeroes_one_slot_or_its_beginning() -> None:
    made = arena(3)
    made.clear(1)
    made.clear(2, 5)
    for tensor in (*made.k, *made.v):
        assert not tensor[1].any()
        assert not tensor[2, :, :5].any()
        assert tensor[0].all()
        assert tensor[2, :, 5:].all()


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention in float64 by the formula. [T, H, D] each."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) * scale
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def rounding(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """What float32 may be off by, in any order of summing (Higham 2002, section 3.1). [T, H, D] each -> [T, 1, 1].

    A score is a sum of D products; a softmax turns its error into twice that, as a share of each weight, and adds a few
    roundings; the weighted sum has T products.
    """
    length, unit = len(q), 2.0**-24
    scores = (q.double().abs().transpose(0, 1) @ k.double().abs().permute(1, 2, 0)).amax() * scale
    share = 2 * (q.shape[-1] + 2) * unit * scores + (length + 8) * unit
    return share * v.double().abs().amax() * torch.ones(length, 1, 1)


def assert_attends(found: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Causal attention of the last rows of q, within rounding."""
    exact, bound = (of(q, k, v, CONFIG.scale)[-len(found) :] for of in (plain, rounding))
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("chunks", [[50], [16, 34], [1] * 50, [30, 1, 19]])
def test_a_prompt_in_chunks_attends_like_the_whole(chunks: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(50, 3, 8, generator=generator) for _ in range(3))
    cache = KVCache(CONFIG, lengths=[64], dtype=torch.float32, device=CPU)
    cache.arenas[64].resize(3)
    out, start = [], 0
    for count in chunks:
        attend = CachedAttention.of(cache, groups=[], chunks=[Chunk(64, 2, start, count, 0)])
        rows = slice(start, start + count)
        out.append(attend(1, q[rows], k[rows], v[rows]))
        start += count
    assert_attends(torch.cat(out), q, k, v)
    assert torch.equal(cache.arenas[64].k[1][2, :, :50], k.transpose(0, 1))
    assert torch.equal(cache.arenas[64].v[1][2, :, :50], v.transpose(0, 1))
    assert not cache.arenas[64].k[1][2, :, 50:].any(), "written past the prompt"
    assert not cache.arenas[64].k[1][:2].any(), "written into another slot"
    assert not cache.arenas[64].k[0].any(), "written into another layer"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_two_chunks_of_one_prompt_in_one_step_attend_like_the_whole(threads: int) -> None:
    """The second chunk reads what the first one writes, whichever threads compute them."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(60, 3, 8, generator=generator) for _ in range(3))
    cache = KVCache(CONFIG, lengths=[64], dtype=torch.float32, device=CPU)
    cache.arenas[64].resize(3)
    for tensor in (*cache.arenas[64].k, *cache.arenas[64].v):
        tensor.fill_(float("nan"))
    chunks = [Chunk(64, 2, 0, 40, 0), Chunk(64, 2, 40, 20, 40)]
    attend = CachedAttention.of(cache, groups=[], chunks=chunks)
    assert_attends(attend(1, q, k, v), q, k, v)


@pytest.mark.parametrize("slots", [[0, 1, 2], [0, 2, 4], [3]])
@pytest.mark.parametrize("compiled", [True, False])
def test_decoding_rows_attend_over_their_own_slot_only(
    slots: list[int], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(KVCache, "decode_kernel", lambda _: None)
    generator = torch.Generator().manual_seed(1)
    lengths = [20, 1, 37][: len(slots)]
    q, k, v = ([torch.randn(n, 3, 8, generator=generator) for n in lengths] for _ in range(3))
    cache = KVCache(CONFIG, lengths=[64], dtype=torch.float32, device=CPU)
    cache.arenas[64].resize(5)
    for tensor in (*cache.arenas[64].k, *cache.arenas[64].v):
        tensor.fill_(99.0)  # data of earlier sequences
    last = [n - 1 for n in lengths]
    for slot, keys, values, n in zip(slots, k, v, last, strict=True):
        cache.arenas[64].k[0][slot, :, :n] = keys[:n].transpose(0, 1)
        cache.arenas[64].v[0][slot, :, :n] = values[:n].transpose(0, 1)
    attend = CachedAttention.of(cache, groups=[DecodeGroup(64, slots, last, [1] * len(slots), 2)], chunks=[])
    packed = [torch.cat([torch.zeros(2, 3, 8), *(x[-1:] for x in xs)]) for xs in (q, k, v)]
    out = attend(0, *packed)
    assert not out[:2].any(), "rows of no sequence are not zero"
    for i in range(len(slots)):
        assert_attends(out[2 + i][None], q[i], k[i], v[i])


def test_several_rows_of_one_slot_are_refused_where_there_is_no_compiled_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(KVCache, "decode_kernel", lambda _: None)
    cache = KVCache(CONFIG, lengths=[64], dtype=torch.float32, device=CPU)
    cache.arenas[64].resize(1)
    with pytest.raises(ValueError, match="compiled kernel"):
        CachedAttention.of(cache, groups=[DecodeGroup(64, [0], [5], [2], 0)], chunks=[])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeros_are_zero_aligned_and_of_the_type_and_shape_of_the_other(dtype: torch.dtype) -> None:
    for count, row in ((0, 3), (1, 1), (5, 7), (9, 300_000)):
        made = zeros(count, torch.ones(2, row, 2, dtype=dtype))
        assert (made.dtype, made.shape, made.any().item()) == (dtype, (count, row, 2), False)
        assert made.data_ptr() % 64 == 0
        assert made.is_contiguous()

"""The fused decoder computes what the blocks compute one by one, and is batch-invariant."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import headrace.model.attention
import headrace.model.linear
from headrace.model.activations import ActivationCapture
from headrace.model.attention import CachedAttention, Chunk, DecodeGroup
from headrace.model.config import ModelConfig
from headrace.model.decoder import Decoder
from headrace.model.fused_decoder import FusedDecoder
from headrace.model.kernels.onednn import TorchWeight
from headrace.model.kernels.row_range import RowRange
from headrace.model.kv_cache import KVCache
from headrace.model.linear import Linear
from headrace.model.weights import expected_shapes
from tests.instruction_sets import needs_amx, needs_amx_int8, needs_avx512

CPU = torch.device("cpu")
CONFIG = ModelConfig(n_layer=3, n_head=4, n_embd=64, n_positions=64, vocab_size=90)
#: What one rounding of a number is off by, as a share of a usual one. In int8 a row is rounded to 127ths of its largest
#: number, which is about three times a usual one, and its result to bfloat16.
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "int8": 2.0**-8 + 1.5 / 127}
DTYPES = [
    pytest.param("float32", marks=needs_avx512),
    pytest.param("bfloat16", marks=needs_amx),
    pytest.param("int8", marks=needs_amx_int8),
]


def allowed(dtype: str, config: ModelConfig) -> float:
    """The error of the last layer against float64, as a share of its standard deviation.

    A layer rounds what it stores eight times (two norms, four products, two sums), and sums products in float32: the
    error of a sum of n numbers in any order grows like the square root of n (Higham 2002, section 4.2).
    """
    longest = max(config.n_embd, config.inner)
    return config.n_layer * (8 * ROUNDING[dtype] + 4 * longest**0.5 * 2.0**-24)


def made(dtype: str, config: ModelConfig = CONFIG) -> Decoder:
    """A model with random weights, including the layer norms."""
    weights = weights_of(dtype, config)
    return Decoder(config, weights, int8=dtype == "int8")


def exact(dtype: str, config: ModelConfig = CONFIG) -> Decoder:
    """The same weights in float64, computed by torch block by block."""
    return Decoder(config, {name: tensor.double() for name, tensor in weights_of(dtype, config).items()})


def weights_of(dtype: str, config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in expected_shapes(config).items():
        tensor = torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 else shape[0] ** -0.5)
        weights[name] = tensor + (".ln_" in name or name.startswith("ln_f")) * name.endswith("weight")
    return weights if dtype == "float32" else {name: tensor.bfloat16() for name, tensor in weights.items()}


def by_blocks(gpt2: Decoder, x: Tensor, attend: CachedAttention) -> Tensor:
    for layer, block in enumerate(gpt2.blocks):
        x = block(layer, x, attend, [])
    return x


class Stage:
    """Three slots of one arena, filled with random keys and values, rounded to the type `stored`."""

    def __init__(self, gpt2: Decoder, stored: torch.dtype | None = None) -> None:
        self.gpt2 = gpt2
        self.cache = KVCache(gpt2.config, lengths=(32,), dtype=gpt2.dtype, device=CPU)
        self.cache.arenas[32].resize(3)
        generator = torch.Generator().manual_seed(2)
        for tensor in (*self.cache.arenas[32].k, *self.cache.arenas[32].v):
            tensor.copy_(torch.randn(tensor.shape, generator=generator).to(stored or gpt2.dtype))

    def attention(self, decodes: list[int], chunk: int = 0) -> CachedAttention:
        """Slots that decode at positions 9, 10, ..., and a chunk of slot 2."""
        count = len(decodes)
        groups = [DecodeGroup(32, decodes, [9 + i for i in decodes], [1] * count, 0)] if decodes else []
        chunks = [Chunk(32, 2, 0, chunk, count)] if chunk else []
        return CachedAttention.of(self.cache, groups=groups, chunks=chunks)


def rows(gpt2: Decoder, count: int) -> Tensor:
    return torch.randn(count, gpt2.config.n_embd, generator=torch.Generator().manual_seed(3)).to(gpt2.dtype)


def fused(gpt2: Decoder) -> FusedDecoder:
    found = FusedDecoder.of(gpt2.blocks)
    assert found is not None, "the CPU has the instructions, but no compiled GEMM"
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("inner", [None, 192])
def test_a_pass_computes_what_its_blocks_do(dtype: str, width: int, inner: int | None) -> None:
    config = dataclasses.replace(CONFIG, n_embd=width, n_inner=inner)
    gpt2, arbiter = made(dtype, config), exact(dtype, config)
    for decodes, chunk in (([0, 1], 0), ([], 20), ([0, 1], 20)):
        count = len(decodes) + chunk
        x = rows(gpt2, count)
        expected = by_blocks(arbiter, x.double(), Stage(arbiter, gpt2.dtype).attention(decodes, chunk))
        found = fused(gpt2)(x, Stage(gpt2).attention(decodes, chunk), []).double()
        assert expected.std() > 1
        assert (found - expected).abs().max() < allowed(dtype, config) * expected.std()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_decoding_row_has_the_same_bits_alone_beside_others_and_beside_a_prompt(dtype: str, threads: int) -> None:
    torch.set_num_threads(threads)
    gpt2 = made(dtype)
    run, x = fused(gpt2), rows(gpt2, 22)
    alone, stage = Stage(gpt2), Stage(gpt2)
    expected = run(x[:1].clone(), alone.attention([0]), [])
    assert torch.equal(run(x[:2].clone(), Stage(gpt2).attention([0, 1]), [])[:1], expected)
    assert torch.equal(run(x.clone(), stage.attention([0, 1], 20), [])[:1], expected)
    written, other = (tensors.cache.arenas[32].k[2][0, :, 9] for tensors in (alone, stage))
    assert torch.equal(written, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pass_with_captured_activations_has_the_same_bits(dtype: str) -> None:
    gpt2 = made(dtype)
    run, x = fused(gpt2), rows(gpt2, 2)
    expected = run(x.clone(), Stage(gpt2).attention([0, 1]), [])
    trace = ActivationCapture(gpt2.config.scale, 1).at(slice(0, 1))
    assert torch.equal(run(x.clone(), Stage(gpt2).attention([0, 1]), [trace]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_captured_activations_are_those_of_the_blocks(dtype: str) -> None:
    gpt2, ids = made(dtype), torch.tensor([[5, 17, 3, 88, 0, 41]])
    fused(gpt2)
    found, expected = gpt2.trace(ids), exact(dtype).trace(ids)
    assert found.keys() == expected.keys()
    for name in found.keys() - {"next_token"}:
        ours, theirs = found[name].double(), expected[name].double()
        if name == "probs":  # errors are those of logits, which the largest of them multiplies
            ours, theirs = ours.log(), theirs.log()
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= allowed(dtype, CONFIG) * theirs.std(), name


@needs_avx512
def test_norms_are_those_of_the_formula() -> None:
    """Rows far from zero, with small and large variance: a variance from sums of squares would lose all digits."""
    gpt2 = made("float32")
    x = (
        torch.randn(6, 64, generator=torch.Generator().manual_seed(4))
        * torch.tensor([1e-4, 1e-2, 1, 1e2, 1, 1])[:, None]
    )
    x = x + torch.tensor([0, 0, 0, 0, 300, -3000])[:, None]
    trace = ActivationCapture(1.0, 6).at(slice(0, 6))
    trace.record(embeddings=x)
    trace.record_hidden(0, x)
    fused(gpt2)(x.clone(), Stage(gpt2).attention([], 6), [trace])
    trace.commit()
    centred = x.double() - x.double().mean(1, keepdim=True)
    norm = gpt2.blocks[0].ln_1
    exact = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight.double() + norm.bias.double()
    off = (trace.finish()["ln_1"].double() - exact).abs().amax(1)
    assert (off < torch.tensor([1e-5, 1e-5, 1e-5, 1e-5, 1e-4, 1e-3])).all(), off


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(dtype: str) -> None:
    gpt2 = made(dtype)
    x = rows(gpt2, 2)
    expected = fused(gpt2)(x.clone(), Stage(gpt2).attention([0, 1]), [])
    x[1, 5] = float("nan")
    found = fused(gpt2)(x, Stage(gpt2).attention([0, 1]), [])
    assert torch.equal(found[0], expected[0])
    assert found[1].isnan().any()


def test_a_model_one_of_whose_blocks_torch_computes_has_no_fused_decoder() -> None:
    gpt2, ids = made("float32"), torch.tensor([[1, 2, 3]])
    kept = gpt2.blocks[1]
    torchs = Linear(TorchWeight(kept.c_fc.weight, kept.c_fc.bias, True), RowRange())
    gpt2.blocks[1] = dataclasses.replace(kept, c_fc=torchs)
    gpt2.fused_decoder = FusedDecoder.of(gpt2.blocks)
    assert gpt2.fused_decoder is None
    expected = exact("float32").logits(ids)
    assert (gpt2.logits(ids) - expected).abs().max() < allowed("float32", CONFIG) * expected.std()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_another_width_or_type_are_refused(dtype: str) -> None:
    gpt2 = made(dtype)
    run, product = fused(gpt2), gpt2.blocks[0].c_fc
    for wrong in (rows(gpt2, 2)[:, :32], rows(gpt2, 2).half(), rows(gpt2, 2)[0]):
        with pytest.raises(ValueError, match=r"rows are torch\..*; they must be torch\..* \[M, 64\]"):
            product(wrong)
        with pytest.raises(ValueError, match="rows are"):
            run(wrong.reshape(-1, wrong.shape[-1])[:, :40], Stage(gpt2).attention([0, 1]), [])
    with pytest.raises(ValueError, match="contiguous"):
        run(rows(gpt2, 4)[::2], Stage(gpt2).attention([0, 1]), [])


def test_without_compiled_gemms_there_is_no_fused_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = exact("float32").logits(torch.tensor([[1, 2, 3]]))
    monkeypatch.setattr(headrace.model.linear, "fp32_works", lambda *_: False)
    gpt2 = made("float32")
    assert FusedDecoder.of(gpt2.blocks) is None
    found = gpt2.logits(torch.tensor([[1, 2, 3]]))
    assert (found - expected).abs().max() < allowed("float32", CONFIG) * expected.std()

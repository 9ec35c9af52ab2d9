"""Rows with adapters: the logits of PEFT, and the same bits in any company, on every instruction set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from headrace.model import Decoder, load_model
from headrace.model.adapters.lora import Adapter, load_adapter
from headrace.model.adapters.packed import AdapterRows, PackedAdapter
from headrace.model.attention import PlainAttention
from headrace.model.config import ModelConfig
from headrace.model.kernels import isa
from headrace.model.trusted_files import ModelError
from tests.instruction_sets import needs_avx2
from tests.numerics.jobs import RANKS, seeded, seeded_adapter, seeded_weights
from tests.unit.model.adapters.test_lora import BASES, OPTIONS, make_adapter

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=72, n_positions=40, vocab_size=301, activation="gelu")
T = 7


def logits(model: Decoder, ids: Tensor, adapters: Sequence[PackedAdapter | None]) -> Tensor:
    """[B, T] -> float32 [B, T, V]; `adapters` are those of the sequences."""
    batch, length = ids.shape
    rows = [AdapterRows(each, i * length, length) for i, each in enumerate(adapters) if each is not None]
    attend = PlainAttention(model.config, batch, length, model.device)
    positions = torch.arange(length).repeat(batch)
    with torch.inference_mode():
        hidden = model.forward(ids.flatten(), positions, attend, (), rows)
        of_rows = [each for each in adapters for _ in range(length)]
        return model.head(hidden, of_rows).float().view(batch, length, -1)


@needs_avx2
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_logits_are_those_of_peft(name: str, tmp_path: Path) -> None:
    family, options = OPTIONS[name]
    folder, _ = make_adapter(tmp_path, family, **options)
    torch.manual_seed(7)
    base: Any = BASES[family]()
    base.save_pretrained(tmp_path / "base")
    reference: Any = peft.PeftModel.from_pretrained(base, str(folder)).double().eval()
    model = load_model(tmp_path / "base", device="cpu", dtype="float32", allow_shared=True)
    adapter = model.pack_adapter(load_adapter(folder, model.config, allow_shared=True))
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = reference(ids).logits
    found, plain = logits(model, ids, [adapter, adapter]), logits(model, ids, [None, None])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-5)
    assert (plain.double() - expected).abs().max() > 0.1, "the adapter changes nothing"


@pytest.fixture(params=[each.name for each in isa.available()])
def rung(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        isa.use(request.param)
        yield request.param
    finally:
        isa.use(isa.AUTO)


@functools.cache
def bits_of(dtype: str) -> dict[str, Tensor]:
    """The first result of a precision; those of other instruction sets are compared with it."""
    return {}


@needs_avx2
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_row_has_the_same_bits_alone_and_among_rows_of_others(rung: str, dtype: str) -> None:
    given = seeded(CONFIG)("int8" if dtype == "int8" else "float32")
    model = given if dtype != "bfloat16" else in_bfloat16()
    adapters = [model.pack_adapter(seeded_adapter(CONFIG, rank)) for rank in RANKS]
    order = [None, adapters[0], adapters[1], None, adapters[2], adapters[2], adapters[0], None]
    ids = torch.randint(0, 301, (len(order), T), generator=torch.Generator().manual_seed(5))
    together = logits(model, ids, order)
    for i, adapter in enumerate(order):
        assert torch.equal(together[i], logits(model, ids[i : i + 1], [adapter])[0]), f"sequence {i}"
        plain = model.logits(ids[i : i + 1])[0]
        assert torch.equal(together[i], plain) == (adapter is None)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert torch.equal(logits(model, ids, order), together)
    finally:
        torch.set_num_threads(threads)
    if dtype != "bfloat16":
        assert torch.equal(bits_of(dtype).setdefault("first", together), together), "another instruction set"


def in_bfloat16() -> Decoder:
    """A model whose activation function every backend in bfloat16 has."""
    config = dataclasses.replace(CONFIG, activation="gelu_tanh")
    return Decoder(config, {name: tensor.bfloat16() for name, tensor in seeded_weights(config).items()})


@needs_avx2
def test_captured_activations_are_those_of_the_adapter() -> None:
    model = seeded(CONFIG)("float32")
    adapter = seeded_adapter(CONFIG, 16)
    folded = Decoder(CONFIG, folded_weights(adapter))
    ids = torch.randint(0, 301, (1, T), generator=torch.Generator().manual_seed(6))
    found = model.trace(ids, model.pack_adapter(adapter))
    for name, expected in folded.trace(ids).items():
        torch.testing.assert_close(found[name].double(), expected.double(), rtol=1e-4, atol=1e-4, msg=name)


def folded_weights(adapter: Adapter) -> dict[str, Tensor]:
    """The weights of the model with the adapter added to them, in float64."""
    weights = {name: tensor.double() for name, tensor in seeded_weights(CONFIG).items()}
    for name in adapter.matrices:
        weights[name] = weights[name] + adapter.delta(name, (weights[name].shape[0], weights[name].shape[1]))
    return weights | {name: bias.double() for name, bias in adapter.biases.items()}


def test_a_model_that_torch_computes_refuses_adapters() -> None:
    model = Decoder(CONFIG, folded_weights(Adapter({}, {}, "", 0)))
    with pytest.raises(ModelError, match=r"adapters are not computed for this model in torch\.float64"):
        model.pack_adapter(seeded_adapter(CONFIG, 1))

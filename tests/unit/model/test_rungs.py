"""Compiled GEMMs with layer norm and epilogue: the same bits on every instruction set, and on every machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from headrace.model.config import ACTIVATIONS
from headrace.model.kernels.epilogue import ACTIVATION_CODES
from headrace.model.kernels.epilogue_rows import finish_rows
from headrace.model.kernels.gemm_fp32 import Fp32Weight, micro_kernel
from headrace.model.kernels.isa import AMX, LADDER, Isa, find
from headrace.model.kernels.layer_norm import layer_norm_row
from headrace.model.kernels.low_rank import multiply_rows, row_in_floats
from headrace.model.kernels.ops import ARG, Op
from headrace.model.kernels.program import Program
from headrace.model.kernels.target import compile_module, target_machine
from headrace.model.kernels.vector_function import VectorFunction, vector_module
from tests.guarded_memory import guarded
from tests.instruction_sets import needs_avx2, needs_avx512
from tests.unit.model.gemm_checks import EXACT

#: SHA-256 of the results of `digest`; made by an AMD EPYC (Zen 4).
DIGEST = "a074872b9086dac725d786eddd64580130ebbd1eb3c29db73e2ea3629a0a9ec7"
RUNGS = [pytest.param("avx512", marks=needs_avx512), pytest.param("avx2", marks=needs_avx2)]
COMPILED = [isa for isa in LADDER if isa.mr]


def numbers(*shape: int, seed: int = 1) -> Tensor:
    """Numbers from -1 to 1 that are the same on every machine: integers, scrambled by multiplication."""
    scrambled = (np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed * 7919)) * 2654435761 % 2**32
    whole = ((scrambled ^ scrambled >> 15) * 2246822519 % 2**32).astype(np.int64) - 2**31
    return torch.from_numpy((whole / 2**31).astype(np.float32)).view(*shape)


@dataclasses.dataclass
class Layer:
    """The tensors of an op: layer norm, GEMM, bias, and GELU or a residual."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    norm: tuple[Tensor, Tensor] | None = None
    residual: Tensor | None = None
    activation: str | None = None

    def run(self, isa: Isa, rows: int | None = None) -> Tensor:
        """The result for the first rows."""
        x, product = self.x[:rows], Fp32Weight.of(self.weight, self.bias, self.activation, isa)
        out = torch.empty(len(x), self.weight.shape[1])
        op = self.op(product, x, out)
        Program(product.backend, len(x), x.shape[1]).run(np.array([op], dtype=np.int64))
        return out

    def op(self, product: Fp32Weight, x: Tensor, out: Tensor, normed: Tensor | None = None) -> Op:
        norm = self.norm or (None, None)
        return product.op._replace(
            source=x.data_ptr(),
            source_row_bytes=x.stride(0) * 4,
            norm_weight=_address(norm[0]),
            norm_bias=_address(norm[1]),
            epsilon_bits=int(np.float64(1e-5).view(np.int64)),
            normed_out=_address(normed),
            residual=_address(self.residual),
            out=out.data_ptr(),
            out_row_bytes=out.stride(0) * 4,
        )

    def exact(self) -> Tensor:
        """The result in float64."""
        x = self.x.double()
        if self.norm:
            x = F.layer_norm(x, x.shape[1:], self.norm[0].double(), self.norm[1].double(), 1e-5)
        x = x @ self.weight.double() + self.bias.double()
        if self.activation:
            return EXACT[self.activation][0](x)
        return x if self.residual is None else x + self.residual.double()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def layer(rows: int, width: int, out: int, kind: str) -> Layer:
    norm = (1 + numbers(width, seed=4) / 4, numbers(width, seed=5)) if "norm" in kind else None
    residual = numbers(rows, out, seed=6) if "residual" in kind else None
    x, weight, bias = 3 * numbers(rows, width), numbers(width, out, seed=2), numbers(out, seed=3)
    activation = next((name for name in ACTIVATIONS if name in kind.split()), None)
    return Layer(x, weight, bias, norm, residual, activation)


KINDS = ("plain", "norm", "gelu_tanh", "residual", "norm gelu_tanh", "norm residual")


@pytest.mark.parametrize("width", [1, 12, 33, 96, 100, 768, 1600])
@pytest.mark.parametrize("kind", [*KINDS, *ACTIVATIONS[1:]])
@needs_avx512
def test_every_instruction_set_gives_the_same_bits(width: int, kind: str) -> None:
    tensors = layer(130, width, 150, kind)
    expected = tensors.run(find("avx512"))
    assert torch.equal(tensors.run(find("avx2")), expected)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 64, 125, 126, 127, 128, 129):
        assert torch.equal(tensors.run(find("avx2"), rows), expected[:rows]), rows
    sums = dataclasses.replace(tensors, activation=None).exact()  # their errors are passed on
    error, size = (expected.double() - tensors.exact()).abs(), sums.abs().amax().clamp_min(1)
    assert error.max() < 2.0**-24 * (8 + width**0.5) * size


def digest(isa: Isa) -> str:
    parts = []
    for (width, out), kind in itertools.product([(96, 96), (100, 1), (1600, 100), (768, 770)], KINDS):
        parts.append(layer(11, width, out, kind).run(isa).numpy().tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("name", RUNGS)
def test_the_bits_are_those_of_another_machine(name: str) -> None:
    assert digest(find(name)) == DIGEST


@pytest.mark.parametrize("name", RUNGS)
def test_denormal_numbers_are_kept(name: str) -> None:
    x = torch.zeros(9, 20)
    x[:, 3] = torch.tensor([1e-40, -1e-40, 1.4e-45, 3e-39, -7e-42, 0, -0.0, 1e-38, 2e-38])
    weight, nothing = torch.zeros(20, 50), torch.zeros(50)
    weight[3] = 1
    assert torch.equal(Layer(x, weight, nothing).run(find(name)), x[:, 3:4].expand(9, 50))
    tiny = Layer(torch.zeros(9, 20), weight, nothing, residual=x[:, 3:4].expand(9, 50).contiguous())
    assert torch.equal(tiny.run(find(name)), tiny.residual)
    halves = Layer(x, weight / 2, nothing, activation="gelu_tanh").run(find(name))
    assert torch.equal(halves[:, 0], torch.tensor([each / 4 for each in x[:, 3].tolist()]))  # GELU(x) is x / 2


@pytest.mark.parametrize("name", RUNGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_row(name: str, bad: float) -> None:
    for kind in KINDS:
        tensors = layer(9, 100, 50, kind)
        clean = tensors.run(find(name))
        tensors.x[4, 99] = bad
        found = tensors.run(find(name))
        assert not found[4].isfinite().all()
        assert torch.equal(found[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("name", RUNGS)
@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 9, 130])
def test_no_memory_outside_of_the_buffers_is_touched(name: str, at_start: bool, rows: int) -> None:
    guard = functools.partial(guarded, at_start=at_start)
    for width, out, kind in ((100, 50, "norm gelu_tanh"), (96, 48, "residual"), (3, 1, "norm residual")):
        tensors = layer(rows, width, out, kind)
        expected = tensors.run(find(name))
        x, result, normed = guard(tensors.x), guard(torch.empty(rows, out)), guard(torch.empty(rows, width))
        if tensors.norm:
            tensors.norm = guard(tensors.norm[0]), guard(tensors.norm[1])
        if tensors.residual is not None:
            tensors.residual = guard(tensors.residual)
        made = Fp32Weight.of(tensors.weight, tensors.bias, tensors.activation, find(name))
        product = dataclasses.replace(made, packed=guard(made.packed), biases=guard(made.biases))
        program = Program(product.backend, rows, width)
        inner = guard(program._packed_rows), guard(program._scratch)
        program._arguments[[ARG.packed_rows, ARG.scratch]] = [each.data_ptr() for each in inner]
        program.run(np.array([tensors.op(product, x, result, normed)], dtype=np.int64))
        assert torch.equal(result, expected)


def functions(isa: Isa) -> list[VectorFunction]:
    """All functions of the float32 backend."""
    kernels = [micro_kernel(rows, isa.mr, isa.nr, lines) for rows in (1, 2, 4, isa.mr) for lines in {1, isa.nr // 16}]
    rows = [
        finish_rows(isa.nr, bf16=bf16, int8=int8, residual=residual, activation=activation)
        for bf16, int8 in ((False, False), (True, False), (True, True))
        for residual, activation in ((True, ""), *((False, name) for name in ACTIVATION_CODES))
    ]
    low_rank = [multiply_rows(isa.mr, nr, bf16=bf16) for nr in (16, isa.nr) for bf16 in (False, True)]
    norms = [make(bf16=bf16) for make in (layer_norm_row, row_in_floats) for bf16 in (False, True)]
    return [*kernels, *rows, *dict.fromkeys(low_rank), *norms]


@functools.cache
def machine_code(isa: Isa) -> tuple[str, Any]:
    """Assembly and object code of all functions for an instruction set, also one that this machine lacks."""
    machine = target_machine(isa, jit=False)
    module = compile_module(vector_module(functions(isa)), machine)
    return machine.emit_assembly(module), machine.emit_object(module)


@pytest.mark.parametrize("isa", COMPILED, ids=lambda isa: isa.name)
def test_the_same_description_compiles_for_every_instruction_set(isa: Isa) -> None:
    text, code = machine_code(isa)
    assert code[:4] == b"\x7fELF"
    assert int.from_bytes(code[18:20], "little") == {"x86_64": 62, "aarch64": 183}[isa.architecture]
    calls = [line for line in text.splitlines() if line.split()[:1] in (["callq"], ["call"], ["bl"], ["jmp"])]
    assert not [line for line in calls if "LBB" not in line], "functions of libm"


@pytest.mark.parametrize("isa", [isa for isa in COMPILED if isa is not AMX], ids=lambda isa: isa.name)
def test_sums_are_kept_in_registers(isa: Isa) -> None:
    machine = target_machine(isa, jit=False)
    kernel = micro_kernel(isa.mr, isa.mr, isa.nr, 1)
    text = machine.emit_assembly(compile_module(vector_module([kernel]), machine))
    loop = text.split("BB0_1:")[1].split("BB0_1")[0]  # up to the branch to its beginning
    assert ("[sp" if isa.architecture == "aarch64" else "(%rsp") not in loop
    assert ("zmm" in loop) == ("avx512" in isa.name)


@pytest.mark.parametrize("threads", [1, 2])
def test_denormal_numbers_are_kept_whatever_a_thread_was_set_to(threads: int) -> None:
    """A library that was built with -ffast-math makes the thread that loads it flush them."""
    product, tiny = Fp32Weight.of(1e30 * torch.eye(64), None), 1e-40 * torch.arange(1.0, 65)
    torch.set_num_threads(threads)
    expected = product(tiny[None])
    assert torch.allclose(expected, 1e-10 * torch.arange(1.0, 65), rtol=1e-4)  # 1e-40 has few bits
    torch.set_flush_denormal(True)
    try:
        assert float(tiny[0] * 1) == 0
        found = product(tiny[None])
        assert float(tiny[0] * 1) == 0, "the kernel left the thread as it was"
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)
    assert torch.equal(found, expected)

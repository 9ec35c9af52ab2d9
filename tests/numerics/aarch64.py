"""`python -m tests.numerics.aarch64`: run the functions of the kernels on an emulated ARM CPU, and compare their bits.

Nothing of this project has run on an ARM machine. This compiles every vector function for 64-bit ARM, links the object
with a small C program, runs it under qemu's user emulation, and compares all memory with that of the same calls on this
CPU. It needs Debian's packages qemu-user-static and gcc-aarch64-linux-gnu. The loops around the functions, which numba
compiles, are not part of it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.model.kernels import attention_rows, gemm_fp32, gemm_int8
from headrace.model.kernels.attention_rows import Head
from headrace.model.kernels.epilogue import ACTIVATION_CODES
from headrace.model.kernels.epilogue_rows import finish_rows
from headrace.model.kernels.isa import LADDER, Isa, find
from headrace.model.kernels.layer_norm import layer_norm_row
from headrace.model.kernels.target import compile_module, target_machine
from headrace.model.kernels.vector_function import VectorFunction, vector_module

NEON = next(isa for isa in LADDER if isa.name == "neon")
#: Bytes of the memory that a call may use, and where each of its buffers begins.
MEMORY, BUFFER = 1 << 20, 1 << 17
#: Every function has at most this many integer parameters, and at most one float32.
PARAMETERS = 9

HARNESS = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
typedef void (*function)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);
%(declarations)s
static const function functions[] = {%(names)s};
int main(int argc, char **argv) {
    FILE *file = fopen(argv[1], "r+b");
    int64_t call[%(words)d];
    char *memory = aligned_alloc(64, %(memory)d);
    long at = 0;
    while (fseek(file, at, SEEK_SET) == 0 && fread(call, sizeof call, 1, file) == 1) {
        if (fread(memory, 1, %(memory)d, file) != %(memory)d) return 1;
        int64_t x[%(parameters)d];
        for (int i = 0; i < %(parameters)d; i++)
            x[i] = call[1 + i] + ((call[1 + %(parameters)d] >> i & 1) ? (int64_t) memory : 0);
        float number = *(float *) &call[2 + %(parameters)d];
        functions[call[0]](x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], number);
        if (fseek(file, at + sizeof call, SEEK_SET) || fwrite(memory, 1, %(memory)d, file) != %(memory)d) return 1;
        at = at + sizeof call + %(memory)d;
    }
    return argc != 2;
}
"""


@dataclasses.dataclass
class Call:
    """A function on both CPUs, and what it is called with."""

    ours: VectorFunction
    theirs: VectorFunction
    #: Integers by parameter; one that is not here is the address of the next buffer.
    integers: dict[str, int]
    number: float = 0.0
    #: Buffers whose contents are not random float32.
    contents: dict[str, np.ndarray[Any, Any]] = dataclasses.field(default_factory=dict)

    def arguments(self) -> tuple[list[int], int]:
        """The integer arguments, and the bits of those that are offsets in memory."""
        found, addresses, buffer = [], 0, 0
        for i, name in enumerate(name for name in self.ours.parameters if name not in self.ours.floats):
            if name in self.integers:
                found.append(self.integers[name])
            else:
                found.append(buffer)
                addresses, buffer = addresses | 1 << i, buffer + BUFFER
        return found + [0] * (PARAMETERS - len(found)), addresses

    def memory(self, generator: np.random.Generator) -> np.ndarray[Any, Any]:
        """The memory before the call: numbers of many sizes, some of them denormal."""
        sizes = 2.0 ** generator.integers(-12, 6, MEMORY // 4)
        memory = (generator.standard_normal(MEMORY // 4) * sizes).astype(np.float32)
        memory[generator.integers(0, len(memory), 500)] = 1e-40
        memory = memory.view(np.uint8)
        names = [name for name in self.ours.parameters if name not in self.integers and name not in self.ours.floats]
        for name, values in self.contents.items():
            at = names.index(name) * BUFFER
            memory[at : at + values.nbytes] = values.view(np.uint8).ravel()
        return memory


def halves(generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """A buffer of bfloat16."""
    numbers: np.ndarray[Any, Any] = generator.standard_normal(BUFFER // 2).astype(np.float32)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def calls(ours: Isa, theirs: Isa, generator: np.random.Generator) -> Iterator[tuple[str, Call]]:
    """Every function with arguments, by a name."""
    for weights_in in ("fp32", "bf16"):
        for rows in (1, 2, 4, 6):
            pair = (gemm_fp32.micro_kernel(rows, 6, 16, 1, weights_in=weights_in) for _ in range(2))
            contents = {"w": halves(generator)} if weights_in == "bf16" else {}
            yield f"product {weights_in} {rows}", Call(*pair, {"steps": 190, "quarter": 64}, contents=contents)
    for bf16, int8 in ((False, False), (True, False), (True, True)):
        for residual, activation in ((True, ""), *((False, name) for name in ACTIVATION_CODES)):
            given = {"bf16": bf16, "int8": int8, "residual": residual, "activation": activation}
            kind = " ".join(name if value is True else value for name, value in given.items() if value)
            contents = {"sums": generator.integers(-(2**22), 2**22, 9 * 16, np.int32)} if int8 else {}
            if bf16:
                contents["residual"] = halves(generator)
            pair = (finish_rows(16, **given) for _ in range(2))
            yield f"epilogue {kind}", Call(*pair, {"rows": 9, "row_bytes": 64, "bias_bytes": 64}, contents=contents)
    for bf16 in (False, True):
        contents = {"source": halves(generator)} if bf16 else {}
        pair = (layer_norm_row(bf16=bf16) for _ in range(2))
        yield f"norm {bf16}", Call(*pair, {"width": 775}, 1e-5, contents)
    for head in (Head(64, False), Head(25, False), Head(64, True), Head(80, True)):
        yield from attention_calls(head, ours, theirs, generator)


def attention_calls(head: Head, ours: Isa, theirs: Isa, generator: np.random.Generator) -> Iterator[tuple[str, Call]]:
    """The functions of attention for one kind of head."""
    kind = f"{head.width} {'bfloat16' if head.bf16 else 'float32'}"
    typed = {"k": halves(generator), "v": halves(generator), "q": halves(generator)} if head.bf16 else {}

    def made(name: str, *arguments: Any) -> tuple[VectorFunction, VectorFunction]:
        function = getattr(attention_rows, name)
        uses = [(*arguments, isa) if name in ("scores", "weighted_sums") else arguments for isa in (ours, theirs)]
        return function(*uses[0]), function(*uses[1])

    def contents(*names: str) -> dict[str, np.ndarray[Any, Any]]:
        return {name: typed[name] for name in names if typed}

    yield f"query {kind}", Call(*made("query", head), {}, 0.125, contents("q"))
    yield f"score {kind}", Call(*made("score", head), {}, contents=contents("k"))
    yield f"softmax {kind}", Call(*made("softmax"), {"length": 1003})
    yield f"quotient {kind}", Call(*made("finish", head), {})
    for rows in (1, 2):
        several = {"groups": 11, "out_row_bytes": 1024}
        yield f"scores {rows} {kind}", Call(*made("scores", head, rows), several, contents=contents("k"))
        several = {"weights_row_bytes": 1024, "count": 177}
        yield f"values {rows} {kind}", Call(*made("weighted_sums", head, rows), several, contents=contents("v"))


def int8_calls(ours: Isa, theirs: Isa, generator: np.random.Generator) -> Iterator[tuple[str, Call]]:
    """Products of int8, of words with as many elements on both CPUs, that need no offset."""
    numbers = generator.integers(-127, 128, BUFFER, np.int8)
    shorts = generator.integers(-127, 128, BUFFER // 2, np.int16)
    for rows in (1, 6):
        contents = {"x": shorts, "w": numbers}
        pair = (gemm_int8.micro_kernel(isa, rows, 1) for isa in (ours, theirs))
        yield f"product int8 {rows}", Call(*pair, {"steps": 190, "quarter": 64}, contents=contents)


def sdot_calls(theirs: Isa, generator: np.random.Generator) -> Iterator[tuple[str, Call, Any]]:
    """Products of int8 by sdot, with the sums that they must give."""
    x, w = (generator.integers(-127, 128, (190 * 4, width, 4), np.int8) for width in (6, 16))
    kernel = gemm_int8.micro_kernel(theirs, 6, 1)
    contents = {"x": x, "w": w, "sums": np.zeros(96, np.int32)}
    call = Call(kernel, kernel, {"steps": 190, "quarter": 64}, contents=contents)
    yield "product int8 by sdot", call, np.einsum("srk,sck->rc", x.astype(np.int32), w.astype(np.int32))


def run_here(call: Call, isa: Isa, memory: np.ndarray[Any, Any]) -> None:
    """Call a function of this CPU."""
    from llvmlite import binding

    machine = target_machine(isa, jit=True)
    engine = binding.create_mcjit_compiler(compile_module(vector_module([call.ours]), machine), machine)
    engine.finalize_object()
    integers, addresses = call.arguments()
    place = memory.ctypes.data
    kinds = [ctypes.c_float if name in call.ours.floats else ctypes.c_int64 for name in call.ours.parameters]
    values = iter(value + (place if addresses >> i & 1 else 0) for i, value in enumerate(integers))
    given = [call.number if name in call.ours.floats else next(values) for name in call.ours.parameters]
    ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(call.ours.name))(*given)


def run_there(made: Sequence[Call], isa: Isa, before: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    """Run all calls on the emulated CPU; returns the memory after each."""
    functions, machine = [], target_machine(isa, jit=False)
    names = [f"function_{i}" for i in range(len(made))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        for name, call in zip(names, made, strict=True):
            function = dataclasses.replace(call.theirs, name=name)
            (path / f"{name}.o").write_bytes(machine.emit_object(compile_module(vector_module([function]), machine)))
            functions.append(path / f"{name}.o")
        code = HARNESS % {
            "declarations": "\n".join(f"void {name}();" for name in names),
            "names": ", ".join(f"(function) {name}" for name in names),
            "words": 3 + PARAMETERS,
            "parameters": PARAMETERS,
            "memory": MEMORY,
        }
        (path / "harness.c").write_text(code)
        with (path / "calls").open("wb") as file:
            for i, (call, memory) in enumerate(zip(made, before, strict=True)):
                integers, addresses = call.arguments()
                bits = int(np.float32(call.number).view(np.uint32))
                file.write(np.array([i, *integers, addresses, bits], np.int64).tobytes() + memory.tobytes())
        compiler = ["aarch64-linux-gnu-gcc", "-static", "-O1", "-w", str(path / "harness.c"), *map(str, functions)]
        subprocess.run([*compiler, "-o", str(path / "harness")], check=True)
        subprocess.run(["qemu-aarch64-static", "-cpu", "max", str(path / "harness"), str(path / "calls")], check=True)
        after = np.fromfile(path / "calls", np.uint8).reshape(len(made), -1)
    return [each[-MEMORY:] for each in after]


def main() -> int:
    generator = np.random.default_rng(7)
    ours, sdot = dataclasses.replace(find("avx2"), adds=()), dataclasses.replace(NEON, adds=("dotprod",))
    named = [*calls(ours, NEON, generator), *int8_calls(ours, NEON, generator)]
    before = [call.memory(generator) for _, call in named]
    there = run_there([call for _, call in named], NEON, before)
    wrong = []
    for (name, call), memory, theirs in zip(named, before, there, strict=True):
        aligned = np.zeros(MEMORY + 64, np.uint8)
        here = aligned[-aligned.ctypes.data % 64 :][:MEMORY]
        here[:] = memory
        run_here(call, ours, here)
        assert not np.array_equal(here, memory), f"{name} has written nothing"
        wrong += [name] if not np.array_equal(here, theirs) else []
    for name, call, sums in sdot_calls(sdot, generator):
        (found,) = run_there([call], sdot, [call.memory(generator)])
        at = 2 * BUFFER
        wrong += [name] if not np.array_equal(found[at : at + 384].view(np.int32).reshape(6, 16), sums) else []
        named.append((name, call))
    print("\n".join(f"{name}: other bits" for name in wrong))
    print(f"{len(named) - len(wrong)} of {len(named)} calls have the same bits on an emulated aarch64 as with AVX2")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())

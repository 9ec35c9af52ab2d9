"""GPT-2 from tinygrad's tensor operations: layernorm, linear, gelu (tanh approximation by default) and softmax.

It follows tinygrad's `examples/gpt2.py`. tinygrad compiles its CPU kernels with clang. If only gcc is installed, the C
code that tinygrad generates is compiled with gcc.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from headrace.worker.fidelity.references.base import (
    Array,
    ReferenceUnavailable,
    check_tokens,
    import_library,
    library_name,
    with_outcome,
)
from headrace.worker.fidelity.references.files import read_weights
from headrace.worker.fidelity.references.shape import Shape, plain_shape

#: A tinygrad.Tensor. The library is imported only when the reference is loaded.
Tensor = Any

DEVICE = "CPU"


class TinygradReference:
    """The forward pass in float32 on the CPU, without a cache. Created by `load`."""

    def __init__(self, shape: Shape, weights: Mapping[str, Array]) -> None:
        self.name = library_name("tinygrad")
        self.shape = shape
        self._library = import_library("tinygrad", "tinygrad")
        with _compiling():
            self._weights = {name: self._tensor(array).realize() for name, array in weights.items()}

    def trace(self, token_ids: Sequence[int]) -> dict[str, Array]:
        """See `Reference.trace`. Kernels are compiled for each new prompt length, which takes seconds."""
        ids = self._check(token_ids)
        kept: dict[str, Tensor] = {}
        with _compiling():
            hidden = list(self._residuals(ids, kept))
            tensors = kept | {"logits": self._head(hidden[-1])}
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            residuals = [x.numpy() for x in hidden]
        arrays |= {"embeddings": residuals[0], "block_0": residuals[1], "hidden": np.stack(residuals)}
        return with_outcome(arrays)

    def generate(self, token_ids: Sequence[int], count: int) -> list[int]:
        """See `Reference.generate`."""
        ids = self._check(token_ids, count=count)
        # All steps are padded to one length, so that kernels are compiled once. No row attends to the padding after it.
        total = len(ids) + max(count - 1, 0)
        with _compiling():
            for _ in range(count):
                *_, last = self._residuals(ids + [0] * (total - len(ids)), {})
                row = self._tensor(last.numpy()[len(ids) - 1 : len(ids)])  # [1, E]
                ids.append(int(self._head(row).numpy()[0].argmax()))
        return ids[len(token_ids) :]

    def _residuals(self, ids: list[int], kept: dict[str, Tensor]) -> Iterator[Tensor]:
        """Yield the residual stream [T, E] after the embeddings and after each block."""
        rows = self._tensor(np.array(ids, np.int32))
        x = (self._weights["wte.weight"][rows] + self._weights["wpe.weight"][: len(ids)]).realize()  # [T, E]
        yield x
        # [T, T]: row t attends to columns 0 to t
        mask = self._tensor(np.triu(np.full((len(ids), len(ids)), -np.inf, np.float32), 1)).realize()
        for layer in range(self.shape.n_layer):
            # Only block 0 realizes its inner tensors, so that tinygrad can fuse the operations of the other blocks.
            inner: dict[str, Tensor] = {}
            x = self._block(f"h.{layer}.", x, mask, inner)
            x.realize(*(inner.values() if layer == 0 else ()))
            kept.update(inner if layer == 0 else {})
            yield x

    def _block(self, prefix: str, x: Tensor, mask: Tensor, kept: dict[str, Tensor]) -> Tensor:
        normed = self._norm(prefix + "ln_1", x)  # [T, E]
        attn = self._attention(prefix + "attn.", normed, mask, kept)  # [T, E]
        x = x + attn
        inner = self._linear(prefix + "mlp.c_fc", self._norm(prefix + "ln_2", x))  # [T, 4E]
        mlp = self._linear(prefix + "mlp.c_proj", inner.gelu())  # [T, E]
        kept.update(ln_1=normed, attn=attn, mlp=mlp)
        return x + mlp

    def _attention(self, prefix: str, x: Tensor, mask: Tensor, kept: dict[str, Tensor]) -> Tensor:
        """[T, E] -> [T, E]."""
        length, width = x.shape
        heads = self.shape.n_head
        qkv = self._linear(prefix + "c_attn", x).reshape(length, 3, heads, width // heads)
        q, k, v = (qkv[:, part] for part in range(3))  # [T, H, D]
        kept.update(q=q, k=k, v=v)
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))  # [H, T, D]
        scores = q.matmul(k.transpose(1, 2)) / math.sqrt(width // heads)  # [H, T, T]
        kept.update(scores=scores)
        rows = (scores + mask).softmax(-1).matmul(v)  # [H, T, D]
        return self._linear(prefix + "c_proj", rows.transpose(0, 1).reshape(length, width))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        normed = x.layernorm(eps=self.shape.epsilon)
        return normed * self._weights[name + ".weight"] + self._weights[name + ".bias"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]; the files store these weights as [in, out], as tinygrad's `linear` expects."""
        return x.linear(self._weights[name + ".weight"], self._weights[name + ".bias"])

    def _head(self, x: Tensor) -> Tensor:
        """The final norm and the tied head. [R, E] -> [R, V]."""
        return self._norm("ln_f", x).matmul(self._weights["wte.weight"].transpose(0, 1))

    def _tensor(self, array: Array) -> Tensor:
        # The device is explicit, because tinygrad's default is the first GPU that it finds.
        return self._library.Tensor(np.ascontiguousarray(array), device=DEVICE)

    def _check(self, token_ids: Sequence[int], *, count: int = 0) -> list[int]:
        shape = self.shape
        return check_tokens(token_ids, count=count, n_positions=shape.n_positions, vocab_size=shape.vocab_size)


def load(folder: Path, dtype: str) -> TinygradReference:  # noqa: ARG001
    """Load the reference with the weights of a directory. Raises the errors of `load_reference`."""
    import_library("tinygrad", "tinygrad")
    return TinygradReference(plain_shape(folder, "tinygrad"), read_weights(folder))


@contextmanager
def _compiling() -> Iterator[None]:
    """Let tinygrad compile for the CPU with the installed compiler, and restore its compiler afterwards.

    Raises:
        ReferenceUnavailable: neither clang nor gcc is installed.
    """
    compiler = import_library("tinygrad", "tinygrad.runtime.support.compiler_cpu").ClangCompiler
    context = import_library("tinygrad", "tinygrad.helpers").Context
    original = compiler.compile
    # PARALLEL=0 compiles in this process, where the replaced compiler is in effect. CCACHE=0 keeps kernels that gcc
    # compiled out of tinygrad's cache on disk, which assumes clang.
    with context(PARALLEL=0, CCACHE=0):
        if not _clang_is_tinygrads_choice():
            gcc = shutil.which("gcc")
            if gcc is None:
                raise ReferenceUnavailable(
                    "The reference 'tinygrad' needs a C compiler: install clang (or gcc) and add it to the PATH."
                )
            compiler.compile = lambda self, source: _compile_with_gcc(gcc, self.args, source)
        try:
            yield
        finally:
            compiler.compile = original


def _clang_is_tinygrads_choice() -> bool:
    """Return whether the compiler that tinygrad would start is an installed clang."""
    command = os.environ.get("CC", "clang")
    return "clang" in Path(command).name and shutil.which(command) is not None


#: clang's declaration of a vector type, as tinygrad generates it: element, name, alignment, number of elements.
_VECTOR = re.compile(r"typedef (.+?) (\w+) __attribute__\(\(aligned\((\d+)\),ext_vector_type\((\d+)\)\)\);")
_GCC_VECTOR = r"typedef \1 \2 __attribute__((aligned(\3),vector_size(\4*sizeof(\1))));"
#: A built-in function of clang that gcc lacks.
_BIT_CAST = "#define __builtin_bit_cast(T, x) (((union { __typeof__(x) from; T to; }){.from = (x)}).to)\n"
#: tinygrad's options without `--target`, which gcc does not support, and without unwind tables, which tinygrad cannot
#: load.
_GCC_OPTIONS = ["-x", "c", "-c", "-O2", "-fPIC", "-ffreestanding", "-fno-math-errno", "-nostdlib", "-fno-ident"]
_GCC_OPTIONS += ["-fno-asynchronous-unwind-tables"]


def _compile_with_gcc(gcc: str, machine: Sequence[str], source: str) -> bytes:
    """Compile the C code that tinygrad generates for clang. Returns the bytes of the object file."""
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        output = Path(folder) / "kernel.o"  # the assembler of gcc cannot write to a pipe
        done = subprocess.run(  # noqa: S603
            [gcc, *_GCC_OPTIONS, *machine, "-", "-o", str(output)],
            input=_BIT_CAST + _VECTOR.sub(_GCC_VECTOR, source),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ReferenceUnavailable(
                f"gcc cannot compile the code of tinygrad; install clang. gcc said: {done.stderr.strip()[:400]}"
            )
        return output.read_bytes()

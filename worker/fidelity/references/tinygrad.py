"""GPT-2 from tinygrad's tensors: its layernorm, linear, gelu (by tanh unless told otherwise) and softmax.

After tinygrad's own `examples/gpt2.py`. tinygrad compiles its kernels, for the CPU with clang; where only gcc is found,
the C that tinygrad writes is handed to that.
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
from headrace.worker.fidelity.references.files import Shape, read_shape, read_weights

#: A tinygrad.Tensor; imported only when the reference is loaded.
Tensor = Any

DEVICE = "CPU"


class TinygradReference:
    """The forward pass in float32 on the CPU, without a cache. Call `load` to make one."""

    def __init__(self, shape: Shape, weights: Mapping[str, Array]) -> None:
        self.name = library_name("tinygrad")
        self.shape = shape
        self._library = import_library("tinygrad", "tinygrad")
        with _compiling():
            self._weights = {name: self._tensor(array).realize() for name, array in weights.items()}

    def trace(self, token_ids: Sequence[int]) -> dict[str, Array]:
        """See `Reference.trace`. Kernels are compiled for every new number of tokens, which takes seconds."""
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
        # Padded to one length, so that the kernels are compiled once. No row looks at the padding behind it.
        total = len(ids) + max(count - 1, 0)
        with _compiling():
            for _ in range(count):
                *_, last = self._residuals(ids + [0] * (total - len(ids)), {})
                row = self._tensor(last.numpy()[len(ids) - 1 : len(ids)])  # [1, E]
                ids.append(int(self._head(row).numpy()[0].argmax()))
        return ids[len(token_ids) :]

    def _residuals(self, ids: list[int], kept: dict[str, Tensor]) -> Iterator[Tensor]:
        """The residual stream after the embeddings and after each block: [T, E] each."""
        rows = self._tensor(np.array(ids, np.int32))
        x = (self._weights["wte.weight"][rows] + self._weights["wpe.weight"][: len(ids)]).realize()  # [T, E]
        yield x
        # [T, T]: row t may look at columns 0 to t
        mask = self._tensor(np.triu(np.full((len(ids), len(ids)), -np.inf, np.float32), 1)).realize()
        for layer in range(self.shape.n_layer):
            # Only block 0 has its inner tensors made; the others are free to fuse them away.
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
        """[T, in] -> [T, out]; the files keep these weights as [in, out], and so does tinygrad's `linear`."""
        return x.linear(self._weights[name + ".weight"], self._weights[name + ".bias"])

    def _head(self, x: Tensor) -> Tensor:
        """The final norm and the tied head. [R, E] -> [R, V]."""
        return self._norm("ln_f", x).matmul(self._weights["wte.weight"].transpose(0, 1))

    def _tensor(self, array: Array) -> Tensor:
        # The device is named every time: tinygrad's default is the first GPU it finds.
        return self._library.Tensor(np.ascontiguousarray(array), device=DEVICE)

    def _check(self, token_ids: Sequence[int], *, count: int = 0) -> list[int]:
        shape = self.shape
        return check_tokens(token_ids, count=count, n_positions=shape.n_positions, vocab_size=shape.vocab_size)


def load(folder: Path, dtype: str) -> TinygradReference:  # noqa: ARG001
    """The reference with the weights of a directory. Raises what `load_reference` does."""
    import_library("tinygrad", "tinygrad")
    return TinygradReference(read_shape(folder), read_weights(folder))


@contextmanager
def _compiling() -> Iterator[None]:
    """What tinygrad needs to compile for the CPU here, taken back afterwards.

    Raises:
        ReferenceUnavailable: there is neither clang nor gcc.
    """
    compiler = import_library("tinygrad", "tinygrad.runtime.support.compiler_cpu").ClangCompiler
    context = import_library("tinygrad", "tinygrad.helpers").Context
    original = compiler.compile
    # In this process (PARALLEL), where the change to the compiler holds; and kept out of tinygrad's cache on disk
    # (CCACHE), which takes all kernels to be clang's.
    with context(PARALLEL=0, CCACHE=0):
        if not _clang_is_tinygrads_choice():
            gcc = shutil.which("gcc")
            if gcc is None:
                raise ReferenceUnavailable(
                    "The reference 'tinygrad' compiles its kernels: install clang (or gcc) and have it on the PATH."
                )
            compiler.compile = lambda self, source: _compile_with_gcc(gcc, self.args, source)
        try:
            yield
        finally:
            compiler.compile = original


def _clang_is_tinygrads_choice() -> bool:
    """Whether the compiler that tinygrad would start is there and a clang."""
    command = os.environ.get("CC", "clang")
    return "clang" in Path(command).name and shutil.which(command) is not None


#: clang's way to declare a vector type, as tinygrad writes it: element, name, alignment, number of elements.
_VECTOR = re.compile(r"typedef (.+?) (\w+) __attribute__\(\(aligned\((\d+)\),ext_vector_type\((\d+)\)\)\);")
_GCC_VECTOR = r"typedef \1 \2 __attribute__((aligned(\3),vector_size(\4*sizeof(\1))));"
#: clang has this one built in.
_BIT_CAST = "#define __builtin_bit_cast(T, x) (((union { __typeof__(x) from; T to; }){.from = (x)}).to)\n"
#: tinygrad's own options without `--target`, which gcc does not know; and no unwind tables, which tinygrad cannot load.
_GCC_OPTIONS = ["-x", "c", "-c", "-O2", "-fPIC", "-ffreestanding", "-fno-math-errno", "-nostdlib", "-fno-ident"]
_GCC_OPTIONS += ["-fno-asynchronous-unwind-tables"]


def _compile_with_gcc(gcc: str, machine: Sequence[str], source: str) -> bytes:
    """C as tinygrad writes it for clang -> an object file's bytes."""
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        output = Path(folder) / "kernel.o"  # gcc's assembler cannot write to a pipe
        done = subprocess.run(  # noqa: S603
            [gcc, *_GCC_OPTIONS, *machine, "-", "-o", str(output)],
            input=_BIT_CAST + _VECTOR.sub(_GCC_VECTOR, source),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ReferenceUnavailable(
                f"gcc does not compile what tinygrad writes; install clang. It said: {done.stderr.strip()[:400]}"
            )
        return output.read_bytes()

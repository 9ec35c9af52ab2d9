"""GPT-2 from the primitives of Candle's Python package, candle-nn.

The package offers few: matmul, softmax, tanh, broadcasting. Its layer norm accepts only three dimensions and its GELU
(`candle.functional.gelu`) is the erf form, so both are built from smaller operations here.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from headrace.worker.fidelity.references.base import Array, check_tokens, import_library, library_name, with_outcome
from headrace.worker.fidelity.references.files import read_weights
from headrace.worker.fidelity.references.shape import Shape, plain_shape

#: A candle.Tensor. The package has no type annotations that mypy can read.
Tensor = Any

#: Added to masked scores. It is finite in float32, and its exponential is exactly 0.
HIDDEN = -1e9


class CandleReference:
    """The forward pass in float32 on the CPU, without a cache. Created by `load`."""

    def __init__(self, shape: Shape, weights: Mapping[str, Array]) -> None:
        self.name = library_name("candle")
        self.shape = shape
        self._candle = import_library("candle", "candle")
        self._functional = import_library("candle", "candle.functional")
        self._utils = import_library("candle", "candle.utils")
        self._weights = self._to_candle(weights)

    def trace(self, token_ids: Sequence[int]) -> dict[str, Array]:
        """See `Reference.trace`."""
        ids = self._check(token_ids)
        kept: dict[str, Tensor] = {}
        hidden = list(self._residuals(ids, kept))
        tensors = kept | {"embeddings": hidden[0], "block_0": hidden[1], "logits": self._head(hidden[-1])}
        tensors["hidden"] = self._candle.stack(hidden, 0)
        return with_outcome(self._to_numpy(tensors))

    def generate(self, token_ids: Sequence[int], count: int) -> list[int]:
        """See `Reference.generate`."""
        ids = self._check(token_ids, count=count)
        for _ in range(count):
            *_, last = self._residuals(ids, {})
            logits = self._to_numpy({"logits": self._head(last.narrow(0, len(ids) - 1, 1))})["logits"]
            ids.append(int(logits[0].argmax()))
        return ids[len(token_ids) :]

    def _residuals(self, ids: list[int], kept: dict[str, Tensor]) -> Iterator[Tensor]:
        """Yield the residual stream [T, E] after the embeddings and after each block."""
        x = self._weights["wte.weight"].index_select(self._candle.tensor(ids), 0)  # [T, E]
        x = x + self._weights["wpe.weight"].narrow(0, 0, len(ids))
        yield x
        # [T, T]: row t attends to columns 0 to t
        mask = self._to_candle({"mask": np.triu(np.full((len(ids), len(ids)), HIDDEN, np.float32), 1)})["mask"]
        for layer in range(self.shape.n_layer):
            x = self._block(f"h.{layer}.", x, mask, kept if layer == 0 else {})
            yield x

    def _block(self, prefix: str, x: Tensor, mask: Tensor, kept: dict[str, Tensor]) -> Tensor:
        normed = self._norm(prefix + "ln_1", x)  # [T, E]
        attn = self._attention(prefix + "attn.", normed, mask, kept)  # [T, E]
        x = x + attn
        inner = self._linear(prefix + "mlp.c_fc", self._norm(prefix + "ln_2", x))  # [T, 4E]
        mlp = self._linear(prefix + "mlp.c_proj", self._gelu(inner))  # [T, E]
        kept.update(ln_1=normed, attn=attn, mlp=mlp)
        return x + mlp

    def _attention(self, prefix: str, x: Tensor, mask: Tensor, kept: dict[str, Tensor]) -> Tensor:
        """[T, E] -> [T, E]."""
        length, width = x.shape
        heads = self.shape.n_head
        qkv = self._linear(prefix + "c_attn", x)  # [T, 3E]
        q, k, v = (qkv.narrow(1, i * width, width).reshape((length, heads, width // heads)) for i in range(3))
        kept.update(q=q, k=k, v=v)
        q, k, v = (part.transpose(0, 1).contiguous() for part in (q, k, v))  # [H, T, D]
        scores = q.matmul(k.transpose(1, 2).contiguous()) / math.sqrt(width // heads)  # [H, T, T]
        kept.update(scores=scores)
        weights = self._functional.softmax(scores.broadcast_add(mask), 2)
        rows = weights.matmul(v).transpose(0, 1).contiguous().reshape((length, width))
        return self._linear(prefix + "c_proj", rows)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """[T, E] -> [T, E]. The formula of candle.nn.LayerNorm, which accepts only three dimensions."""
        width = float(self.shape.n_embd)
        centred = x.broadcast_sub(x.sum_keepdim(1) / width)
        variance = centred.sqr().sum_keepdim(1) / width  # [T, 1]
        normed = centred.broadcast_div((variance + self.shape.epsilon).sqrt())
        return normed.broadcast_mul(self._weights[name + ".weight"]).broadcast_add(self._weights[name + ".bias"])

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]; the files store these weights as [in, out]."""
        return x.matmul(self._weights[name + ".weight"]).broadcast_add(self._weights[name + ".bias"])

    def _gelu(self, x: Tensor) -> Tensor:
        """GELU, tanh approximation: Hendrycks and Gimpel 2016, section 2."""
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return x * (self._functional.tanh(inner) + 1.0) * 0.5

    def _head(self, x: Tensor) -> Tensor:
        """The final norm and the tied head. [R, E] -> [R, V]."""
        return self._norm("ln_f", x).matmul(self._weights["wte.weight"].t())

    def _check(self, token_ids: Sequence[int], *, count: int = 0) -> list[int]:
        shape = self.shape
        return check_tokens(token_ids, count=count, n_positions=shape.n_positions, vocab_size=shape.vocab_size)

    # Candle converts tensors only from and to Python lists, which takes minutes and gigabytes for a model. It also
    # reads and writes safetensors files, so arrays are exchanged through files, bit for bit.

    def _to_candle(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
            file = Path(folder) / "in.safetensors"
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file)
            return dict(self._utils.load_safetensors(str(file)))

    def _to_numpy(self, tensors: Mapping[str, Tensor]) -> dict[str, Array]:
        with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
            file = Path(folder) / "out.safetensors"
            self._utils.save_safetensors(str(file), {name: tensor.contiguous() for name, tensor in tensors.items()})
            return dict(load_file(file))


def load(folder: Path, dtype: str) -> CandleReference:  # noqa: ARG001
    """Load the reference with the weights of a directory. Raises the errors of `load_reference`."""
    import_library("candle", "candle")
    return CandleReference(plain_shape(folder, "candle"), read_weights(folder))

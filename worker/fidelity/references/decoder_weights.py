"""The weights of any family by the names and in the layouts of GPT-2; shares no code with `model`.

Linear weights are [in, out] here. The columns of `attn.c_attn` are those of q, then of k, then of v.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from headrace.worker.fidelity.references.base import Array
from headrace.worker.fidelity.references.shape import Shape

EMBEDDING, HEAD = "wte.weight", "lm_head.weight"
_PARTS = (
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
)
_LINEAR = re.compile(r"\.(attn|mlp)\.c_\w+\.weight$")


class DecoderWeights(Mapping[str, Array]):
    """The weights of a model; each is read when it is asked for, as float32.

    Args:
        shape: of the model.
        stored: the tensors as the files have them, without prefixes.
    """

    def __init__(self, shape: Shape, stored: Mapping[str, Array]) -> None:
        self._shape, self._stored = shape, stored

    def __getitem__(self, name: str) -> Array:
        """Read one weight. Raises KeyError for an unknown name and ValueError for an unsupported type."""
        if name == HEAD and self._shape.tied:
            return self[EMBEDDING]
        if name == EMBEDDING and EMBEDDING not in self._stored:
            return self._stored[HEAD]
        if self._shape.family == "gpt_neo" and ".attn." in name:
            return self._neo(name)
        array = self._stored[name]
        if self._shape.family == "gpt2":
            return array
        if ".attn.c_attn." in name and self._shape.kv_heads == self._shape.n_head:
            # Without multi-query attention GPT-BigCode stores q, k and v of the first head, then of the second one ...
            size = self._shape.head_size
            by_head = array.reshape(self._shape.n_head, 3, size, *array.shape[1:])
            array = np.ascontiguousarray(by_head.swapaxes(0, 1)).reshape(array.shape)
        return array.T if _LINEAR.search(name) else array

    def _neo(self, name: str) -> Array:
        prefix, _, part = name.partition("attn.")
        if part == "c_proj.weight":
            return self._stored[f"{prefix}attn.attention.out_proj.weight"].T
        if part == "c_proj.bias":
            return self._stored[f"{prefix}attn.attention.out_proj.bias"]
        if part == "c_attn.bias":
            return np.zeros(3 * self._shape.n_embd, np.float32)
        return np.concatenate([self._stored[f"{prefix}attn.attention.{each}_proj.weight"].T for each in "qkv"], axis=1)

    def __iter__(self) -> Iterator[str]:
        yield from (EMBEDDING, "wpe.weight")
        for layer in range(self._shape.n_layer):
            yield from (f"h.{layer}.{part}" for part in _PARTS)
        yield from ("ln_f.weight", "ln_f.bias", HEAD)

    def __len__(self) -> int:
        return 5 + len(_PARTS) * self._shape.n_layer

"""Load a LoRA adapter: its two matrices for each linear layer of the decoder, checked by name and shape.

An adapter is never folded into the weights of its base. A linear layer with the weight W [in, out] computes, for the
rows of the adapter, x @ W + (x @ A) @ B, with A [in, r] and B [r, out]; the scale is in B.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.model.adapters.config import AdapterConfig, read_adapter_config
from headrace.model.config import ModelConfig
from headrace.model.families import FAMILIES
from headrace.model.families.base import Stored, transposed
from headrace.model.hub import shorten
from headrace.model.trusted_files import ModelError, check_not_shared, unchanged
from headrace.model.weight_file import TensorPlace, open_weights
from headrace.model.weight_names import plain_name

WEIGHTS_NAME = "adapter_model.safetensors"
#: What PEFT puts before the names of the base model's tensors.
PREFIX = "base_model.model."
#: Types of adapters' tensors.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_OTHER_TENSORS = {
    "lora_embedding_A": "it changes an embedding",
    "lora_embedding_B": "it changes an embedding",
    "lora_magnitude_vector": "it is of DoRA",
}


class LowRank(NamedTuple):
    """What an adapter adds to columns of a linear weight of the decoder: a @ b, from `column` on."""

    a: Tensor  # [in, r]
    b: Tensor  # [r, columns], with the scale
    column: int


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter for one base model, in float32.

    Attributes:
        matrices: linear weight of the decoder (`h.0.attn.c_attn.weight`) -> what is added to it. Several parts have
            columns of their own, where the family stores q, k and v apart.
        biases: tensor of the decoder -> the bias that replaces it.
        digest: SHA-256 of both files, for the fingerprint.
        rank: the largest rank.
    """

    matrices: dict[str, list[LowRank]]
    biases: dict[str, Tensor]
    digest: str
    rank: int

    def delta(self, name: str, shape: tuple[int, int]) -> Tensor:
        """The sum that the adapter adds to a linear weight of this shape, [in, out]; zeros if it changes nothing."""
        whole = torch.zeros(shape)
        for part in self.matrices.get(name, ()):
            whole[:, part.column : part.column + part.b.shape[1]] += part.a @ part.b
        return whole


def load_adapter(folder: Path, config: ModelConfig, *, allow_shared: bool = False) -> Adapter:
    """Load the LoRA adapter in a directory that PEFT has written, for a base model of this shape.

    Args:
        folder: has adapter_config.json and adapter_model.safetensors.
        config: the shape of the base model.
        allow_shared: accept a directory or files that every user of the machine can write.

    Raises:
        ModelError: a file is missing or broken, the adapter is for another base, it asks for what is not computed, it
            holds a NaN or an infinity, everybody can write its files, or they change while they are read.
    """
    path = folder / WEIGHTS_NAME
    if not os.path.isfile(path) and os.path.isfile(folder / "adapter_model.bin"):
        raise ModelError(
            f"{folder / 'adapter_model.bin'}: pickled weights are never read; load the adapter with peft and save it "
            "again with save_pretrained(..., safe_serialization=True)"
        )
    if not allow_shared:
        check_not_shared(folder)
    with unchanged(folder), open_weights(path) as file:
        adapter_config, data = read_adapter_config(folder)
        parts = _Parts(path, adapter_config, config)
        for key, place in file.tensors.items():
            parts.check(key, place)
        parts.check_complete()
        for key, tensor in file.read(frozenset(file.tensors)):
            parts.take(key, tensor)
        digest = hashlib.sha256(hashlib.sha256(data).digest() + bytes.fromhex(file.digest)).hexdigest()
    return parts.adapter(digest)


def side_by_side(parts: Sequence[LowRank], columns: int) -> tuple[Tensor, Tensor]:
    """The matrices of all parts as one pair, A [in, r] and B [r, columns], where r is the sum of their ranks."""
    a, b, rank = torch.cat([part.a for part in parts], 1), torch.zeros(sum(len(part.b) for part in parts), columns), 0
    for part in parts:
        b[rank : rank + len(part.b), part.column : part.column + part.b.shape[1]] = part.b
        rank += len(part.b)
    return a, b


class _Parts:
    """The tensors of one adapter. Names and shapes are checked before any is read."""

    def __init__(self, path: Path, adapter: AdapterConfig, base: ModelConfig) -> None:
        self._path, self._adapter, self._base = path, adapter, base
        #: Key in the file -> module of the base, "A" or "B".
        self._sides: dict[str, tuple[str, str]] = {}
        #: Module -> what the base's files store as its weight.
        self._stored: dict[str, Stored] = {}
        self._biases: dict[str, str] = {}
        self._read: dict[tuple[str, str], Tensor] = {}
        self._read_biases: dict[str, Tensor] = {}

    def check(self, key: str, place: TensorPlace) -> None:
        """Check the name, the type and the shape of a tensor."""
        if place.dtype not in FLOATS:
            raise self._wrong(key, f"is of type {place.dtype}; it must be a floating-point type of 16 to 64 bits")
        if not key.startswith(PREFIX):
            raise self._wrong(key, f"does not begin with {PREFIX!r}; save the adapter with peft's save_pretrained()")
        module, _, last = key.removeprefix(PREFIX).rpartition(".")
        name, _, side = module.rpartition(".")
        if last == "weight" and side in ("lora_A", "lora_B"):
            self._check_side(key, place, name, side[-1])
        elif last == "bias" and side not in ("lora_A", "lora_B"):
            self._check_bias(key, place, module)
        else:
            what = next((text for part, text in _OTHER_TENSORS.items() if part in key.split(".")), "it is not of LoRA")
            raise self._wrong(key, f"is not computed: {what}; merge the adapter with peft's merge_and_unload()")

    def _check_side(self, key: str, place: TensorPlace, module: str, side: str) -> None:
        stored = FAMILIES[self._base.family].stored(f"{plain_name(module)[0]}.weight", self._base)
        if stored is None or len(stored.shape) != 2 or not stored.target.startswith("h."):
            raise self._wrong(key, "belongs to no linear layer of the base model; is the adapter for another base?")
        if not self._adapter.changes(module):
            raise self._wrong(
                key, "is of a module that target_modules, exclude_modules and layers_to_transform do not name"
            )
        rows, columns = stored.shape[::-1] if stored.convert is transposed else stored.shape  # [in, out]
        rank = self._adapter.rank_of(module)
        right = (rank, rows) if side == "A" else (columns, rank)
        if place.shape != right:
            raise self._wrong(
                key, f"has shape {list(place.shape)}; for this base and rank {rank} it must be {list(right)}"
            )
        self._sides[key], self._stored[module] = (module, side), stored

    def _check_bias(self, key: str, place: TensorPlace, module: str) -> None:
        stored = FAMILIES[self._base.family].stored(
            f"{plain_name(module.removesuffix('.base_layer'))[0]}.bias", self._base
        )
        if self._adapter.bias == "none" or stored is None:
            raise self._wrong(key, f"is a bias that the base does not have, or bias is {self._adapter.bias!r}")
        if place.shape != stored.shape:
            raise self._wrong(key, f"has shape {list(place.shape)}; it must be {list(stored.shape)}")
        self._biases[key] = stored.target

    def check_complete(self) -> None:
        """Check that each module has both matrices, and that all modules which the config names are there."""
        present = set(self._sides.values())
        for module in self._stored:
            for side in "AB":
                if (module, side) not in present:
                    raise ModelError(f"{self._path}: tensor {PREFIX}{module}.lora_{side}.weight is missing")
        if not present:
            raise ModelError(f"{self._path}: it has no matrices of a LoRA adapter")
        named = {plain_name(module)[0] for module in self._stored}
        for name in self._linear_modules():
            if name not in named and self._adapter.changes(f"transformer.{name}"):
                raise ModelError(
                    f"{self._path}: it has no tensors for {name}, which target_modules names; is the file complete?"
                )

    def _linear_modules(self) -> list[str]:
        """The linear layers of the base, by the names of its files."""
        shapes = FAMILIES[self._base.family].layer(self._base)
        names = [name.removesuffix(".weight") for name, stored in shapes.items() if len(stored.shape) == 2]
        return [f"h.{layer}.{name}" for layer in range(self._base.n_layer) for name in names]

    def take(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor that was read, in float32."""
        made = tensor.float()
        if not math.isfinite(made.abs().sum().item()) and not torch.isfinite(made).all():
            raise self._wrong(key, "holds a NaN or an infinity; the training diverged, or the file is damaged")
        if key in self._biases:
            self._read_biases[self._biases[key]] = made.clone()
        else:
            self._read[self._sides[key]] = made.t().contiguous()

    def adapter(self, digest: str) -> Adapter:
        """The adapter of all tensors."""
        matrices: dict[str, list[LowRank]] = {}
        for module, stored in self._stored.items():
            scaled = self._read[module, "B"] * self._adapter.scale_of(module)
            part = LowRank(self._read[module, "A"], scaled, stored.column or 0)
            matrices.setdefault(stored.target, []).append(part)
        rank = max(len(part.b) for parts in matrices.values() for part in parts)
        return Adapter(matrices, self._read_biases, digest, rank)

    def _wrong(self, key: str, what: str) -> ModelError:
        return ModelError(f"{self._path}: tensor {shorten(repr(key))} {what}")

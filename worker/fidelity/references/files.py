"""Read a model directory in Hugging Face format, for references whose library cannot read it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from headrace.worker.fidelity.references.base import Array

INDEX = "model.safetensors.index.json"

#: What training code wraps models in, anywhere in a name; and what models are stored under.
_CONTAINERS = re.compile(r"^((transformer|pretrained_model)\.)+")
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: Old files hold the causal masks.
_MASKS = tuple(f"{part}.{mask}" for part in (".attn", ".attn.attention") for mask in ("bias", "masked_bias"))
#: Types of a safetensors header -> numpy types. numpy has no bfloat16, which is the upper half of a float32.
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model, sorted by name.

    Raises:
        FileNotFoundError: a file is missing.
    """
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    else:
        names = {"model.safetensors"}
    files = [folder / Path(name).name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name}")
    return files


def read_weights(folder: Path) -> dict[str, Array]:
    """Read all weights as float32. The keys are their names without `transformer.`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a weight has an unsupported type.
    """
    return {plain_name(name): array for file in weight_files(folder) for name, array in read_file(file)}


class StoredWeights(Mapping[str, Array]):
    """The tensors of a model by their names without prefixes, the head included; each is read on access, as float32.

    Args:
        folder: the model's directory.
        keep_float64: read those that are stored as float64 as they are.

    Raises:
        FileNotFoundError: a file is missing.
    """

    def __init__(self, folder: Path, *, keep_float64: bool = False) -> None:
        self._keep_float64 = keep_float64
        self._places = {
            plain_name(name): (file, name, entry, begin)
            for file in weight_files(folder)
            for name, entry, begin in _entries(file)
        }

    def __getitem__(self, name: str) -> Array:
        """Read one weight. Raises KeyError for an unknown name and ValueError for an unsupported type."""
        file, stored, entry, begin = self._places[name]
        with file.open("rb") as stream:
            return _read_entry(stream, stored, entry, begin, keep_float64=self._keep_float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def plain_name(name: str) -> str:
    """Return the name of a tensor without the prefixes that some files have."""
    return _CONTAINERS.sub("", _WRAPPERS.sub("", name))


def wanted(name: str) -> bool:
    """Return whether a tensor is a weight of a plain GPT-2. Files may also hold masks and a copy of the embedding."""
    return not name.endswith((*_MASKS, "lm_head.weight"))


def read_file(file: Path) -> Iterator[tuple[str, Array]]:
    """Yield the names and weights of one safetensors file, as float32."""
    with file.open("rb") as stream:
        for name, entry, begin in _entries(file):
            if wanted(name):
                yield name, _read_entry(stream, name, entry, begin)


def _entries(file: Path) -> Iterator[tuple[str, Mapping[str, Any], int]]:
    """Yield the name and header entry of each weight in a safetensors file, with the offset of the file's data.

    Format (https://huggingface.co/docs/safetensors): eight bytes with the length of the header, the header as JSON,
    then the tensors at the offsets that the header gives.
    """
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: Mapping[str, Any] = json.loads(stream.read(size))
    for name, entry in header.items():
        if name != "__metadata__" and not name.endswith(_MASKS):
            yield name, entry, 8 + size


def _read_entry(
    stream: IO[bytes], name: str, entry: Mapping[str, Any], data: int, *, keep_float64: bool = False
) -> Array:
    begin, end = entry["data_offsets"]
    stream.seek(data + begin)
    stored = stream.read(end - begin)
    if keep_float64 and entry["dtype"] == "F64":
        return np.frombuffer(stored, "<f8").reshape(entry["shape"])
    return _as_float32(name, entry["dtype"], stored).reshape(entry["shape"])


def _as_float32(name: str, dtype: str, data: bytes) -> Array:
    if dtype not in _DTYPES:
        raise ValueError(f"the weight {name} is stored as {dtype}; supported are {', '.join(_DTYPES)}")
    stored = np.frombuffer(data, _DTYPES[dtype])
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)

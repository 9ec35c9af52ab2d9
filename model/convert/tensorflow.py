"""Reads the checkpoints of GPT-2's first release, which TensorFlow 1 wrote: an index and files of raw tensors.

The index is an uncompressed LevelDB table of protocol buffers. Source: tensorflow/core/util/tensor_bundle (format) and
tensorflow/core/lib/io/format.cc (table); OpenAI's src/model.py (names and shapes).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headrace.model.hub import MAX_CONFIG_BYTES, read_json, short_repr
from headrace.model.trusted_files import ModelError, open_file, read_bytes

_MAGIC = 0xDB4775248B80FB57
MAX_INDEX_BYTES = 2**24
_FLOAT32 = 1
_NAMES = {"w": "weight", "b": "bias", "g": "weight"}


def is_tensorflow(path: Path) -> bool:
    """Whether a file is the index of a checkpoint, or one of the files beside it."""
    return bool(re.search(r"\.ckpt(-\d+)?\.(index|meta|data-\d+-of-\d+)$", path.name))


class _Entry(NamedTuple):
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


class TensorFlowCheckpoint:
    """A checkpoint of GPT-2. Raises ModelError, which names the file, for anything else."""

    def __init__(self, path: Path) -> None:
        self._stem = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path.name)
        self.index = path.with_name(f"{self._stem}.index")
        try:
            self._shards, self._entries = _read_index(read_bytes(self.index, MAX_INDEX_BYTES))
        except (ValueError, IndexError) as error:
            raise ModelError(f"{self.index}: not the index of a TensorFlow checkpoint ({error})") from None

    def config(self) -> dict[str, Any]:
        """The content of config.json, from hparams.json beside the checkpoint."""
        raw = read_json(self.index.with_name("hparams.json"), MAX_CONFIG_BYTES)
        names = {"n_vocab": "vocab_size", "n_ctx": "n_positions", "n_embd": "n_embd", "n_head": "n_head"}
        end = 50_256 if raw.get("n_vocab") == 50_257 else None
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "bos_token_id": end,
            "eos_token_id": end,
            **{ours: raw.get(name) for name, ours in (names | {"n_layer": "n_layer"}).items()},
        }

    def tensors(self) -> dict[str, Tensor]:
        """All weights, by their names in a Hugging Face file; linear weights are [in, out] in both."""
        return dict(self._read())

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self._entries.items():
            found = re.fullmatch(r"model/(?:h(\d+)/)?([a-z_0-9/]+)", name)
            if found is None:  # the optimizer's, and the step counter
                continue
            parts = found[2].split("/")
            if parts[-1] in _NAMES:
                parts[-1] = _NAMES[parts[-1]]
            else:
                parts.append("weight")
            layer = "" if found[1] is None else f"h.{found[1]}."
            values = self._values(name, entry)
            # The convolutions of width 1 have a dimension more.
            yield f"transformer.{layer}{'.'.join(parts)}", values.squeeze(0) if values.dim() == 3 else values

    def _values(self, name: str, entry: _Entry) -> Tensor:
        path = self.index.with_name(f"{self._stem}.data-{entry.shard:05}-of-{self._shards:05}")
        with open_file(path) as file:
            file.seek(entry.offset)
            data = bytearray()
            while len(data) < entry.size and (part := file.read(min(entry.size - len(data), 2**24))):
                data += part
        if len(data) < entry.size or entry.size != 4 * math.prod(entry.shape):
            raise ModelError(f"{path}: tensor {short_repr(name)} is not complete; copy the file again")
        return torch.frombuffer(data, dtype=torch.float32).view(entry.shape)


def _read_index(data: bytes) -> tuple[int, dict[str, _Entry]]:
    """The number of data files, and where each tensor is. Raises ValueError or IndexError."""
    if len(data) < 48 or int.from_bytes(data[-8:], "little") != _MAGIC:
        raise ValueError("its end is not that of a table")
    footer = data[-48:]
    _, at = _varint(footer, 0)
    _, at = _varint(footer, at)
    start, at = _varint(footer, at)
    size, _ = _varint(footer, at)
    shards, entries = 0, {}
    for _, handle in _block(data, start, size):
        start, at = _varint(handle, 0)
        size, _ = _varint(handle, at)
        for key, value in _block(data, start, size):
            if not key:
                shards = dict(_fields(value)).get(1, 1)
            else:
                entries[key.decode()] = _entry(value, key)
    return int(shards), entries


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; a key begins with a part of the one before it."""
    block = data[start : start + size]
    if len(block) < size or size < 8 or data[start + size] != 0:
        raise ValueError("a block is cut off or compressed")
    end = size - 4 - 4 * int.from_bytes(block[-4:], "little")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        length, at = _varint(block, at)
        if at + fresh + length > end:
            raise ValueError("an entry is cut off")
        key = key[:shared] + block[at : at + fresh]
        at += fresh + length
        yield key, block[at - length : at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("a number is too long")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 0:
            value: Any
            value, at = _varint(data, at)
        elif tag & 7 == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif tag & 7 == 5:
            value, at = data[at : at + 4], at + 4
        else:
            raise ValueError(f"a field has the wire type {tag & 7}")
        yield tag >> 3, value


def _entry(value: bytes, key: bytes) -> _Entry:
    """A BundleEntryProto: 1 type, 2 shape, 3 data file, 4 offset, 5 size, 7 slices."""
    fields = dict(_fields(value))
    name = key.decode(errors="replace")
    if name.startswith("model/") and (fields.get(1) != _FLOAT32 or 7 in fields):
        raise ValueError(f"tensor {short_repr(name)} is not one whole float32 tensor")
    dims = [dict(_fields(dim)).get(1, 0) for number, dim in _fields(fields.get(2, b"")) if number == 2]
    return _Entry(tuple(dims), fields.get(3, 0), fields.get(4, 0), fields.get(5, 0))

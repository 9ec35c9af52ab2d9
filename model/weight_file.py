"""Reads safetensors files into memory of this process, and computes their digest from the very bytes that it hands out.

The safetensors library maps files into memory. A mapped tensor changes when somebody writes to the file, under an
unchanged digest, and ends the process when somebody shortens it. So a file is opened once and read once from its
beginning to its end, and nothing refers to it afterwards.

The format: the length of the header in 8 bytes, the header in JSON, the data of the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headrace.model.hub import short_repr, shorten
from headrace.model.trusted_files import ModelError, identity, open_file

#: The names of types in the header.
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Size limit of a header; that of GPT-2 XL has 60 KB.
MAX_HEADER_BYTES = 2**24
#: How much of a tensor that nobody wants is read at a time.
CHUNK_BYTES = 2**20


class TensorPlace(NamedTuple):
    """A tensor in a file: its type and shape, and where its bytes are, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFile:
    """An open safetensors file. `tensors` are in the order of their bytes; none has been read yet.

    Raises:
        ModelError: the file is not a complete safetensors file.
    """

    #: The name of the format, for messages.
    format = "safetensors"

    def __init__(self, path: Path, file: FileIO) -> None:
        self._begin(path, file)
        try:
            self._header = self._read_header()
            self.tensors = _places(json.loads(self._header[8:], object_pairs_hook=_without_doubles))
        except (ValueError, RecursionError) as error:
            raise self._broken(str(error)) from None
        data = max((place.end for place in self.tensors.values()), default=0)
        if len(self._header) + data != self._opened.st_size:
            raise self._broken(f"it has {self._opened.st_size} bytes and needs {len(self._header) + data}")

    def _begin(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file
        self._opened = os.fstat(file.fileno())
        self._sha256 = hashlib.sha256()

    @property
    def digest(self) -> str:
        """SHA-256 of all bytes that have been read: of the whole file when `read` has ended."""
        return self._sha256.hexdigest()

    def read(self, wanted: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the whole file once; yield the wanted tensors, which must not be changed before the next one is taken.

        Raises:
            ModelError: the file cannot be read, or was changed or replaced meanwhile.
        """
        self._file.seek(0)
        self._sha256.update(self._file.read(len(self._header)))
        with ThreadPoolExecutor(1, thread_name_prefix="headrace-digest") as pool:
            pending: Future[None] = pool.submit(lambda: None)
            for name, place in self.tensors.items():
                if name not in wanted:
                    pending.result()
                    self._skip(place.end - place.start)
                    continue
                data = torch.empty(place.end - place.start, dtype=torch.uint8)
                self._fill(data)
                pending.result()  # one tensor is hashed while the next one is read
                pending = pool.submit(self._sha256.update, data.numpy().data)
                yield name, data.view(place.dtype).view(place.shape)
            pending.result()
        self._check_unchanged()

    def _read_header(self) -> bytes:
        start = self._file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > MAX_HEADER_BYTES:
            raise ValueError(f"its header is not one of at most {MAX_HEADER_BYTES} bytes")
        header = self._file.read(length)
        if len(header) < length:
            raise ValueError("its header is cut off")
        return start + header

    def _skip(self, size: int) -> None:
        while size:
            part = torch.empty(min(size, CHUNK_BYTES), dtype=torch.uint8)
            self._fill(part)
            self._sha256.update(part.numpy().data)
            size -= len(part)

    def _fill(self, data: Tensor) -> None:
        view = data.numpy().data
        while view:
            try:
                count = self._file.readinto(view)
            except OSError as error:
                raise ModelError(f"{self.path}: cannot be read ({error.strerror})") from None
            if not count:
                raise self._broken("it became shorter while it was read")
            view = view[count:]

    def _broken(self, reason: str) -> ModelError:
        return ModelError(f"{self.path}: not a complete {self.format} file ({shorten(reason)}); copy it again")

    def _check_unchanged(self) -> None:
        """Otherwise a copy that is being written could be loaded, half old and half new."""
        try:
            now = os.stat(self.path)
        except OSError:
            now = None
        if now is None or any(
            identity(each) != identity(self._opened) for each in (now, os.fstat(self._file.fileno()))
        ):
            raise ModelError(
                f"{self.path}: it was changed or replaced while it was read; start again when it is complete"
            )


@contextmanager
def open_weights(path: Path) -> Iterator[WeightFile]:
    """Open a safetensors file. Raises ModelError like `WeightFile`, or if it cannot be opened."""
    with open_file(path) as file:
        yield WeightFile(path, file)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("its header names something twice")
    return found


def _places(header: Any) -> dict[str, TensorPlace]:
    """The tensors of a header, in the order of their bytes. Raises ValueError unless they fill the data exactly."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    places = {name: _place(name, entry) for name, entry in header.items() if name != "__metadata__"}
    ordered = dict(sorted(places.items(), key=lambda item: item[1].start))
    end = 0
    for name, place in ordered.items():
        if place.start != end:
            raise ValueError(f"tensor {short_repr(name)} does not begin where the one before it ends")
        end = place.end
    return ordered


def _place(name: str, entry: Any) -> TensorPlace:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {short_repr(name)} needs dtype, shape and data_offsets")
    dtype = TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"tensor {short_repr(name)} is of type {short_repr(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not all(isinstance(each, list) and all(map(_is_count, each)) for each in (shape, offsets)) or len(offsets) != 2:
        raise ValueError(f"tensor {short_repr(name)} has no shape and data_offsets in whole numbers")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(
            f"tensor {short_repr(name)} has {offsets[1] - offsets[0]} bytes, which is not its shape's size"
        )
    return TensorPlace(dtype, tuple(shape), *offsets)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63

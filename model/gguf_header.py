"""Parses the header of a GGUF file: its metadata, and the type, shape and place of each tensor. Needs no torch.

The `gguf` package maps the whole file into memory, and trusts its counts. Here every count and every offset is checked
against the size of the file before anything is allocated, and what has been parsed does not refer to the file.

The format, little-endian: magic, version, number of tensors, number of metadata entries; the entries; the tensors'
names, shapes, types and offsets; padding; the data of the tensors, each from a multiple of the alignment.
"""

from __future__ import annotations

import array
import math
import struct
from collections.abc import Mapping
from io import FileIO
from typing import Any, NamedTuple

from headrace.model.hub import short_repr

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: Size limit of a header. A vocabulary of 200,000 tokens with its merges takes 10 MB.
MAX_HEADER_BYTES = 2**26
#: Size limits of the name of a metadata entry, as in the format's specification, and of that of a tensor.
MAX_KEY_BYTES, MAX_NAME_BYTES = 2**16 - 1, 2**10
#: How much is read at a time.
CHUNK_BYTES = 2**20
MAX_DIMENSIONS = 4
#: The codes of scalar types -> their struct format. An array of them is an `array.array`; booleans are bytes there.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """One tensor as the header describes it."""

    #: The rows are last: in the order of numpy and torch, which is the reverse of the file's.
    shape: tuple[int, ...]
    #: A GGMLQuantizationType.
    type_code: int
    #: Where its data begins, counted from the beginning of the data.
    offset: int


class Header(NamedTuple):
    """The parsed header of a GGUF file."""

    #: The bytes that were parsed, up to the first byte of the data.
    data: bytes
    #: Entry -> number, string, bool, list of strings, or array.array of numbers.
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    alignment: int


def read_header(file: FileIO) -> Header:
    """Parse the header of an open file, from its beginning.

    Raises:
        ValueError: it is not the header of a GGUF file; the message says why, for the end of a sentence.
    """
    reader = _Reader(file)
    if reader.take(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = reader.number("I")
    if version & 0xFFFF == 0:
        raise ValueError("it is big-endian; convert it with gguf-convert-endian, from the package gguf")
    if version not in VERSIONS:
        raise ValueError(f"it is of version {version} of the format; only versions 2 and 3 can be read")
    tensor_count, entry_count = reader.number("Q"), reader.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(reader.plausible(entry_count, 13, "metadata entries")):
        key = reader.text(MAX_KEY_BYTES)
        if key in metadata:
            raise ValueError(f"metadata {short_repr(key)} occurs twice")
        metadata[key] = reader.value(key)
    tensors: dict[str, TensorInfo] = {}
    for _ in range(reader.plausible(tensor_count, 24, "tensors")):
        name = reader.text(MAX_NAME_BYTES)
        if name in tensors:
            raise ValueError(f"tensor {short_repr(name)} occurs twice")
        tensors[name] = reader.tensor(name)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {short_repr(alignment)}; it must be a power of two")
    reader.align(alignment, bool(tensors))
    return Header(reader.consumed(), metadata, tensors, alignment)


class _Reader:
    """Reads numbers and texts from a file, of which it reads no more than the limit of a header."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._data = bytearray()
        self._at = 0

    def take(self, size: int) -> bytes:
        """The next bytes. Raises ValueError if the file ends before."""
        end = self._at + size
        if end > MAX_HEADER_BYTES:
            raise ValueError(f"its header has more than {MAX_HEADER_BYTES} bytes")
        while len(self._data) < end:
            if not (part := self._file.read(CHUNK_BYTES)):
                raise ValueError("its header is cut off")
            self._data += part
        taken = bytes(memoryview(self._data)[self._at : end])
        self._at = end
        return taken

    def consumed(self) -> bytes:
        """All bytes that were taken."""
        return bytes(memoryview(self._data)[: self._at])

    def align(self, alignment: int, needed: bool) -> None:
        """Skip the padding before the data. A file without tensors may end before it."""
        padding = -self._at % alignment
        try:
            self.take(padding)
        except ValueError:
            if needed:
                raise

    def number(self, form: str) -> Any:
        """A number in a format of `struct`."""
        form = f"<{form}"
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def plausible(self, count: int, size: int, what: str) -> int:
        """A count of things that take at least `size` bytes each. Raises ValueError if no header can hold them."""
        if count * size > MAX_HEADER_BYTES - self._at:
            raise ValueError(f"its header counts {count} {what}")
        return count

    def text(self, limit: int = MAX_HEADER_BYTES) -> str:
        length = self.number("Q")
        if length > limit:
            raise ValueError(f"its header has a text of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"its header has a text that is not UTF-8 ({error.reason})") from None

    def value(self, key: str) -> Any:
        """A value of the metadata, with its type before it."""
        code = self.number("I")
        if code == _ARRAY:
            return self._array(key)
        return self._scalar(key, code)

    def _scalar(self, key: str, code: int) -> Any:
        if code == _STRING:
            return self.text()
        if code not in _SCALARS:
            raise ValueError(f"metadata {short_repr(key)} is of the unknown type {code}")
        return self.number(_SCALARS[code])

    def _array(self, key: str) -> Any:
        code, count = self.number("I"), self.number("Q")
        if code == _STRING:
            return [self.text() for _ in range(self.plausible(count, 8, "texts"))]
        form = _SCALARS.get(code, "").replace("?", "B")
        if not form:
            raise ValueError(f"metadata {short_repr(key)} is an array of the type {code}, which cannot be read")
        values = array.array(form)
        values.frombytes(self.take(self.plausible(count, values.itemsize, "numbers") * values.itemsize))
        return values

    def tensor(self, name: str) -> TensorInfo:
        """The description of one tensor, after its name."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {short_repr(name)} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        if not 0 < math.prod(shape) < 2**63:
            raise ValueError(f"tensor {short_repr(name)} has the shape {short_repr(list(reversed(shape)))}")
        return TensorInfo(tuple(reversed(shape)), self.number("I"), self.number("Q"))

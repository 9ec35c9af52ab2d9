"""The lines of a file, and what they say about their encoding."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from typing import IO

from headrace.client.batch.errors import Fault, InvalidBatch
from headrace.client.batch.formats.tables import TableRows, unreadable
from headrace.client.wire.errors import InvalidRequest

#: The longest line. A request at all its limits is shorter, even with every character escaped.
MAX_LINE_BYTES = 2**20
BOM = b"\xef\xbb\xbf"


def read_lines(file: IO[bytes]) -> TableRows:
    """The lines, without a byte order mark at the start. A line that is too long is cut off after `MAX_LINE_BYTES` + 1.

    Raises:
        InvalidBatch: the text is not in UTF-8, or the file cannot be read to its end, for example because it is an
            incomplete gzip file.
    """
    return TableRows(None, _lines(file))


def _lines(file: IO[bytes]) -> Iterator[bytes | InvalidRequest]:
    number = 0
    try:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                check_encoding(line[:4])
                line = line.removeprefix(BOM) or b"\n"
                if b"\r" in line and not line.endswith(b"\n"):
                    yield InvalidRequest("line", "line ends that are CR alone", "LF or CR LF; convert: tr '\\r' '\\n'")
                    return
            yield line
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)
    except (EOFError, OSError, zlib.error) as error:
        reason = f"the file cannot be read any further: {error}"
        raise InvalidBatch([Fault(number + 1, "line", reason)]) from None


def check_encoding(start: bytes) -> None:
    """Refuse a text that begins like UTF-16 or UTF-32. Raises InvalidBatch."""
    encoding = json.detect_encoding(start).removesuffix("-sig")
    if encoding != "utf-8":
        name = encoding.upper()
        raise unreadable(0, f"it is text in {name}; expected UTF-8; convert it: iconv -f {name} -t UTF-8")


def check_start(file: IO[bytes]) -> None:
    """`check_encoding` of a file that is at its start. Raises InvalidBatch."""
    if isinstance(file, io.BufferedReader):
        check_encoding(file.peek(4)[:4])

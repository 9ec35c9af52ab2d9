"""The formats of outputs, chosen by the extension or by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from headrace.client.batch.folders import LocalFolder, RemoteFolder
from headrace.client.batch.formats.arrow_parts import ArrowParts
from headrace.client.batch.formats.line_parts import LineParts
from headrace.client.batch.formats.lines import FlatJsonLines, JsonLines, LineFormat, SeparatedLines
from headrace.client.batch.output_file import OutputFile
from headrace.client.batch.part_files import PartFiles
from headrace.client.batch.row_file import RowFile
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import show

#: Columns of the input that go to the output -> their types: those of pyarrow, their names, or `json`.
Passed = Mapping[str, Any]

#: Formats with one flat row for each request.
FLAT = ("flat", "csv", "tsv", "parquet", "arrow")
#: The formats of outputs: `openai` has the lines of the Batch API, `flat` has flat rows as JSON lines.
OUTPUTS = ("openai", *FLAT)
#: Formats whose columns have types. They are written as a directory of parts.
TYPED = ("parquet", "arrow")


def output_format(path: str | Path, given: str | None) -> str:
    """The format of an output. Raises InvalidRequest if there is none of this name."""
    extension = PurePosixPath(str(path).removesuffix(".gz")).suffix.removeprefix(".").lower()
    extension = {"feather": "arrow"}.get(extension, extension)
    if given is None or (given == "flat" and extension in FLAT):
        return extension if extension in FLAT else "openai"
    if given not in OUTPUTS:
        raise InvalidRequest("output_format", show(given), f"one of {', '.join(OUTPUTS)}")
    return given


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL for fsspec."""
    return isinstance(path, str) and "://" in path


def line_format(name: str | None, passed: Passed) -> LineFormat:
    """A format of lines. Raises InvalidRequest for one that has none."""
    if name in TYPED:
        raise InvalidRequest("output_format", show(name), "a directory for it, or one of openai, flat, csv, tsv")
    if name in ("csv", "tsv"):
        return SeparatedLines(passed, "," if name == "csv" else "\t")
    return FlatJsonLines(passed) if name == "flat" else JsonLines()


def output_file(path: str | Path, given: str | None, passed: Passed) -> OutputFile:
    """The file or directory of an output.

    Args:
        path: of it, or a URL that fsspec opens: then it has parts, since nothing can be appended there.
        given: the name of the format; by default what the extension says.
        passed: the columns of the input that flat rows have, and their types.

    Raises:
        InvalidRequest: there is no such format, or a package for it is not installed.
        OutputRefused: no file system opens the URL.
    """
    name = output_format(path, given)
    folder = RemoteFolder(str(path)) if is_remote(path) else LocalFolder(Path(path))
    if name in TYPED:
        return PartFiles(folder, ArrowParts(name, passed))
    form = line_format(name, passed)
    if isinstance(folder, RemoteFolder):
        return PartFiles(folder, LineParts(name if name in ("csv", "tsv") else "jsonl", form))
    return RowFile(Path(path), form)

"""The files of an input: one, or those of a directory, a pattern or a data set; local, or what fsspec opens."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from headrace.client.batch.errors import Fault, InvalidBatch
from headrace.client.batch.folders import import_fsspec, remote_reason
from headrace.client.batch.formats.readers import READERS, format_of
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.unicode import printable

#: The file of a directory that `datasets` saved, and the one of several of them.
STATE, SPLITS = "state.json", "dataset_dict.json"


class InputFile(NamedTuple):
    """A file of the input.

    Attributes:
        name: for errors.
        open: opens it, at its start, decompressed.
    """

    name: str
    open: Callable[[], IO[bytes]]


class InputFiles(NamedTuple):
    """The files of an input, in the order of their names, and their format."""

    files: list[InputFile]
    format: str


def find_files(path: str | Path, given: str | None) -> InputFiles:
    """The files of a path: of one file, of a directory, or of a pattern such as `part-*.csv`.

    Args:
        path: a path, or a URL that fsspec opens.
        given: the name of the format; by default what the extension says.

    Raises:
        InvalidBatch: there is no such file, or the files have different formats.
        InvalidRequest: there is no such format, or fsspec is not installed.
    """
    place: _Place = _Remote(path) if isinstance(path, str) and "://" in path else _Local(Path(path))
    names = place.names()
    if names is None:  # one file
        file = InputFile(place.base, lambda: place.open(None))
        return InputFiles([file], "json" if given is None and _is_array(file) else format_of(str(path), given))
    if SPLITS in names:
        splits = [str(name) for name in _state(path, place, SPLITS, "splits")] or ["train"]
        shown, first = ", ".join(splits), f"{str(path).rstrip('/')}/{splits[0]}"
        raise refused(path, f"it is several data sets; expected one of them ({shown}), for example {first}")
    if STATE in names:
        known, given = set(names), given or "arrow"
        names = [entry.get("filename") for entry in _state(path, place, STATE, "_data_files")]
        if missing := [name for name in names if name not in known]:
            raise refused(
                path, f"{STATE} names files that are not there ({printable(str(missing[0]))[:80]}); copy them too"
            )
    names = [name for name in names if not name.startswith((".", "_"))]
    if not names:
        raise refused(path, "it has no files")
    formats = {format_of(name, given) for name in names}
    if len(formats) > 1 or any(Path(name).suffix.removeprefix(".") not in _known() for name in names if given is None):
        shown = ", ".join(names[:5])
        raise refused(path, f"its files have different formats ({shown}); expected one format, or --format for all")
    files = [InputFile(name, lambda name=name: place.open(name)) for name in names]  # type: ignore[misc]
    return InputFiles(files, formats.pop())


def _is_array(file: InputFile) -> bool:
    """Whether a file that ends in `.json` has an array of objects, not lines: no line of a request begins like this."""
    if not file.name.lower().removesuffix(".gz").endswith(".json"):
        return False
    with file.open() as opened, contextlib.suppress(OSError, EOFError, zlib.error):
        return re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", opened.read(4096)) is not None
    return False


def is_in_input(path: Path, source: object) -> bool:
    """Whether a path is the input of a batch, or in the directory or the pattern that is its input."""
    if not isinstance(source, (str, Path)):
        return False
    own, given = os.path.realpath(path), os.path.realpath(source)
    return own == given or os.path.dirname(own) == given or (glob.has_magic(given) and fnmatch.fnmatchcase(own, given))


def _state(path: str | Path, place: _Place, name: str, field: str) -> list[Any]:
    """The list in this field of a file that `datasets` wrote. Raises InvalidBatch."""
    try:
        with place.open(name) as file:
            return list(json.load(file)[field])
    except (ValueError, LookupError, TypeError) as error:
        raise refused(path, f"{name} is not one of `datasets` ({printable(str(error))}); give its files") from None


def _known() -> set[str]:
    return {*READERS, "jsonl", "gz", "ndjson"} - {"json"}


def refused(path: str | Path, reason: str) -> InvalidBatch:
    """The error of an input that cannot be read."""
    return InvalidBatch([Fault(0, "input", f"{printable(str(path))} cannot be read: {reason}")])


class _Local:
    """A path of this machine."""

    def __init__(self, path: Path) -> None:
        self._path, self.base = path, path.name

    def names(self) -> list[str] | None:
        """The names of the files of a directory or pattern; None for a file."""
        try:
            if self._path.is_dir():
                return sorted(each.name for each in self._path.iterdir() if each.is_file())
            if glob.has_magic(str(self._path)) and not self._path.exists():
                names = sorted(Path(each).name for each in glob.glob(str(self._path)) if Path(each).is_file())
                if names:
                    self._path = self._path.parent
                    return names
        except (OSError, ValueError):  # opening it says why
            return None
        return None

    def open(self, name: str | None) -> IO[bytes]:
        path = self._path if name is None else self._path / name
        try:
            return open_lines(path)
        except (OSError, ValueError) as error:
            raise refused(path, getattr(error, "strerror", None) or printable(str(error))) from None


class _Remote:
    """A URL that fsspec opens."""

    def __init__(self, url: str) -> None:
        self._url, self._base = url, url
        self.base = PurePosixPath(url).name
        self._files: Any = None
        self._path = ""

    def names(self) -> list[str] | None:
        def listed() -> list[str] | None:
            self._files, self._path = import_fsspec(self._url).core.url_to_fs(self._url)
            if glob.has_magic(self._url):
                pattern, self._path = self.base, self._path.rsplit("/", 1)[0]
            elif self._url.startswith(("http://", "https://")) or not self._files.isdir(self._path):
                return None
            else:
                pattern = "*"
            found = (str(path).rsplit("/", 1)[-1] for path in self._files.find(self._path, maxdepth=1))
            return sorted(name for name in found if fnmatch.fnmatchcase(name, pattern))

        names = self._call(listed)
        if names == []:
            raise refused(self._url, "no file has such a name")
        return cast("list[str] | None", names)

    def open(self, name: str | None) -> IO[bytes]:
        path = self._path if name is None else f"{self._path}/{name}"
        return cast("IO[bytes]", self._call(lambda: unzipped(io.BufferedReader(self._files.open(path, "rb")))))

    def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except InvalidRequest:
            raise
        except Exception as error:  # each file system of fsspec has errors of its own
            raise refused(self._url, remote_reason(error)) from None


_Place = _Local | _Remote


def open_lines(path: Path) -> IO[bytes]:
    """Open a file for reading. It is decompressed if its content is gzip, whatever its name."""
    return unzipped(path.open("rb"))


def unzipped(file: io.BufferedReader) -> IO[bytes]:
    """The file, decompressed if its content is gzip."""
    with contextlib.ExitStack() as opened:
        opened.callback(file.close)
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        opened.pop_all()
    return cast("IO[bytes]", _Unzipped(file)) if zipped else file


class _Unzipped(gzip.GzipFile):
    """A GzipFile that also closes the file which it reads."""

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._zipped_file = file

    def close(self) -> None:
        super().close()
        self._zipped_file.close()

"""The rows of a batch: read from files, standard input or any iterable, and all checked before the first is queued.

A line is a request in the form of the OpenAI Batch API, or simply `{"prompt": ..., parameters}`, or with `text` a
prompt as it stands. Memory does not grow with the file: what has to be known of all rows lies in temporary files.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import io
import json
import struct
import tempfile
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from headrace.client.wire.errors import Fault, InputChanged, InvalidBatch, InvalidRequest
from headrace.config.settings import slug

#: The longest line; a request at all its limits takes less, written with an escape for every character.
MAX_LINE_BYTES = 2**20
#: Faults that are listed; the rest are counted.
MAX_FAULTS = 100
MAX_CUSTOM_ID = 512
#: Files over which an index is spread: one of them is in memory at a time, some 25 MB for ten million rows.
BUCKETS, BUCKET_BYTES_IN_MEMORY = 64, 2**16

ENDPOINT = "/v1/completions"
_BATCH_KEYS = ("custom_id", "method", "url", "body")
#: Fields of the OpenAI API that change nothing here, and the values that say so.
_IDLE: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "user": lambda value, _: isinstance(value, str),
    "stream": lambda value, _: value is False,
    "best_of": lambda value, body: value == body.get("n", 1),
}

Say = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """A request of a batch.

    Attributes:
        line: its line in the input, from 1; of an iterable, its place in it.
        custom_id: the name it has in input and output.
        fields: what `Client.submit` takes, the seed included.
        digest: 16 hexadecimal digits; equal for rows that must come to the same result.
    """

    line: int
    custom_id: str
    fields: dict[str, Any]
    digest: str

    def job_id(self, run: str) -> str:
        """The job's id: the same in every process that works on the run, so a job that is there is found again."""
        return f"{run}.{_digest(self.fields | {'custom_id': self.custom_id})}"


class RowReader:
    """Makes rows of lines.

    Args:
        model_name: where rows go that name no model.
        params: for all rows that do not say otherwise.
        text: lines are prompts.
        models: the models that rows may name; None is any.
    """

    def __init__(
        self, model_name: str, params: Mapping[str, Any], *, text: bool = False, models: Collection[str] | None = None
    ) -> None:
        self._model_name, self._params, self._text, self._models = model_name, params, text, models

    def read(self, line: int, item: Any) -> Row | None:
        """The row in a line (bytes) or an item of an iterable; None if the line is blank.

        Raises:
            InvalidRequest: what can be seen here is wrong. Parameters are left to `Client.submit`'s own check.
        """
        if isinstance(item, bytes):
            item = self._decode(item, first=line == 1)
            if item is None:
                return None
        custom_id, own = _shape(plain(item))
        fields = {name: value for name, value in {**self._params, **own}.items() if value is not None}
        if "stream" in fields:
            raise InvalidRequest("stream", repr(fields["stream"])[:80], "no such parameter; a file takes whole results")
        model = self._model(fields)
        content = {name: value for name, value in fields.items() if name not in ("priority", "timeout_s")}
        name = f"row-{line}" if custom_id is None else custom_id
        digest = _digest({**content, "custom_id": name, "model": model})
        # Taken from the content, so that whoever computes the row, and whenever, draws the same numbers.
        return Row(line, name, {"priority": "bulk", "seed": int(digest[:13], 16), **fields}, digest)

    def _decode(self, raw: bytes, *, first: bool) -> Any:
        """The line as Python: a text, or what its JSON says; None if it is blank."""
        if len(raw) > MAX_LINE_BYTES:
            raise InvalidRequest("line", f"more than {MAX_LINE_BYTES} bytes", "a shorter line")
        try:
            line = raw.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidRequest("line", f"bytes that are no UTF-8 at {error.start}", "text in UTF-8") from None
        if not line.strip():
            return None
        if self._text:
            return line
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest("line", f"no JSON ({error})", "a JSON object; plain text lines need --text") from None

    def _model(self, fields: dict[str, Any]) -> str:
        named = fields.get("model")
        if not isinstance(named, str) or not named:  # what is no name is refused by the check of the request
            return self._model_name
        model = slug(named)
        if self._models is not None and model not in self._models:
            raise InvalidRequest("model", repr(model)[:80], f"one that is served: {', '.join(sorted(self._models))}")
        return model


def plain(item: Any) -> Any:
    """An item of a table's column as Python: what pyarrow, numpy and pandas wrap, unwrapped."""
    for method in ("as_py", "tolist"):
        if hasattr(item, method) and not isinstance(item, (str, bytes)):
            return getattr(item, method)()
    return item


def is_column(value: Any) -> bool:
    """Whether it can be iterated, be it only by its places, and is no single row."""
    if isinstance(value, (str, bytes, Mapping)):
        return False
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _shape(item: Any) -> tuple[str | None, dict[str, Any]]:
    """The custom id, if there is one, and the parameters, whichever form the row has."""
    if isinstance(item, (str, list, tuple)):
        return None, {"prompt": list(item) if isinstance(item, tuple) else item}
    if not isinstance(item, Mapping):
        raise InvalidRequest("line", f"a {type(item).__name__}", "an object with `prompt`, or one of the Batch API")
    fields = {name: plain(value) for name, value in item.items()}
    if not fields.keys() & {"method", "url", "body"}:
        custom_id = fields.pop("custom_id", None)
        if "id" in fields:
            raise InvalidRequest("id", repr(fields["id"])[:80], "custom_id, the name of a row")
        return _check_custom_id(custom_id) if custom_id is not None else None, fields
    if unknown := [name for name in fields if name not in _BATCH_KEYS]:
        raise InvalidRequest(str(unknown[0])[:80], "a field", f"only {', '.join(_BATCH_KEYS)} beside each other")
    if fields.get("method", "POST") != "POST" or fields.get("url", ENDPOINT) != ENDPOINT:
        got = f"{fields.get('method', 'POST')} {fields.get('url', ENDPOINT)}"
        raise InvalidRequest("url", repr(got)[:80], f"'POST {ENDPOINT}'")
    if not isinstance(fields.get("body"), Mapping):
        raise InvalidRequest("body", f"a {type(fields.get('body')).__name__}", "an object with prompt and parameters")
    return _check_custom_id(fields.get("custom_id")), completion_fields(fields["body"])


def completion_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body of the completions API as what `Client.submit` takes, without the fields that change nothing."""
    fields = {name: plain(value) for name, value in body.items()}
    idle = [n for n, check in _IDLE.items() if n in fields and (fields[n] is None or check(fields[n], fields))]
    return {name: value for name, value in fields.items() if name not in idle}


def _check_custom_id(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CUSTOM_ID or not _is_unicode(value):
        raise InvalidRequest("custom_id", repr(value)[:80], f"text of 1 to {MAX_CUSTOM_ID} characters")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _digest(content: dict[str, Any]) -> str:
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=_unwrapped)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest("line", f"what JSON cannot hold ({error})", "texts, numbers, and lists of them") from None
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _unwrapped(value: Any) -> Any:
    """For json: what an array or a scalar of a table holds."""
    held = plain(value)
    if held is value:
        raise TypeError(f"a {type(value).__name__}")
    return held


# --- where items come from ---------------------------------------------------------------------------------------


class Source(Protocol):
    """Something that can be read twice: numbered lines or items."""

    def items(self) -> Iterator[tuple[int, Any]]:
        """Line numbers from 1, each with its bytes (or with any object, of an iterable), from the start."""
        ...


class FileSource:
    """Lines of a file, gzipped or not, which can be read again."""

    def __init__(self, opened: Callable[[], IO[bytes]]) -> None:
        self._opened = opened

    def items(self) -> Iterator[tuple[int, Any]]:
        with self._opened() as file:
            yield from numbered_lines(file)


class IterableSource:
    """Items of a list, a data set or a column, which can be iterated again."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def items(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self._items, 1)


def open_source(source: str | Path | IO[bytes] | Iterable[Any]) -> Source:
    """A source that can be read twice; what can be read once only (a pipe, a generator) is copied to a temporary file.

    Raises:
        InvalidBatch: the file is not there or cannot be read.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        try:
            if not path.is_file() and path.exists():  # a pipe with a name
                with path.open("rb") as pipe:
                    return _spooled(iter(lambda: pipe.read(2**16), b""))
            open_lines(path).close()
        except OSError as error:
            raise InvalidBatch([Fault(0, "input", f"{path} cannot be read: {error.strerror or error}")]) from None
        return FileSource(lambda: open_lines(path))
    if not is_column(source):
        raise InvalidRequest("source", f"a {type(source).__name__}", "a path, a file, or an iterable of prompts")
    if hasattr(source, "read"):
        file = cast("IO[bytes]", source)
        return _spooled(iter(lambda: file.read(2**16), b""))
    if iter(source) is source:
        return _spooled(_json_line(item) for item in source)
    return IterableSource(source)


def _json_line(item: Any) -> bytes:
    item = plain(item)
    try:
        return json.dumps(item, default=_unwrapped).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            "prompts", f"an item of type {type(item).__name__}", f"what JSON can hold ({error})"
        ) from None


def _spooled(pieces: Iterable[bytes]) -> Source:
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        for piece in pieces:
            copy.write(piece)
    except BaseException:
        copy.close()
        raise

    def rewound() -> IO[bytes]:
        copy.seek(0)
        return _unzipped(io.BufferedReader(_Kept(copy)))

    source = FileSource(rewound)
    weakref.finalize(source, copy.close)
    return source


class _Kept(io.RawIOBase):
    """A file that stays open when its reader is closed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def open_lines(path: Path) -> IO[bytes]:
    """A file for reading lines, unzipped if it is gzip, whatever its name."""
    return _unzipped(path.open("rb"))


def _unzipped(file: io.BufferedReader) -> IO[bytes]:
    zipped = file.peek(2)[:2] == b"\x1f\x8b"
    return cast("IO[bytes]", _Unzipped(file)) if zipped else file


class _Unzipped(gzip.GzipFile):
    """Reads a gzip file, and closes it when it is closed, which GzipFile leaves to its maker."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._zipped_file = file

    def close(self) -> None:
        super().close()
        self._zipped_file.close()


def numbered_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; of one that is too long, its beginning. A torn gzip file raises InvalidBatch."""
    number = 0
    try:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            yield number, line
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise InvalidBatch([Fault(number + 1, "line", f"the file cannot be read on: {error}")]) from None


# --- checking ------------------------------------------------------------------------------------------------------


class Index:
    """Rows by custom id, any number of them: spread over temporary files by a hash of 64 bits.

    Two different ids are taken for one with a probability of 3 in a million among ten million.
    """

    _ENTRY = struct.Struct("<QQQ")

    def __init__(self) -> None:
        self._files = [tempfile.SpooledTemporaryFile(BUCKET_BYTES_IN_MEMORY) for _ in range(BUCKETS)]  # noqa: SIM115
        for file in self._files:
            weakref.finalize(self, file.close)

    def add(self, custom_id: str, digest: str, line: int) -> None:
        """Note a row; `digest` may be empty where it is not known."""
        key = int.from_bytes(
            hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
        )
        self._files[key % BUCKETS].write(self._ENTRY.pack(key, int(digest or "0", 16), line))

    def duplicates(self) -> Iterator[tuple[int, int]]:
        """Lines whose custom id stands in an earlier line, and that line."""
        for entries in self._parts():
            first: dict[int, int] = {}
            for key, _, line in entries:
                if first.setdefault(key, line) != line:
                    yield line, first[key]

    def matches(self, other: Index) -> Iterator[tuple[int, bool]]:
        """The lines of rows that are also in `other`, and whether their digests agree (or one is not known)."""
        for mine, theirs in zip(self._parts(), other._parts(), strict=True):
            known = {key: digest for key, digest, _ in theirs}
            for key, digest, line in mine:
                if key in known:
                    yield line, known[key] in (0, digest)

    def _parts(self) -> Iterator[Iterator[tuple[int, int, int]]]:
        for file in self._files:
            file.seek(0)
            yield cast("Iterator[tuple[int, int, int]]", self._ENTRY.iter_unpack(file.read()))
            file.seek(0, io.SEEK_END)


class Faults:
    """The first faults by line, and how many there are."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Fault]] = []
        self.count = 0

    def add(self, line: int, field: str, message: str) -> None:
        self.count += 1
        entry = (-line, -self.count, Fault(line, field, message))
        if len(self._heap) < MAX_FAULTS:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def raise_if_any(self) -> None:
        """Raises InvalidBatch with those that were kept."""
        if self.count:
            raise InvalidBatch([fault for *_, fault in sorted(self._heap, reverse=True)], self.count)


@dataclass
class Checked:
    """What the first reading found: how many rows and lines there are, and the rows by custom id."""

    rows: int
    lines: int
    index: Index


def check(
    source: Source,
    reader: RowReader,
    validate: Callable[[dict[str, Any]], object],
    *,
    limit: int | None = None,
    on_line: Say | None = None,
) -> Checked:
    """Read everything once and see that each row can be queued and that no two have the same name.

    Args:
        validate: raises InvalidRequest for fields that `Client.submit` would refuse.
        limit: rows after so many are not looked at.
        on_line: called now and then with the number of lines read.

    Raises:
        InvalidBatch: with the first MAX_FAULTS faults.
    """
    found, faults = Checked(0, 0, Index()), Faults()
    for line, item in source.items():
        if found.rows == limit:
            break
        found.lines = line
        if on_line is not None and line % 1000 == 0:
            on_line(line)
        try:
            row = reader.read(line, item)
            if row is None:
                continue
            found.rows += 1
            found.index.add(row.custom_id, row.digest, line)
            validate(dict(row.fields))
        except InvalidRequest as error:
            faults.add(line, error.field, str(error))
    for line, first in found.index.duplicates():
        faults.add(line, "custom_id", f"custom_id: the same as in line {first}; expected one that no other line has")
    if not found.rows and not faults.count:
        faults.add(0, "input", "the input holds no rows")
    faults.raise_if_any()
    return found


def read_rows(source: Source, reader: RowReader, *, limit: int | None = None) -> Iterator[Row]:
    """The rows of a source that was checked. Raises InputChanged where it is not what it was."""
    count = 0
    for line, item in source.items():
        if count == limit:
            return
        try:
            row = reader.read(line, item)
        except InvalidRequest as error:
            raise InputChanged(line, str(error)) from None
        if row is not None:
            count += 1
            yield row

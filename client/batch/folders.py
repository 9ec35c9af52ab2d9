"""Folders for outputs in parts: of this machine, or of any file system that fsspec opens."""

from __future__ import annotations

import io
import json
import os
import secrets
from pathlib import Path
from typing import IO, Any, Protocol

from headrace.client.batch.errors import OutputRefused, as_refusal
from headrace.client.batch.run_file import read_run
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.unicode import printable
from headrace.client.wire.values import show
from headrace.extras import how_to_install


class Folder(Protocol):
    """Where parts are. Each method raises OutputRefused."""

    def names(self) -> list[str]:
        """The names of its files; none if it does not exist."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write a file, which appears complete or not at all."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file."""
        ...


class LocalFolder:
    """A folder of this machine. A file is on disk when it appears."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        with as_refusal(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise OutputRefused(f"{printable(str(self.path))} is a file; expected a directory or a new name")
            return sorted(os.listdir(self.path)) if self.path.exists() else []

    def open(self, name: str) -> IO[bytes]:
        with as_refusal(self.path):
            return (self.path / name).open("rb")

    def write(self, name: str, data: bytes) -> None:
        staged = self.path / f".{name}.tmp"  # readers of such directories ignore names that begin with a dot
        with as_refusal(self.path):
            self.path.mkdir(exist_ok=True)
            with staged.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(self.path / name)
            directory = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def delete(self, name: str) -> None:
        with as_refusal(self.path):
            (self.path / name).unlink(missing_ok=True)


class RemoteFolder:
    """A folder of a file system that fsspec opens.

    A file is sent in one request: in an object store it appears complete or not at all.

    Raises:
        InvalidRequest: fsspec is not installed.
        OutputRefused: no file system opens this URL.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._files, self._path = self._call("opened", lambda: import_fsspec(url).core.url_to_fs(url))

    def __str__(self) -> str:
        return self._url

    def names(self) -> list[str]:
        def listed() -> list[str]:
            self._files.invalidate_cache()
            return sorted(str(path).rsplit("/", 1)[-1] for path in self._files.find(self._path, maxdepth=1))

        return list(self._call("listed", listed))

    def open(self, name: str) -> IO[bytes]:
        return io.BytesIO(self._call("read", lambda: self._files.cat_file(f"{self._path}/{name}")))

    def write(self, name: str, data: bytes) -> None:
        # No `makedirs`: for a bucket that does not exist it would make one.
        self._call("written", lambda: self._files.pipe_file(f"{self._path}/{name}", data))

    def delete(self, name: str) -> None:
        self._call("changed", lambda: self._files.rm_file(f"{self._path}/{name}"))

    def _call(self, verb: str, function: Any) -> Any:
        try:
            return function()
        except (InvalidRequest, OutputRefused):
            raise
        except FileNotFoundError as error:
            if verb == "listed":
                return []
            raise self._refused(verb, error) from error
        except Exception as error:  # each file system of fsspec has errors of its own
            raise self._refused(verb, error) from error

    def _refused(self, verb: str, error: Exception) -> OutputRefused:
        return OutputRefused(f"{printable(self._url)} cannot be {verb}: {remote_reason(error)}")


def import_fsspec(url: str) -> Any:
    """The module `fsspec`. Raises InvalidRequest that names the URL if it is not installed."""
    try:
        import fsspec
    except ImportError:
        raise InvalidRequest("path", show(url), f"a path; for a URL: {how_to_install('tables')}") from None
    return fsspec


def remote_reason(error: Exception) -> str:
    """Why a file system refused, and what to check."""
    name = type(error).__name__
    text = printable(str(error) or name)
    if isinstance(error, ImportError):
        return f"{text}; install it where headrace runs"
    if isinstance(error, PermissionError) or "Credentials" in name or "Forbidden" in text or "AccessDenied" in text:
        return f"{text}; check the credentials of this machine and what they may do there"
    if isinstance(error, FileNotFoundError):
        return f"{text}: no such file or bucket; check the name"
    return text


class RemoteRun:
    """The id of the run that writes to a remote folder, in a file of it; see `RunFile`. There is no lock.

    Raises:
        OutputRefused: the folder cannot be read or written.
    """

    NAME = "_headrace.run"

    def __init__(self, folder: RemoteFolder) -> None:
        self._folder = folder
        self.run = read_run(folder.open(self.NAME).read()) if self.NAME in folder.names() else ""
        self.existed = bool(self.run)
        if not self.existed:
            self.renew()

    def renew(self) -> None:
        """Give the run another id."""
        self.run = secrets.token_hex(6)
        self._folder.write(self.NAME, json.dumps({"run": self.run}).encode())

    def remove(self) -> None:
        """Remove the file: the output is complete, or was not begun."""
        self._folder.delete(self.NAME)

    def close(self) -> None:
        """There is no lock to release."""

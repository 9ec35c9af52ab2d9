"""Uploaded files and those that batches write, in a directory: `<id>` holds the bytes, `<id>.json` what is said of it.

A file without its `.json` does not exist yet, or any more. Methods block; any thread may call them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from headrace.client.http.errors import ApiError, not_found
from headrace.client.wire.errors import HeadraceError

#: Files are kept for so long, unless they were uploaded with a shorter life; OpenAI's value for batches.
LIFE_S = 30 * 86_400
SHORTEST_LIFE_S = 3_600
#: All files together.
MAX_TOTAL_BYTES = 20 * 2**30
MAX_FILES = 10_000
MAX_FILENAME = 255


class DirectoryInUse(HeadraceError):
    """Raised when another server works in the directory, or nobody may."""


class StoredFile(BaseModel):
    """What is said of a file. `owner` is who may see it; the name of a key's holder, never the key."""

    model_config = ConfigDict(frozen=True)

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int

    def public(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {"object": "file", "status": "processed", **self.model_dump(exclude={"owner"})}


class FileStore:
    """The files in a directory, which is made if it is not there.

    Raises:
        DirectoryInUse: another server works in it, or it cannot be written.
    """

    def __init__(self, directory: Path, max_total_bytes: int = MAX_TOTAL_BYTES) -> None:
        self._max_total_bytes = max_total_bytes
        self._lock = threading.Lock()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory = directory / "files"
            self._directory.mkdir(mode=0o700, exist_ok=True)
            # `close` may run in another thread than this.
            self._holder = FileLock(directory / "lock", mode=0o600, thread_local=False)
            self._holder.acquire(blocking=False)
        except Timeout:  # an OSError too
            raise DirectoryInUse(f"another server works in {directory}; give this one another, --files DIR") from None
        except OSError as error:
            raise DirectoryInUse(f"{error.filename} cannot be written: {error.strerror}") from None
        for part in self._directory.glob("*.part"):  # of an upload that a death cut off
            part.unlink()
        self._files = {file.id: file for file in read_all(self._directory, StoredFile) if self.path(file.id).exists()}

    def close(self) -> None:
        """Let go of the directory."""
        self._holder.release()

    def new_id(self) -> str:
        """An id that no other file has."""
        return f"file-{uuid.uuid4().hex}"

    def path(self, file_id: str) -> Path:
        """Where a file's bytes are. Ids come from here, or were found by `get`."""
        return self._directory / file_id

    def add(self, source: IO[bytes], *, filename: str, owner: str, life_s: int = LIFE_S) -> StoredFile:
        """Keep what was uploaded. Raises ApiError if there is no room."""
        self.check_room()
        file_id = self.new_id()
        part = self._directory / f"{file_id}.part"
        try:
            with part.open("xb") as target:
                shutil.copyfileobj(source, target, 2**20)
                target.flush()
                os.fsync(target.fileno())
            part.replace(self.path(file_id))
            return self.publish(file_id, filename=filename, purpose="batch", owner=owner, life_s=life_s)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ApiError(507, "no_room", f"the file cannot be kept: {error.strerror}") from error

    def publish(self, file_id: str, *, filename: str, purpose: str, owner: str, life_s: int = LIFE_S) -> StoredFile:
        """Let a file be seen that was written to its place."""
        now, size = int(time.time()), self.path(file_id).stat().st_size
        name = re.sub(r"[^\w .()+-]", "_", filename)[:MAX_FILENAME] or "file"
        file = StoredFile(
            id=file_id, owner=owner, filename=name, purpose=purpose, bytes=size, created_at=now, expires_at=now + life_s
        )
        write_json(self._directory / f"{file_id}.json", file.model_dump())
        with self._lock:
            self._files[file_id] = file
        return file

    def check_room(self) -> None:
        """Raises ApiError if the directory holds all it may."""
        with self._lock:
            count = len(self._files)
        with os.scandir(self._directory) as entries:
            total = sum(entry.stat().st_size for entry in entries)
        if count >= MAX_FILES or total >= self._max_total_bytes:
            raise ApiError(507, "no_room", "there is no room for more files; delete some")

    def get(self, file_id: str, owner: str) -> StoredFile:
        """A file of the owner's. Raises ApiError."""
        with self._lock:
            file = self._files.get(file_id)
        if file is None or file.owner != owner:
            raise not_found("file", file_id[:80])
        return file

    def owned_by(self, owner: str) -> list[StoredFile]:
        """The owner's files, oldest first."""
        with self._lock:
            files = [file for file in self._files.values() if file.owner == owner]
        return sorted(files, key=lambda file: (file.created_at, file.id))

    def delete(self, file_id: str) -> None:
        """Forget a file and remove it."""
        with self._lock:
            self._files.pop(file_id, None)
        (self._directory / f"{file_id}.json").unlink(missing_ok=True)
        self.path(file_id).unlink(missing_ok=True)

    def sweep(self, needed: Collection[str]) -> None:
        """Delete what has expired and is not needed."""
        now = time.time()
        with self._lock:
            expired = [file.id for file in self._files.values() if file.expires_at < now and file.id not in needed]
        for file_id in expired:
            self.delete(file_id)


M = TypeVar("M", bound=BaseModel)


def read_all(directory: Path, kind: type[M]) -> Iterator[M]:
    """What the JSON files of a directory say; those that say something else are passed over."""
    for path in directory.glob("*.json"):
        with contextlib.suppress(OSError, ValidationError):
            yield kind.model_validate_json(path.read_bytes())


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a file in one step: after a death it has the old content or the new."""
    staged = path.with_suffix(".tmp")
    with staged.open("w") as file:
        json.dump(fields, file)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)

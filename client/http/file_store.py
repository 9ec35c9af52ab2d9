"""Uploaded files and output files of batches, in one directory: `<id>` is the content, `<id>.json` the metadata.

A file exists as soon as, and only while, its `.json` exists. Methods block and are thread-safe.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import structlog
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict

from headrace.client.http.errors import ApiError, not_found
from headrace.client.wire.errors import HeadraceError
from headrace.client.wire.unicode import printable
from headrace.config.directories import UnsafeDirectory, make_private

log = structlog.get_logger("headrace.http")

#: Seconds until a file is deleted, unless it was uploaded with a shorter `expires_after`. OpenAI's value for batches.
RETENTION_S = 30 * 86_400
MIN_RETENTION_S = 3_600
#: Default limit for the size of all files together, in bytes.
MAX_TOTAL_BYTES = 20 * 2**30
MAX_FILES = 10_000
MAX_FILENAME = 255


class DirectoryInUse(HeadraceError):
    """Raised when another server uses the directory, or the directory is not writable."""


class StoredFile(BaseModel):
    """Metadata of a file. `owner` identifies the API key that may see it; it is a digest, never the key."""

    model_config = ConfigDict(frozen=True)

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int
    #: Nanoseconds at which it was created: the order of files of one second. Servers before it did not store it.
    created_ns: int = 0

    def public(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {"object": "file", "status": "processed", **self.model_dump(exclude=PRIVATE_FILE_FIELDS)}


#: Fields of a file that are stored and not shown.
PRIVATE_FILE_FIELDS = {"owner", "created_ns"}


class FileStore:
    """The files in `directory`, which is created if it does not exist and locked until `close`.

    Args:
        max_total_bytes: no file is accepted once all files together reach this size.

    Raises:
        DirectoryInUse: another server uses the directory, it is not writable, or other users can write what is in it.
    """

    def __init__(self, directory: Path, max_total_bytes: int = MAX_TOTAL_BYTES) -> None:
        self._max_total_bytes = max_total_bytes
        self._lock = threading.Lock()
        self._uploads: dict[str, int] = {}  # files that are being written -> their size
        self._readers: Counter[str] = Counter()  # files that are being read -> by how many
        self._deleted: set[str] = set()  # files that were deleted while they were read; their content still exists
        try:
            self._directory = directory / "files"
            for place in (self._directory, directory / "batches"):
                make_private(place, group_may_write=True)
            # Not thread-local: the application closes the store in another thread than the one that opened it.
            self._directory_lock = FileLock(directory / "lock", mode=0o600, thread_local=False)
            self._directory_lock.acquire(blocking=False)
        except Timeout:  # a subclass of OSError
            raise DirectoryInUse(
                f"another server uses {directory}; choose another directory with --files DIR"
            ) from None
        except UnsafeDirectory as error:
            raise DirectoryInUse(str(error)) from None
        except OSError as error:
            raise DirectoryInUse(f"{error.filename} cannot be written: {error.strerror}") from None
        for pattern in ("*.part", "*.tmp"):  # what was being written when the server died
            for part in self._directory.glob(pattern):
                part.unlink()
        self._files = {file.id: file for file in load_all(self._directory, StoredFile) if self.path(file.id).exists()}

    def close(self) -> None:
        """Unlock the directory."""
        self._directory_lock.release()

    def new_id(self) -> str:
        """A new unique file id."""
        return f"file-{uuid.uuid4().hex}"

    def path(self, file_id: str) -> Path:
        """The path of a file's content. The id must come from `new_id` or `get`, never directly from a request."""
        return self._directory / file_id

    def add(self, source: IO[bytes], *, filename: str, owner: str, retention_s: int = RETENTION_S) -> StoredFile:
        """Store an uploaded file. Raises ApiError if there is no space."""
        file_id = self.new_id()
        with self._upload(file_id, source.seek(0, os.SEEK_END)):
            source.seek(0)
            part = self._directory / f"{file_id}.part"
            try:
                with part.open("xb") as target:
                    shutil.copyfileobj(source, target, 2**20)
                    target.flush()
                    os.fsync(target.fileno())
                part.replace(self.path(file_id))
                return self.publish(file_id, filename=filename, purpose="batch", owner=owner, retention_s=retention_s)
            except OSError as error:
                part.unlink(missing_ok=True)
                self.delete(file_id)
                raise ApiError(507, "no_room", f"the file cannot be stored: {error.strerror}") from error

    @contextlib.contextmanager
    def _upload(self, file_id: str, size: int) -> Iterator[None]:
        """Count a file that is being written. Raises ApiError if there is no space for it.

        Without this, files that are uploaded at the same time would all find the space that only one of them can have.
        """
        with self._lock:
            self._check_space()
            self._uploads[file_id] = size
        try:
            yield
        finally:
            with self._lock:
                del self._uploads[file_id]

    def publish(
        self, file_id: str, *, filename: str, purpose: str, owner: str, retention_s: int = RETENTION_S
    ) -> StoredFile:
        """Write the metadata of a file whose content is already at `path(file_id)`, so that clients can see it."""
        created_ns, size = time.time_ns(), self.path(file_id).stat().st_size
        now = created_ns // 10**9
        file = StoredFile(
            id=file_id,
            owner=owner,
            filename=re.sub(r"[^\w .()+-]", "_", filename)[:MAX_FILENAME] or "file",
            purpose=purpose,
            bytes=size,
            created_at=now,
            expires_at=now + retention_s,
            created_ns=created_ns,
        )
        write_json(self._directory / f"{file_id}.json", file)
        with self._lock:
            self._files[file_id] = file
        return file

    def check_space(self) -> None:
        """Raises ApiError if the number or the total size of the files has reached its limit."""
        with self._lock:
            self._check_space()

    def _check_space(self) -> None:
        total = sum(self._uploads.values()) + sum(file.bytes for file in self._files.values())
        with os.scandir(self._directory) as entries:
            for entry in entries:
                file_id = entry.name.partition(".")[0]
                if file_id not in self._uploads and file_id not in self._files:  # the output of a batch, for example
                    with contextlib.suppress(FileNotFoundError):  # it was deleted or renamed since it was listed
                        total += entry.stat().st_size
        count = len(self._files) + sum(file_id not in self._files for file_id in self._uploads)
        if count >= MAX_FILES or total >= self._max_total_bytes:
            raise ApiError(507, "no_room", "no space for more files; delete some")

    def get(self, file_id: str, owner: str) -> StoredFile:
        """Find a file. Raises ApiError if it does not exist or has another owner."""
        with self._lock:
            return self._find(file_id, owner)

    def _find(self, file_id: str, owner: str) -> StoredFile:
        file = self._files.get(file_id)
        if file is None or file.owner != owner:
            raise not_found("file", file_id[:80])
        return file

    def owned_by(self, owner: str) -> list[StoredFile]:
        """All files of one owner, the oldest first."""
        with self._lock:
            files = [file for file in self._files.values() if file.owner == owner]
        return sorted(files, key=lambda file: (file.created_at, file.created_ns, file.id))

    @contextlib.contextmanager
    def reading(self, file_id: str, owner: str) -> Iterator[StoredFile]:
        """Keep the content of a file during the block, even if the file is deleted meanwhile.

        Raises ApiError if the file does not exist, has another owner, or its content was removed from the disk.
        """
        with self._lock:
            file = self._find(file_id, owner)
            if not self.path(file_id).is_file():
                raise ApiError(
                    404, "not_found", f"the content of {file_id} is no longer on the server's disk", param="id"
                )
            self._readers[file_id] += 1
        try:
            yield file
        finally:
            with self._lock:
                self._readers[file_id] -= 1
                if unread := self._readers[file_id] == 0:
                    del self._readers[file_id]
                deleted = unread and file_id in self._deleted
                if deleted:
                    self._deleted.remove(file_id)
            if deleted:
                self.path(file_id).unlink(missing_ok=True)

    def delete(self, file_id: str) -> None:
        """Delete a file; does nothing if it does not exist. Its content remains until nobody reads it."""
        with self._lock:
            self._files.pop(file_id, None)
            is_read = file_id in self._readers
            if is_read:
                self._deleted.add(file_id)
        (self._directory / f"{file_id}.json").unlink(missing_ok=True)
        if not is_read:
            self.path(file_id).unlink(missing_ok=True)

    def delete_unnamed(self, keep: Collection[str]) -> None:
        """Delete content without metadata, except that of the files with an id in `keep`. Call it before uploads begin.

        A server that was killed leaves such content: of an upload that was not complete, of a file that was deleted
        while it was read, or of one whose deletion had begun. Nobody sees it, and it would take space for ever.
        """
        for path in self._directory.glob("file-*"):
            file_id = path.name.partition(".")[0]
            if file_id not in keep and not (self._directory / f"{file_id}.json").exists():
                path.unlink(missing_ok=True)

    def delete_expired(self, keep: Collection[str]) -> None:
        """Delete all expired files except those with an id in `keep`."""
        now = time.time()
        with self._lock:
            expired = [file.id for file in self._files.values() if file.expires_at < now and file.id not in keep]
        for file_id in expired:
            self.delete(file_id)


M = TypeVar("M", bound=BaseModel)


def load_all(directory: Path, kind: type[M]) -> Iterator[M]:
    """Parse all JSON files of a directory. One that cannot be read is left where it is, and named in the log."""
    for path in sorted(directory.glob("*.json")):
        try:
            if path.is_fifo():
                raise ValueError("reading it would wait for a writer")
            record = kind.model_validate_json(path.read_bytes())
            if getattr(record, "id", None) != path.stem:
                raise ValueError("it has another id than its file")
        except (OSError, ValueError) as error:  # pydantic's error is a ValueError
            log.error("record.unreadable", file=printable(path.name), error=type(error).__name__)
        else:
            yield record


def write_json(path: Path, record: BaseModel) -> None:
    """Write a record atomically: after a crash the file has either the old content or the new.

    Raises:
        ValueError: the record could not be read again; nothing was written.
    """
    text = record.model_dump_json()
    type(record).model_validate_json(text)
    staged = path.with_suffix(".tmp")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)  # after ENOSPC it would take the space that remains
        raise

"""Open the files of a model, if only their owner, a trusted group and root can write them. Needs no torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path


class ModelError(Exception):
    """A model cannot be found, read or trusted. The message names the file or tensor and says what to do."""


def check_not_shared(folder: Path, files: Iterable[Path] = ()) -> None:
    """Check that not everybody can write to a model directory or its files, or rename a directory above them.

    Everybody is meant by the permission for others (`o+w`). A group that may write is trusted, because many systems
    give each user a group; so is the owner, whoever that is, because mounted directories often belong to another user.
    What is on a read-only file system cannot be written and passes.

    Raises:
        ModelError: everybody can write one of them; the message names it and the command that mends it.
    """
    for path in (folder, *files):
        resolved = Path(os.path.realpath(path))
        places = {path.absolute(): True, resolved: True, path.absolute().parent: path != folder}
        places |= {resolved.parent: path != folder}
        for parent in (*path.absolute().parents, *resolved.parents):
            places.setdefault(parent, False)
        for place, ours in places.items():
            if _everybody_writes(place, even_sticky=ours):
                raise ModelError(
                    f"{place} can be written by every user of this machine, who could change what the model "
                    f"{folder} answers: run `chmod o-w {place}`, or set HEADRACE_ALLOW_SHARED_MODEL=1 if all users "
                    "are trusted"
                )


def _everybody_writes(place: Path, *, even_sticky: bool) -> bool:
    """Whether other users can write a file, add to a directory, or (without `even_sticky`) rename what is in it."""
    try:
        about = place.stat()
        if not about.st_mode & stat.S_IWOTH or (about.st_mode & stat.S_ISVTX and not even_sticky):
            return False
        return not os.statvfs(place).f_flag & os.ST_RDONLY
    except OSError:
        return False  # reading it fails with a better message


@contextmanager
def open_file(path: Path) -> Iterator[FileIO]:
    """Open a regular file, unbuffered. Raises ModelError, which names the file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not block
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{path}: not a regular file")
    with FileIO(descriptor) as file:
        yield file


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises ModelError, which names the file."""
    data = bytearray()
    with open_file(path) as file:
        try:
            while len(data) <= limit and (part := file.read(min(2**20, limit + 1 - len(data)))):
                data += part
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise ModelError(f"{path}: more than {limit} bytes")
    return bytes(data)

"""A directory that is either complete or does not exist."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from headrace.model.trusted_files import ModelError

#: How the names of directories begin that are not complete yet.
PREFIX = ".headrace-convert-"


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to write into, beside `target`, that gets its name when the block ends without an error.

    Everything is on the disk before the name is given. After an error the directory is deleted; after SIGKILL it
    remains under a name that begins with a dot, until the next directory is made beside it.

    Raises:
        ModelError: there is something under the name already, or the directory cannot be written.
    """
    if os.path.lexists(target):
        raise ModelError(f"{target}: it exists already, and is not overwritten; give another name, or delete it first")
    if not os.path.isdir(target.parent):
        raise ModelError(f"{target}: there is no directory {target.parent}")
    with _named(target):
        _remove_abandoned(target.parent)
        place, lock = _locked(target.parent)
    try:
        with _named(target, place):
            yield place
            for path in (*place.iterdir(), place):
                _sync(path)
            _permit(place)
            if os.path.lexists(target):
                raise ModelError(f"{target}: it was created by somebody else meanwhile")
            place.rename(target)
            _sync(target.parent)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _locked(parent: Path) -> tuple[Path, int]:
    """A new directory, and the descriptor of its lock, which ends with this process."""
    while True:
        place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(place, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.exists():  # else it was taken for an abandoned one before it had its lock
            return place, lock
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove what conversions that were killed have left: the directories of this user that nobody locks."""
    for place in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(place, ignore_errors=True)
            finally:
                os.close(lock)


@contextmanager
def _named(target: Path, place: Path | None = None) -> Iterator[None]:
    """Errors of the operating system, and those of the loader, with the name that the user gave."""
    try:
        yield
    except SafetensorError as error:  # of the operating system, in the library's words
        raise ModelError(f"{target}: it cannot be written ({error}); nothing was left there") from None
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise ModelError(f"{target}: it cannot be written ({what}); nothing was left there") from None
    except ModelError as error:
        raise ModelError(str(error).replace(str(place), str(target)) if place else str(error)) from None


def _permit(place: Path) -> None:
    """Give the directory and its files the mode of new ones: temporary directories and safetensors are private."""
    umask = os.umask(0)
    os.umask(umask)
    place.chmod(0o777 & ~umask)
    for path in place.iterdir():
        path.chmod(0o666 & ~umask)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A directory that is either complete or does not exist."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from headrace.model.trusted_files import ModelError


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to write into, beside `target`, that gets its name when the block ends without an error.

    Everything is on the disk before the name is given. After an error the directory is deleted; after SIGKILL it
    remains under a name that begins with a dot.

    Raises:
        ModelError: there is something under the name already, or the directory cannot be written.
    """
    if os.path.lexists(target):
        raise ModelError(f"{target}: it exists already, and is not overwritten; give another name, or delete it first")
    if not os.path.isdir(target.parent):
        raise ModelError(f"{target}: there is no directory {target.parent}")
    with _named(target):
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
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

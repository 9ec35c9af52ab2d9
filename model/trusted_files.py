"""Open the files of a model, if only their owner, a trusted group and root can write them. Needs no torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path


class ModelError(Exception):
    """A model cannot be found, read or trusted. The message names the file or tensor and says what to do."""


#: How the names of files end that decide what a model answers: all that a load reads, and their likely successors.
DECIDING = (".json", ".txt", ".jinja", ".model", ".bpe", ".safetensors", ".gguf")
#: Links on the way to one file; Linux follows as many.
MAX_LINKS = 40


def check_not_shared(folder: Path, files: Iterable[Path] = ()) -> None:
    """Check that no other user can change a model: its directory, the files in it that decide answers, the directories
    above them, and the links on the way.

    Everybody is meant by the permission for others (`o+w`). A group that may write is trusted, because many systems
    give each user a group; so is the owner, whoever that is, because mounted directories often belong to another user.
    The owner of what is in a directory where everybody can create files, such as /tmp, must be this user or root.
    What is on a read-only file system cannot be written and passes.

    Args:
        files: further files that are read.

    Raises:
        ModelError: another user can change one of them; the message names it and the way out.
    """
    for path in dict.fromkeys((folder, *files, *_deciding(folder))):
        entries = list(_looked_up(path))
        for entry in entries:
            _check_place(folder, entry.parent, even_sticky=False)
            _check_maker(folder, entry)
        if entries:
            _check_place(folder, entries[-1], even_sticky=True)


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Check at the end of the block that the files of a model are the same as at its beginning.

    A load reads several files, some more than once. Without this, a directory that is replaced meanwhile would give the
    weights of one model and the vocabulary of another.

    Raises:
        ModelError: a file, or a link on the way, was changed; the message names it.
    """
    before = _identities(folder)
    yield
    after = _identities(folder)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            raise ModelError(
                f"{path}: it was changed or replaced while the model was loaded; start again when all files are there"
            )


def identity(about: os.stat_result) -> tuple[int, ...]:
    """What differs if a file was written or replaced. The change time too: programs can set the other one back."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def _identities(folder: Path) -> dict[Path, tuple[int, ...] | str]:
    found: dict[Path, tuple[int, ...] | str] = {folder: os.path.realpath(folder)}
    for path in [folder] if folder.is_file() else _deciding(folder):
        with suppress(OSError):
            found[path / "."] = identity(path.stat())
    return found


def _deciding(folder: Path) -> list[Path]:
    """The files of a directory that decide answers, by their names."""
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if name.lower().endswith(DECIDING)]
    except OSError:
        return []


def _looked_up(path: Path) -> Iterator[Path]:
    """What the operating system looks up on the way to a path: directories, links, and what these lead to."""
    place, rest, links = Path("/"), list(path.absolute().parts[1:]), 0
    while rest:
        name = rest.pop(0)
        if name == "..":
            place = place.parent
            continue
        yield (entry := place / name)
        try:
            target = Path(os.readlink(entry))
        except OSError:
            place = entry
            continue
        links += 1
        if links > MAX_LINKS:
            return  # opening it fails with a better message
        rest = [*target.parts[target.is_absolute() :], *rest]
        place = Path("/") if target.is_absolute() else place


def _check_place(folder: Path, place: Path, *, even_sticky: bool) -> None:
    if _everybody_writes(place, even_sticky=even_sticky):
        raise ModelError(
            f"{place} can be written by every user of this machine, who could change what the model "
            f"{folder} answers: run `chmod o-w {place}`, or set HEADRACE_ALLOW_SHARED_MODEL=1 if all users "
            "are trusted"
        )


def _check_maker(folder: Path, entry: Path) -> None:
    """Refuse what another user made where every user can make something."""
    try:
        maker = entry.lstat().st_uid
    except OSError:
        return  # reading it fails with a better message
    if maker not in (0, os.getuid()) and _everybody_writes(entry.parent, even_sticky=True):
        raise ModelError(
            f"{entry} was made by another user (id {maker}) in {entry.parent}, where every user can create files, and "
            f"decides what the model {folder} answers: copy the model to a directory of your own, or set "
            "HEADRACE_ALLOW_SHARED_MODEL=1 if all users are trusted"
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

"""The directories of this user: data, the embedded Redis server, and its socket."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

#: Bytes that the path of a unix socket may have: `sun_path` holds 104 on macOS and 108 on Linux, with a closing zero.
MAX_SOCKET_PATH = 103


class UnsafeDirectory(OSError):
    """A directory is one that another user made or can change. The message names it and says what to do.

    `errno` and `strerror` are set, because redis-py quotes both.
    """

    def __init__(self, place: Path, what: str) -> None:
        way_out = (
            "set XDG_RUNTIME_DIR and XDG_DATA_HOME to directories of your own"
            if "user" in what
            else "remove the link, or set XDG_RUNTIME_DIR and XDG_DATA_HOME to other directories"
        )
        super().__init__(errno.EPERM, f"{place} {what}; {way_out}")

    def __str__(self) -> str:
        return str(self.strerror)


def check_private(place: Path, *, group_may_write: bool = False) -> None:
    """Check that a directory belongs to this user or root, that no other user can write it, and that it is no link.

    A link in the temporary directory could lead to a directory of this user that another user chose, or to one of that
    user. A link that this user or root made is followed if a group may write, that is for data, which may be elsewhere.

    Args:
        group_may_write: accept a directory that a group can write, as Kubernetes makes those in volumes.

    Raises:
        UnsafeDirectory: the directory is none of these.
        OSError: there is no such directory.
    """
    trusted = (0, os.getuid())
    about = place.lstat()
    if stat.S_ISLNK(about.st_mode):
        if not group_may_write or about.st_uid not in trusted:
            raise UnsafeDirectory(place, "is a symbolic link")
        about = place.stat()
    if not stat.S_ISDIR(about.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    if about.st_uid not in trusted:
        raise UnsafeDirectory(place, "belongs to another user")
    if about.st_mode & (stat.S_IWOTH if group_may_write else stat.S_IWOTH | stat.S_IWGRP):
        raise UnsafeDirectory(
            place, f"can be written by other users: run `chmod go-w {place}` if what is in it is yours"
        )


def make_private(place: Path, *, group_may_write: bool = False) -> None:
    """Create a directory, and its missing parents, for this user alone; check it like `check_private` if it exists."""
    missing = []
    for each in (place, *place.parents):
        if os.path.lexists(each):
            break
        missing.append(each)
    for each in reversed(missing):  # `Path.mkdir` would create the parents for everybody if the umask allows it
        with contextlib.suppress(FileExistsError):  # another process was faster; whose it is, is checked
            each.mkdir(mode=0o700)
        check_private(each, group_may_write=group_may_write)
    check_private(place, group_may_write=group_may_write)


def data_dir() -> Path:
    """The directory for everything that outlives a process: `$XDG_DATA_HOME/headrace`, or `~/.local/share/headrace`.

    `headrace serve` keeps files and batches in it, the embedded Redis server its data in `redis_dir()` below it.
    """
    base = os.environ.get("XDG_DATA_HOME", "")
    # A relative path would be another directory for each working directory; the XDG specification says to ignore it.
    return (Path(base) if os.path.isabs(base) else Path("~/.local/share").expanduser()) / "headrace"


def redis_dir() -> Path:
    """The data directory of the embedded Redis server. Clients look in it for the server's address."""
    return data_dir() / "redis"


def runtime_dir() -> Path:
    """The directory for this user's sockets: `$XDG_RUNTIME_DIR/headrace`, or one in the temporary directory.

    `sudo` and `su` may leave XDG_RUNTIME_DIR set to the directory of another user; it is ignored then.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    with contextlib.suppress(OSError):
        if os.path.isabs(base) and os.stat(base).st_uid == os.getuid():
            return Path(base) / "headrace"
    return Path(tempfile.gettempdir()) / f"headrace-{os.getuid()}"


def socket_for(directory: Path) -> Path:
    """The unix socket of the server whose data is in `directory`.

    Its name is a digest of the directory's real path, so it is short however long the path is, and no two directories
    share a socket. If even the path of `runtime_dir()` is too long, the socket is in `/tmp`.
    """
    digest = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]
    socket = runtime_dir() / f"{digest}.sock"
    if len(os.fsencode(socket)) > MAX_SOCKET_PATH:
        return Path("/tmp") / f"headrace-{os.getuid()}" / socket.name  # noqa: S108  # checked to be this user's own
    return socket


class ServerAddress(NamedTuple):
    """Where an embedded Redis server listens, and the process that started it."""

    pid: int
    socket: str


def write_address(directory: Path, address: ServerAddress) -> None:
    """Publish the address of the server of this data directory for clients. The caller holds the directory's lock."""
    part = directory / "address.part"
    part.touch(mode=0o600)
    part.write_text(json.dumps(address._asdict()))
    part.replace(directory / "address")


def read_address(directory: Path) -> ServerAddress | None:
    """The last published address of the server of this data directory; None if there is none.

    A killed server leaves its address behind.

    An address that another user wrote or can change is ignored: that user's server would receive our prompts.
    """
    try:
        descriptor = os.open(directory / "address", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor) as file:
            about = os.fstat(descriptor)
            if about.st_uid != os.getuid() or about.st_mode & stat.S_IWOTH:
                return None
            check_private(directory, group_may_write=True)
            return ServerAddress(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None


def remove_address(directory: Path) -> None:
    """Withdraw the address when the server has ended. The caller holds the directory's lock."""
    (directory / "address").unlink(missing_ok=True)

"""The directories of this user: data, the embedded Redis server, and its socket."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

#: Bytes that the path of a unix socket may have: `sun_path` holds 104 on macOS and 108 on Linux, with a closing zero.
MAX_SOCKET_PATH = 103


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
    part.write_text(json.dumps(address._asdict()))
    part.replace(directory / "address")


def read_address(directory: Path) -> ServerAddress | None:
    """The last published address of the server of this data directory; None if there is none.

    A killed server leaves its address behind.

    An address in a directory of another user is ignored: that user's server would receive our prompts.
    """
    try:
        with (directory / "address").open() as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            return ServerAddress(**json.load(file))
    except (OSError, ValueError, TypeError):
        return None


def remove_address(directory: Path) -> None:
    """Withdraw the address when the server has ended. The caller holds the directory's lock."""
    (directory / "address").unlink(missing_ok=True)

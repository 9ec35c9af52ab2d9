"""How much memory this process may still take: less than the machine has where a container or service has a limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

#: Where Linux tells of control groups (version 2), and to which this process belongs.
GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory() -> int:
    """Bytes that are free now: on the machine, and below the limit of each control group around this process."""
    machine = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([machine, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return
    for path in [line.removeprefix("0::") for line in lines if line.startswith("0::")]:
        own = GROUPS / path.lstrip("/")
        for group in [own, *own.parents]:
            if group.is_relative_to(GROUPS) and (left := _left(group)) is not None:
                yield left


def _left(group: Path) -> int | None:
    """What is left below the limit of one group; None if it has none. Cached files count as free: they make room."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - int(used) + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):
        return None

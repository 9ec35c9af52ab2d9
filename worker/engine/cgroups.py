"""How much memory this process can still allocate. The limit of a container or service may be below the machine's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

#: Where Linux mounts control groups (version 2), and the file that names the group of this process.
CGROUP_ROOT, CGROUP_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory() -> int:
    """Bytes this process can allocate: the least of what the machine and each control group around it have left."""
    machine = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([machine, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    try:
        lines = CGROUP_OF_PROCESS.read_text().splitlines()
    except OSError:
        return
    for path in [line.removeprefix("0::") for line in lines if line.startswith("0::")]:
        own = CGROUP_ROOT / path.lstrip("/")
        for group in [own, *own.parents]:
            if group.is_relative_to(CGROUP_ROOT) and (left := _left(group)) is not None:
                yield left


def _left(group: Path) -> int | None:
    """Bytes below the limit of one group; None if it has none. Cached files count as free: the kernel drops them."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - int(used) + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):
        return None

"""How much memory a process uses, apart from what its allocator has kept of an earlier peak.

glibc gives freed memory back only from the end of a heap, and raises the size from which it maps blocks one by one to
the largest block that was freed: after a step with large matrices the resident memory stays up to some 150 MiB above
what is in use, and falls again when it pleases. So two samples of the resident memory say nothing about a leak. After a
collection and `malloc_trim` the rest is what is used, and what fragmentation holds for ever.

The worker and the server of a soak are programs as users start them; `environment` makes Python import this module
first in them, and `ask` sends them a signal.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

#: The directory for the answers.
VARIABLE = "SOAK_MEMORY"
_ROOT = Path(__file__).parents[2]
_COUNT, _TRIM = signal.SIGRTMIN, signal.SIGRTMIN + 1


class _MallInfo2(ctypes.Structure):
    """What glibc says of all its heaps: `uordblks` are the bytes in use in them, `hblkhd` those mapped one by one."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def environment(directory: Path) -> dict[str, str]:
    """The variables with which a program answers `ask`; the answers are written in the directory."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text("from tests.chaos.soak_memory import listen\n\nlisten()\n")
    path = [str(directory), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {VARIABLE: str(directory), "PYTHONPATH": os.pathsep.join(path)}


def listen() -> None:
    """Answer `ask` from now on. The main thread answers, between two of its own steps."""
    signal.signal(_COUNT, lambda *_: _answer(trim=False))
    signal.signal(_TRIM, lambda *_: _answer(trim=True))


def ask(pid: int, directory: Path, patience_s: float, *, trim: bool) -> dict[str, int]:
    """What `in_use` returns in a process that listens. Raises TimeoutError."""
    answer = directory / f"{pid}.json"
    answer.unlink(missing_ok=True)
    os.kill(pid, _TRIM if trim else _COUNT)
    deadline = time.monotonic() + patience_s
    while not answer.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not say how much memory it uses")
        time.sleep(0.05)
    found: dict[str, int] = json.loads(answer.read_text())
    return found


def in_use(*, trim: bool) -> dict[str, int]:
    """Of this process: resident bytes, bytes in use in malloc, blocks of Python's own allocator.

    Trimming collects garbage and gives free memory back first. Without it nothing of the process changes.
    """
    libc = ctypes.CDLL(None)
    if trim:
        gc.collect()
        libc.malloc_trim(0)
    libc.mallinfo2.restype = _MallInfo2
    info = libc.mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "malloc": info.uordblks + info.hblkhd,
        "blocks": sys.getallocatedblocks(),
    }


def _answer(*, trim: bool) -> None:
    answer = Path(os.environ[VARIABLE], f"{os.getpid()}.json")
    new = answer.with_suffix(".new")
    new.write_text(json.dumps(in_use(trim=trim)))
    new.replace(answer)

"""Child processes that end with this process, however it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

#: How the temporary directories of commands with a server of their own begin.
RUN_PREFIX = "headrace-run-"
#: A temporary directory without a lock belongs to a command that is starting, unless it is older.
STARTING_S = 3600.0

# Requests a signal for the parent's end (1 is PR_SET_PDEATHSIG), then executes the server. Without it, the server would
# survive a `kill -9` of the parent. This is a separate program because `preexec_fn` may deadlock in a process with
# threads. The parent may have ended before the request, so the program checks its parent's process id afterwards.
_DIE_WITH_PARENT = (
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)}); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)
# Both wait until this process ends, which closes their standard input.
_END = 'read _; kill -TERM "$0"'
_END_AND_DELETE = (
    'read _; kill -KILL "$0"; left=50; '
    'while [ -e "$1" ] && [ $left -gt 0 ]; do rm -rf -- "$1"; left=$((left-1)); [ -e "$1" ] && sleep 0.1; done'
)


def die_with_parent(command: list[str]) -> list[str]:
    """Wrap a command so that Linux ends it with this process; unchanged elsewhere. Start it in the main thread."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def watch(pid: int, delete: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a shell that ends process `pid`, and deletes a directory, when this process ends."""
    command = ["/bin/sh", "-c", _END, str(pid)]
    if delete is not None:
        command = ["/bin/sh", "-c", _END_AND_DELETE, str(pid), str(delete)]
    return subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def end(process: subprocess.Popen[bytes], with_signal: signal.Signals, timeout_s: float) -> None:
    """Send a signal, and SIGKILL after `timeout_s`; returns when the process has ended."""
    process.send_signal(with_signal)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin:
        process.stdin.close()


def runs(pid: int) -> bool:
    """Whether there is a process with this id."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return True


def make_run_directory() -> Path:
    """A new temporary directory for one command. First removes those of killed commands, which may hold prompts."""
    base = Path(tempfile.gettempdir())
    for path in base.glob(f"{RUN_PREFIX}*"):
        with contextlib.suppress(OSError):
            about = path.lstat()
            if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid():
                _remove_if_abandoned(path, about)
    return Path(tempfile.mkdtemp(prefix=RUN_PREFIX))


def _remove_if_abandoned(directory: Path, about: os.stat_result) -> None:
    if not (directory / "lock").exists():
        if time.time() - about.st_mtime > STARTING_S:
            shutil.rmtree(directory, ignore_errors=True)
        return
    with contextlib.suppress(Timeout), FileLock(directory / "lock", blocking=False, fallback_to_soft=False):
        shutil.rmtree(directory, ignore_errors=True)  # neither the command nor its server holds the lock

"""Workers forked from a process that has already imported their modules, which takes most of the time of a start.

Each test process has one such parent (multiprocessing's fork server), which ends with it. A worker's environment,
arguments and standard streams are its own; its command line is the parent's. Where that matters, and to test a
worker as users start it, tests start it as a separate program (`WorkerProcess(..., bare=True)`).
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

#: None of these modules reads settings, opens a connection or starts a thread when it is imported.
MODULES = (
    "torch",
    "celery.bin.celery",
    "celery.bin.worker",
    "celery.fixups.django",
    "headrace.worker.jobs.pool",
    "headrace.worker.engine.build",
)

_parent = multiprocessing.get_context("forkserver")
_parent.set_forkserver_preload([*MODULES, __name__])


class WarmProcess:
    """The part of the interface of `subprocess.Popen` that tests use."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path, patch: str) -> None:
        self._process = _parent.Process(target=_run, args=(list(argv), dict(environment), str(log), patch))
        kept = os.environ.pop("OMP_NUM_THREADS", None)  # the parent would keep it and pass it to its children
        try:
            self._process.start()
        finally:
            if kept is not None:
                os.environ["OMP_NUM_THREADS"] = kept
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("a worker", timeout or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def _run(argv: list[str], environment: dict[str, str], log: str, patch: str) -> None:
    """In the new process: become `celery -A worker worker`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: its parent ends with the tests
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the fork server ignores
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.argv = ["celery", *argv]
    code: object = 1
    try:
        exec(patch, {"__name__": "__main__"})
        from celery.__main__ import main

        code = main()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))

"""Run each contender in a separate process, which is stopped with a signal while another one is measured.

The threads of OpenMP and ggml spin for a while after their work is done, some of them forever. They would take cores
from the next contender; a stopped process takes none.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any


class TooSlow(Exception):
    """The call exceeded its time limit; the process was ended."""


class Failed(Exception):
    """The call raised an exception in the process, or the process died; the message says which."""


class Remote:
    """An object that lives in a new process; `call` runs one of its methods there.

    Args:
        make: builds the object in the process; it and `arguments` are pickled.
    """

    def __init__(self, make: Callable[..., object], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, os.getpid(), make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        # Python waits for its child processes at exit, and a stopped one would never end.
        atexit.register(self.close)
        self._receive(None)

    def call(self, method: str, *arguments: object, limit_s: float | None = None) -> Any:
        """Call a method and return its result. The process runs only during the call.

        Raises:
            TooSlow: the call took more than `limit_s`; the process was ended.
            Failed: the call raised an exception, or the process has ended.
        """
        if not self.alive:
            raise Failed("its process has ended")
        self._signal(signal.SIGCONT)
        self._pipe.send((method, arguments))
        return self._receive(limit_s)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def close(self) -> None:
        """End the process, stopped or not."""
        atexit.unregister(self.close)
        self._process.kill()
        self._process.join()

    def _receive(self, limit_s: float | None) -> Any:
        if not self._pipe.poll(limit_s):
            self.close()
            raise TooSlow(f"took over {limit_s:.0f} s")
        try:
            error, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise Failed(f"its process ended with exit code {self._process.exitcode}") from None
        self._signal(signal.SIGSTOP)
        if error:
            raise Failed(error)
        return value

    def _signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid or 0, number)


def _serve(pipe: Connection, parent: int, make: Callable[..., object], arguments: tuple[object, ...]) -> None:
    if sys.platform == "linux":
        # If the parent is killed, nothing else would end a stopped process (1 is PR_SET_PDEATHSIG).
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
        if os.getppid() != parent:
            return
    target: object = None

    def build() -> None:
        nonlocal target
        target = make(*arguments)

    _answer(pipe, build)
    while True:
        method, given = pipe.recv()
        _answer(pipe, partial(getattr(target, method), *given))


def _answer(pipe: Connection, compute: Callable[[], object]) -> None:
    try:
        reply: tuple[str, object] = ("", compute())
    except Exception as error:  # the run continues with the other contenders
        reply = (f"{type(error).__name__}: {error}", None)
    pipe.send(reply)

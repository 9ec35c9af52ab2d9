"""Ctrl-C on `headrace batch`: the first stops the run and leaves its jobs queued, the second ends the process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import click

from headrace.client.batch.run import BatchReport
from headrace.worker.cli.batch_report import cancel_command, stopped
from headrace.worker.cli.local_stack import note


class Stopped(Exception):
    """Raised by `StopRequest.check` if the user asked for a stop."""


class StopRequest:
    """Heeds Ctrl-C during its `with` block, which must be in the main thread.

    The first is noted, so that no row is half written and the jobs in the queue are known. The second raises
    KeyboardInterrupt wherever the program is.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:  # as in the background of a shell
            signal.signal(signal.SIGINT, self._heed)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _heed(self, _: int, __: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True

    def check(self) -> None:
        """Call this often. Raises Stopped."""
        if self._requested:
            raise Stopped


def end_stopped(report: BatchReport, cancel: Callable[[], int], *, local: bool) -> None:
    """Say what is queued and how to resume, and cancel what is queued if the user wants that.

    Args:
        report: of the run.
        cancel: cancels the jobs of the run, and returns how many had not ended.
        local: whether the queue ends with this command.

    Raises:
        click.Abort: the user pressed Ctrl-C again.
        RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
    """
    note.print(stopped(report, local=local), soft_wrap=True, markup=False)
    if local or not report.outstanding:
        return
    if not (sys.stdin.isatty() and note.is_terminal):
        note.print(f"to cancel these jobs:\n  {cancel_command()}", soft_wrap=True, markup=False)
        return
    if click.confirm("Cancel these jobs? --resume computes their rows again.", default=False, err=True):
        note.print(f"{cancel()} jobs were cancelled")

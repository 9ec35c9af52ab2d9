"""The progress of `headrace batch` on standard error."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from headrace.client.batch.run import BatchReport
from headrace.worker.cli.batch_report import duration

#: How often a line is written if standard error is not a terminal.
LINE_EVERY_S = 10.0
#: Speed and remaining time are measured over this many last seconds.
RECENT_S = 30.0


class ProgressDisplay:
    """Progress on standard error: a bar on a terminal, a line from time to time elsewhere."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._recent: deque[tuple[float, int, int]] = deque()  # time, rows done, tokens
        self._written_at = clock()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar during the block."""
        if not self._console.is_terminal:
            yield
            return
        rows, message = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("rows", "message"))
        with Progress(rows, BarColumn(), message, console=self._console, transient=True) as self._bar:
            self._task = self._bar.add_task("", total=None, rows="", message="")
            yield
        self._bar = None

    def notify(self, line: str) -> None:
        """Write a line above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)

    def checked(self, lines: int) -> None:
        """Show how many lines of the input are checked."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=lines, rows=f"{lines} lines", message="checked")

    def update(self, report: BatchReport) -> None:
        """Show the present state of the batch."""
        message = self._message(report)
        done = report.rows - report.left
        rows = f"{done}/{report.rows} rows"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=report.rows, rows=rows, message=message)
        elif self._clock() - self._written_at >= LINE_EVERY_S:
            self._written_at = self._clock()
            self.notify(f"{rows}  {message}")

    def _message(self, report: BatchReport) -> str:
        now, done = self._clock(), report.succeeded + report.failed
        if not done:
            self._recent.clear()  # jobs that wait have no rate
        self._recent.append((now, done, report.completion_tokens))
        while now - self._recent[0][0] > RECENT_S and len(self._recent) > 2:
            self._recent.popleft()
        began, done_then, tokens_then = self._recent[0]
        took, new = now - began, done - done_then
        parts = [f"{count} {code}" for code, count in report.failures.most_common(3)]
        if took > 0 and new:
            left_s = report.left * took / new
            ends = time.strftime("%H:%M:%S" if left_s < 43_200 else "%a %H:%M", time.localtime(time.time() + left_s))
            speed = (report.completion_tokens - tokens_then) / took
            parts.append(f"{speed:.0f} tokens/s, ends in {duration(left_s)} at {ends}")
        return "  ".join(parts)

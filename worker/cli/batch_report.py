"""What `headrace batch` says at its end: the summary, as text or JSON, or how to resume."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shlex
import sys
from pathlib import Path

import click

from headrace.client.batch.run import BatchReport


def summary(report: BatchReport, output: str, errors: str | None) -> str:
    """The table at the end, in the format of mlx-lm."""
    seconds = max(report.seconds, 1e-9)
    before = f", {report.before} were in the output before" if report.before else ""
    before += f" ({report.failed_before} of them failures)" if report.failed_before else ""
    lines = [
        f"Rows: {report.succeeded} computed, {report.failed} failed{before}; {report.rows} in the input",
        f"Prompt: {report.prompt_tokens} tokens, {report.prompt_tokens / seconds:.3f} tokens-per-sec",
        f"Generation: {report.completion_tokens} tokens, {report.completion_tokens / seconds:.3f} tokens-per-sec",
        f"Time: {duration(report.seconds)}",
        f"Peak memory: {peak_memory() / 1e9:.3f} GB, of the client",
    ]
    if report.failed:
        codes = ", ".join(f"{count} {code}" for code, count in report.failures.most_common())
        lines.insert(1, f"Failed: {codes}; see {errors or output}, compute them again with --retry-errors")
    elif report.failed_before:
        lines.insert(1, "--resume keeps failed rows; --retry-errors computes them again")
    return "\n".join(["=" * 10, *lines])


def print_json(report: BatchReport) -> None:
    """The report as one line on standard output."""
    click.echo(json.dumps({**report.as_dict(), "peak_memory_bytes": peak_memory()}))


def print_cancelled(report: BatchReport, *, as_json: bool) -> None:
    """What `--cancel` has done."""
    if as_json:
        click.echo(json.dumps({"cancelled": report.outstanding}))
    else:
        click.echo(f"{report.outstanding} jobs were cancelled; resume with\n  {resume_command()}", err=True)


def stopped(report: BatchReport, *, local: bool) -> str:
    """The message after Ctrl-C. `local` says that the queue ends with this command."""
    jobs = "will be computed again then" if local else "stay in the queue and will be computed"
    return (
        f"stopped: {report.rows - report.left} of {report.rows} rows are done, {report.outstanding} jobs {jobs}; "
        f"resume with\n  {resume_command()}"
    )


def resume_command() -> str:
    """The command that resumes this one."""
    return _again("--resume")


def cancel_command() -> str:
    """The command that cancels what this one has left in the queue."""
    return _again("--cancel")


def _again(option: str) -> str:
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--retry-errors", "--resume", "--cancel")]
    return shlex.join(["headrace", *words, option])


def peak_memory() -> int:
    """The largest resident memory that this process has had, in bytes."""
    with contextlib.suppress(OSError):  # on Linux getrusage would include the parent's memory from before the exec
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """A time as h:mm:ss, or below a minute in seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if seconds >= 60 else f"{seconds:.1f} s"

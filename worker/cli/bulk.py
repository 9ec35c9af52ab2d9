"""`headrace batch` on the terminal: what is checked, how far it is, and what came of it."""

from __future__ import annotations

import contextlib
import json
import random
import re
import resource
import secrets
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from headrace.client import Client, SamplingParams
from headrace.client.batch.items import Row
from headrace.client.batch.output import STDOUT, Output
from headrace.client.batch.run import Batch, BatchReport
from headrace.client.batch.window import Window
from headrace.client.wire.errors import HeadraceError, InvalidRequest
from headrace.config import Settings
from headrace.model.hub import MAX_CONFIG_BYTES, find_model, read_json
from headrace.model.tokenizer import load_tokenizer
from headrace.worker.cli.local_stack import note, serving, settings_for

#: Exit codes: rows failed; stopped by the user.
FAILED, INTERRUPTED = 1, 130

#: Rows that a dry run computes for their rate, and of them those that warm up.
SAMPLE, WARM_UP = 128, 8
#: How often a line is written where there is no terminal.
LINE_EVERY_S = 10.0
#: Speed and the time that is left are those of so many seconds.
RECENT_S = 30.0


def read_params(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`max_tokens=20` and the like as parameters: values are JSON, or else text. Raises InvalidRequest."""
    params: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise InvalidRequest("params", repr(pair)[:80], "NAME=VALUE, for example max_tokens=20")
        try:
            params[name] = json.loads(value)
        except ValueError:
            params[name] = value
    return params


def resume_command() -> str:
    """What the user types to go on."""
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--retry-errors")]
    return shlex.join(["headrace", *words, *([] if "--resume" in words else ["--resume"])])


class Screen:
    """Progress on standard error: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._recent: deque[tuple[float, int, int]] = deque()  # time, rows done, tokens
        self._said_at = time.monotonic()

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """The bar is there during the block."""
        if not self._console.is_terminal:
            yield
            return
        rows, said = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("rows", "said"))
        with Progress(rows, BarColumn(), said, console=self._console, transient=True) as self._bar:
            self._task = self._bar.add_task("", total=None, rows="", said="")
            yield
        self._bar = None

    def tell(self, line: str) -> None:
        """A notice above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)

    def checked(self, lines: int) -> None:
        """So many lines of the input are checked."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=lines, rows=f"{lines} lines", said="checked")

    def update(self, report: BatchReport) -> None:
        """The batch has come so far."""
        said = self._said(report)
        done = report.rows - report.left
        rows = f"{done}/{report.rows} rows"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=report.rows, rows=rows, said=said)
        elif time.monotonic() - self._said_at >= LINE_EVERY_S:
            self._said_at = time.monotonic()
            self.tell(f"{rows}  {said}")

    def _said(self, report: BatchReport) -> str:
        now, done = time.monotonic(), report.succeeded + report.failed
        self._recent.append((now, done, report.completion_tokens))
        while now - self._recent[0][0] > RECENT_S and len(self._recent) > 2:
            self._recent.popleft()
        began, done_then, tokens_then = self._recent[0]
        took, new = now - began, done - done_then
        parts = [f"{count} {code}" for code, count in report.failures.most_common(3)]
        if took > 0 and new:
            left_s = report.left * took / new
            ends = time.strftime("%H:%M:%S" if left_s < 43_200 else "%a %H:%M", time.localtime(time.time() + left_s))
            parts.append(
                f"{(report.completion_tokens - tokens_then) / took:.0f} tokens/s, ends in {_time(left_s)} at {ends}"
            )
        return "  ".join(parts)


def summary(report: BatchReport, output: str, errors: str | None) -> str:
    """The last table, as mlx-lm prints it."""
    seconds = max(report.seconds, 1e-9)
    before = f", {report.before} were there before" if report.before else ""
    before += f" ({report.failed_before} of them failures)" if report.failed_before else ""
    lines = [
        f"Rows: {report.succeeded} computed, {report.failed} failed{before}; {report.rows} in the input",
        f"Prompt: {report.prompt_tokens} tokens, {report.prompt_tokens / seconds:.3f} tokens-per-sec",
        f"Generation: {report.completion_tokens} tokens, {report.completion_tokens / seconds:.3f} tokens-per-sec",
        f"Time: {_time(report.seconds)}",
        f"Peak memory: {peak_memory() / 1e9:.3f} GB, of the client",
    ]
    if report.failed:
        codes = ", ".join(f"{count} {code}" for code, count in report.failures.most_common())
        lines.insert(1, f"Failed: {codes}; see {errors or output}, compute them again with --retry-errors")
    return "\n".join(["=" * 10, *lines])


def peak_memory() -> int:
    """The most memory that this process had, in bytes."""
    with contextlib.suppress(OSError):  # Linux; what getrusage says there begins with the memory of our parent
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if seconds >= 60 else f"{seconds:.1f} s"


def run_batch(
    *,
    source: str,
    output: str | None,
    as_json: bool,
    model: str | None,
    params: tuple[str, ...],
    text: bool,
    limit: int | None,
    **options: Any,
) -> None:
    """Check, compute, report. `options` are those of `client.bulk.Batch.run`.

    Raises:
        SystemExit: rows failed, or the user stopped it.
        HeadraceError, SettingsError, EmbeddedRedisError: nothing, or nothing more, could be computed.
    """
    if output is None:
        raise InvalidRequest("output-file", "none", "-o PATH, or --dry-run")
    _check_options(source, output, as_json=as_json, **options)
    settings, screen, report = settings_for(model), Screen(note), BatchReport()
    batch = _checked(settings, screen, source, params, text=text, limit=limit)
    with serving(settings) as served, screen.showing():
        batch.client = served.client

        def look(now: BatchReport) -> None:
            nonlocal report
            report = now
            served.look()
            screen.update(now)

        if options["resume"] or options["retry_errors"]:
            screen.tell(f"going on with {output}")
        try:
            batch.run(output, tell=screen.tell, on_progress=look, **options)
        except KeyboardInterrupt:
            note.print(stopped(report, own=served.own), soft_wrap=True, markup=False)
            raise SystemExit(INTERRUPTED) from None
    note.print(summary(report, output, options["errors"]), soft_wrap=True, markup=False)
    if as_json:
        print_json(report)
    if report.failed or report.failed_before:
        raise SystemExit(FAILED)


def _checked(
    settings: Settings, screen: Screen, source: str, params: tuple[str, ...], *, text: bool, limit: int | None
) -> Batch:
    given: Any = sys.stdin.buffer if source == "-" else source
    with Client(settings=settings) as client, screen.showing():
        models = _models(client)
        return Batch(client, given, read_params(params), text=text, limit=limit, models=models, on_line=screen.checked)


def _check_options(source: str, output: str, *, as_json: bool, **options: Any) -> None:
    """Refuse before anything is read or started what cannot be done."""
    going_on = options["resume"] or options["retry_errors"]
    if output == STDOUT and (as_json or going_on or options["overwrite"]):
        raise InvalidRequest("output-file", "'-'", "a file, for --json, --resume, --retry-errors and --overwrite")
    if options["overwrite"] and going_on:
        raise InvalidRequest("overwrite", "--resume beside it", "one of them")
    if options["errors"] == STDOUT:
        raise InvalidRequest("error-file", "'-'", "a file")
    with Output(output, options["errors"]) as sink:
        sink.check_free(source, resume=going_on, overwrite=options["overwrite"])


def _models(client: Client) -> set[str]:
    """What rows may name: the models that are set, and what is served."""
    with contextlib.suppress(HeadraceError):
        return client.models()
    return set(client.settings.models)


@dataclass
class Estimate:
    """What a batch would take: tokens counted, time from the rate of a few rows."""

    rows: int = 0
    prompt_tokens: int = 0
    longest_prompt: int = 0
    #: If no row stops before its max_tokens.
    most_new_tokens: int = 0
    #: Rows that the model cannot read: they would fail.
    too_long: int = 0
    rows_measured: int = 0
    tokens_per_s: float = 0.0
    seconds: float = 0.0

    def count(self, tokens: int, fields: dict[str, Any], max_context: int) -> bool:
        """Add a row. Returns whether the model can compute it."""
        new = fields.get("max_tokens", SamplingParams.model_fields["max_tokens"].default)
        fits = bool(tokens + new <= max_context)
        self.rows += 1
        self.prompt_tokens += tokens
        self.longest_prompt = max(self.longest_prompt, tokens)
        self.most_new_tokens += new * fields.get("n", 1) if fits else 0
        self.too_long += not fits
        return fits

    def as_text(self) -> str:
        """The lines of the last table."""
        lines = [
            f"Rows: {self.rows}, of which {self.too_long} are longer than the model reads and would fail",
            f"Prompt: {self.prompt_tokens} tokens, the longest {self.longest_prompt}",
            f"Generation: at most {self.most_new_tokens} tokens",
            f"Time: about {_time(self.seconds)}, from {self.rows_measured} rows at {self.tokens_per_s:.0f} tokens/s",
            f"Peak memory: {peak_memory() / 1e9:.3f} GB, of the client",
        ]
        return "\n".join(["=" * 10, *lines])


def estimate(
    *,
    source: str,
    as_json: bool,
    model: str | None,
    params: tuple[str, ...],
    text: bool,
    limit: int | None,
    **options: Any,
) -> None:
    """Check the input, count its tokens, compute a few of its rows for their rate, and say what all would take.

    Raises:
        HeadraceError, SettingsError, EmbeddedRedisError, ModelError: it cannot be said.
    """
    settings, screen = settings_for(model), Screen(note)
    batch = _checked(settings, screen, source, params, text=text, limit=limit)
    found, sample = _count(batch, settings)
    if sample:
        with serving(settings) as served:
            _measure(served.client, sample[:WARM_UP], options["max_inflight"])
            report = _measure(served.client, sample, options["max_inflight"])
        found.rows_measured = report.succeeded + report.failed
        found.tokens_per_s = report.completion_tokens / report.seconds
        found.seconds = report.seconds * (found.rows - found.too_long) / found.rows_measured
    if as_json:
        click.echo(json.dumps({**asdict(found), "peak_memory_bytes": peak_memory()}))
    else:
        click.echo(found.as_text())


def _count(batch: Batch, settings: Settings) -> tuple[Estimate, list[Row]]:
    """Counts of all rows, and some of them drawn at random."""
    source = settings.models[settings.model_name]
    tokenizer = load_tokenizer(source)
    config = read_json(find_model(source) / "config.json", MAX_CONFIG_BYTES)
    positions = config.get("n_positions", 1024)
    max_context = min(settings.max_context or positions, positions)
    found, sample, dice = Estimate(), list[Row](), random.Random(1)  # noqa: S311
    for row in batch.rows():
        prompt = row.fields["prompt"]
        tokens = len(tokenizer.encode(prompt)) or 1 if isinstance(prompt, str) else len(prompt)
        if not found.count(tokens, row.fields, max_context):
            continue
        if len(sample) < SAMPLE:
            sample.append(row)
        elif (place := dice.randrange(found.rows)) < SAMPLE:
            sample[place] = row
    return found, sample


def _measure(client: Client, sample: list[Row], max_inflight: int) -> BatchReport:
    """Compute rows, of which nothing is kept."""
    report, run = BatchReport(rows=len(sample)), secrets.token_hex(6)
    drafts = ((row, client.submitter.prepare({**row.fields, "id": row.job_id(run)})) for row in sample)
    for pairs in Window[Row](client, size=max_inflight).run(drafts):
        for _, outcome in pairs:
            report.count(outcome)
    return report


def stopped(report: BatchReport, *, own: bool) -> str:
    """What is said after Ctrl-C."""
    jobs = "are computed again then" if own else "stay in the queue and go on"
    return (
        f"stopped: {report.rows - report.left} of {report.rows} rows are done, {report.outstanding} jobs {jobs}; "
        f"go on with\n  {resume_command()}"
    )


def print_json(report: BatchReport) -> None:
    """The report as one line on standard output."""
    click.echo(json.dumps({**report.as_dict(), "peak_memory_bytes": peak_memory()}))

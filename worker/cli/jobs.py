"""`headrace jobs` and `headrace job`: which jobs there are, and what is known about one."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from headrace.client import Client, JobLost
from headrace.client.jobs.details import JobDetails
from headrace.client.jobs.listing import PAGE_JOBS, READ_JOBS, JobInfo
from headrace.client.wire.results import STATES
from headrace.client.wire.unicode import printable
from headrace.config import load_settings
from headrace.config.model_names import slug
from headrace.worker.cli.errors import command_errors
from headrace.worker.cli.local_stack import note

UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
ONE_MODEL = "the model, by the name that workers serve it under or as in HEADRACE_MODEL"


class Duration(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """A time span, in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Called by click."""
        number, unit = (value[:-1], value[-1]) if value[-1:] in UNITS else (value, "s")
        try:
            seconds = float(number) * UNITS[unit]
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            self.fail(f"got {value!r}; expected a number of seconds, or for example 90s, 10m, 2h or 7d", param, ctx)
        return seconds


@click.command()
@click.option("--state", type=click.Choice(STATES), help="only jobs in this state")
@click.option("--model", help=f"only jobs of {ONE_MODEL}")
@click.option("--older-than", type=Duration(), help="only jobs submitted before that: 90s, 10m, 2h, 7d")
@click.option("--newer-than", type=Duration(), help="only jobs submitted after that: 90s, 10m, 2h, 7d")
@click.option(
    "--owner", metavar="KEY", help='only jobs sent with this API key, as the list names it; "" for those without'
)
@click.option("--limit", type=click.IntRange(1), default=PAGE_JOBS, show_default=True, help="the most jobs to show")
@click.option("--after", default="", metavar="PLACE", help="show the jobs that follow; the page before names the PLACE")
@click.option("--all", "everything", is_flag=True, help="show all jobs, in place of one page")
@click.option("--json", "as_json", is_flag=True, help="print JSON, with times in seconds since 1970")
def jobs(limit: int, after: str, everything: bool, as_json: bool, model: str | None, **conditions: Any) -> None:
    """List the jobs that Redis knows, the newest first, whoever submitted them.

    A job is known until its result expires (HEADRACE_RESULT_TTL_S, a day by default). `headrace job ID` shows more
    about one.

    \b
    Examples:
      headrace jobs --state queued --older-than 10m
      headrace jobs --model gpt2 --all --json
    """
    with command_errors(as_json), Client(settings=load_settings()) as client:
        named = None if model is None else slug(model)
        found: list[JobInfo] = []
        while True:
            most = READ_JOBS if everything else limit - len(found)
            page = client.job_page(model=named, limit=most, after=after, **conditions)
            found += page.jobs
            after = page.after
            if not after or not (everything or len(found) < limit):
                break
    if as_json:
        click.echo(json.dumps({"jobs": [job._asdict() for job in found], "after": after}))
        return
    if found:
        _print_jobs(found, page.now)
    else:
        note.print("no such jobs" if named or after or any(conditions.values()) else "no jobs", highlight=False)
    if after:
        note.print(f"more follow: add --after {after}", soft_wrap=True, highlight=False)


def _print_jobs(found: list[JobInfo], now: float) -> None:
    owners = any(job.owner for job in found)
    table = Table("job", "state", "model", "submitted", "took", *(["owner"] if owners else []), box=None)
    for job in found:
        took = "" if job.ended_at is None else span(job.ended_at - job.submitted_at)
        owner = [job.owner] if owners else []
        model = printable(job.model) + (f" with {job.adapter}" if job.adapter else "")
        table.add_row(job.id, job.state, model, f"{span(now - job.submitted_at)} ago", took, *owner)
    console = Console(highlight=False, markup=False)
    # Ids are for copying: a terminal that is too narrow must not cut them, and a file or a pipe has no width.
    console.print(table, width=max(console.width, 140), soft_wrap=True, no_wrap=True, crop=False)


def span(seconds: float) -> str:
    """A time span in its two largest units."""
    left = max(0, round(seconds))
    if left < 1 and seconds > 0:
        return f"{max(seconds, 0.01):.2f} s"
    names = [("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)]
    parts: list[str] = []
    for name, size in names:
        if left >= size or (name == "s" and not parts):
            parts.append(f"{left // size} {name}")
            left %= size
        elif parts:
            break
    return " ".join(parts[:2])


@click.command()
@click.argument("job_id", metavar="ID")
@click.option("--text", is_flag=True, help="show the generated text too")
@click.option("--prompt", is_flag=True, help="show the prompt too, which Redis has until the job has ended")
@click.option("--json", "as_json", is_flag=True, help="print JSON, with times in seconds since 1970")
def job(job_id: str, text: bool, prompt: bool, as_json: bool) -> None:
    """Show all that is known about the job ID: its state, times, worker, error, and numbers of tokens.

    Exit code 1 if there is no such job, or if it waits and its message has been lost, so that nobody will compute it.
    """
    with command_errors(as_json), Client(settings=load_settings()) as client:
        found = client.job_details(job_id, texts=text, prompt=prompt)
        if found.state == "queued" and client.reader.find_lost([job_id]):
            raise JobLost(job_id, without_message=True)
        unserved = found.state == "queued" and found.model and not client.status().serves(found.model)
    if as_json:
        click.echo(found.model_dump_json(exclude_none=True))
        return
    for name, value in _lines(found):
        click.echo(f"{name + ':':14} {printable(value)}")
    for name, content in (("prompt", found.prompt), *(("text", each) for each in found.texts or ())):
        if content is not None:
            click.echo(f"\n--- {name}\n{content if isinstance(content, str) else json.dumps(content)}")
    if unserved:
        note.print(f"no worker serves {found.model}; start one with `HEADRACE_MODEL={found.model} headrace up`")
    if prompt and found.prompt is None:
        note.print("the prompt is not known: no message in the queue or with a worker has the job")
    if text and not found.texts:
        note.print("there is no text: the job has not ended with one")


def _lines(found: JobDetails) -> list[tuple[str, str]]:
    """The fields of a job that are known, each with its name, in the order of the job's life."""
    took = found.ended_at is not None and found.submitted_at is not None
    lines: list[tuple[str, Any]] = [
        ("job", found.id),
        ("state", found.state + (", cancellation was asked for" if found.cancel_requested else "")),
        ("model", found.model),
        ("adapter", found.adapter),
        ("owner", found.owner or None),
        ("submitted", _when(found.submitted_at)),
        ("waits until", _when(found.waits_until)),
        ("started", _when(found.started_at)),
        ("ended", _when(found.ended_at)),
        ("took", span((found.ended_at or 0) - (found.submitted_at or 0)) if took else None),
        ("worker", found.worker),
        ("attempts", found.attempts or None),
    ]
    if found.error is not None:
        lines.append(("error", f"{found.error.message} [{found.error.code}]"))
    if found.usage is not None:
        usage = f"{found.usage.prompt_tokens} of the prompt, {found.usage.completion_tokens} new"
        lines += [("tokens", usage), ("ended by", ", ".join(found.finish_reasons or ())), ("seed", found.seed)]
    if found.timings is not None:
        timings = found.timings
        parts = {"waiting": timings.waiting_s, "prompt": timings.prefill_s, "new tokens": timings.decode_s}
        lines.append(("seconds", ", ".join(f"{seconds:.3f} {part}" for part, seconds in parts.items())))
    lines.append(("fingerprint", found.fingerprint or None))
    return [(name, str(value)) for name, value in lines if value is not None]


def _when(at: float | None) -> str | None:
    """A Unix time as text."""
    try:
        return None if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):  # anybody may have written it
        return None

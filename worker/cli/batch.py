"""`headrace batch`: the requests of a file, computed into another file."""

from __future__ import annotations

from typing import Any

import click

from headrace.client import Client, SamplingParams
from headrace.client.batch.columns import Columns
from headrace.client.batch.formats.readers import LINES, READERS
from headrace.client.batch.formats.writers import OUTPUTS
from headrace.client.batch.output import STDOUT, Output
from headrace.client.batch.run import Batch, BatchReport
from headrace.client.batch.window import MAX_INFLIGHT
from headrace.client.wire.errors import InvalidRequest
from headrace.worker.cli.backends import Backends, pass_backends
from headrace.worker.cli.batch_estimate import estimate
from headrace.worker.cli.batch_input import BatchInput
from headrace.worker.cli.batch_progress import ProgressDisplay
from headrace.worker.cli.batch_report import print_cancelled, print_json, summary
from headrace.worker.cli.batch_stop import Stopped, StopRequest, end_stopped
from headrace.worker.cli.errors import FAILED, INTERRUPTED, command_errors
from headrace.worker.cli.local_stack import note, settings_for
from headrace.worker.cli.options import ADAPTER_OPTION, MODEL, PROMPT_OPTIONS, REPEATABLE, sampling_options

SAMPLING = (ADAPTER_OPTION, *SamplingParams.model_fields, *PROMPT_OPTIONS)


@click.command()
@click.option(
    "-i",
    "--input-file",
    "source",
    required=True,
    metavar="PATH",
    help="JSON lines or a table; a file, directory, pattern or URL; - is stdin",
)
@click.option(
    "-o", "--output-file", "output", metavar="PATH", help="a file or URL; gzipped if it ends in .gz; - is stdout"
)
@click.option("-e", "--error-file", "errors", metavar="PATH", help="write failed rows here, not into the output")
@click.option("--model", help=f"for rows that name none: {MODEL}")
@click.option("--text", is_flag=True, help="each line of the input is a prompt, not JSON")
@click.option(
    "-p", "--params", multiple=True, metavar="NAME=VALUE", help=f"parameter of rows that do not set it; {REPEATABLE}"
)
@sampling_options
@click.option(
    "--format",
    "kind",
    type=click.Choice((*LINES, *READERS, "flat")),
    help="of the input, by default its extension; flat is --output-format flat",
)
@click.option(
    "--output-format",
    type=click.Choice(OUTPUTS),
    help="by default its extension; openai: lines of the Batch API; others: one flat row for each request",
)
@click.option("--prompt-column", metavar="NAME", help="the column of the prompt  [default: prompt]")
@click.option("--id-column", metavar="NAME", help="the column of custom_id  [default: custom_id, if there is one]")
@click.option("--params-columns", metavar="NAMES", help="columns that are parameters, with commas between them")
@click.option("--skip-invalid", is_flag=True, help="write faulty rows as failed ones, with -e into its file, and go on")
@click.option("--shard", metavar="I/N", help="every N-th row from the I-th (from 0), to share a file among machines")
@click.option("--resume", is_flag=True, help="compute only rows that the output does not have")
@click.option("--retry-errors", is_flag=True, help="like --resume, and compute failed rows again")
@click.option("--overwrite", is_flag=True, help="compute all rows again")
@click.option("--cancel", is_flag=True, help="compute nothing; cancel what a stopped run of this command left queued")
@click.option("--max-inflight", type=int, default=MAX_INFLIGHT, show_default=True, help="rows queued at a time")
@click.option("--ordered", is_flag=True, help="write rows in the order of the input, not as they end")
@click.option("--limit", type=click.IntRange(min=1), help="compute only this many rows, from the start of the input")
@click.option("--dry-run", is_flag=True, help="count tokens and estimate the time from a sample; write no output")
@click.option("--json", "as_json", is_flag=True, help="print the summary as JSON")
@pass_backends
def batch(
    backends: Backends,
    /,
    source: str,
    model: str | None,
    params: tuple[str, ...],
    text: bool,
    limit: int | None,
    dry_run: bool,
    as_json: bool,
    kind: str | None,
    prompt_column: str | None,
    id_column: str | None,
    params_columns: str | None,
    shard: str | None,
    skip_invalid: bool,
    **options: Any,
) -> None:
    """Compute the requests of a file into another file; each result is written when it is done.

    Input lines are those of the OpenAI Batch API (custom_id, method, url, body), or {"prompt": ..., parameters}, or
    with --text prompts; output lines are those of the Batch API. Tables (CSV, TSV, Parquet, Arrow) are known by their
    extensions, as input and as output. The whole input is checked before anything is queued.
    However the command ends, --resume continues it.

    Uses the worker that serves the model; if none runs and HEADRACE_REDIS_URL is not set, starts an embedded Redis and
    a worker for this call. Exit code 0 if all rows succeeded, 1 if some failed, 2 if the input is wrong.
    """
    sampling = {name: options.pop(name) for name in SAMPLING}
    if kind == "flat":
        kind, options["output_format"] = None, options["output_format"] or "flat"
    with command_errors(as_json):
        chosen = {
            "format": kind,
            "columns": _columns(prompt_column, id_column, params_columns),
            "shard": _shard(shard),
            "skip_invalid": skip_invalid,
        }
        given = BatchInput(source, model, params, text, limit, chosen, sampling)
        if dry_run:
            estimate(backends, given, max_inflight=options["max_inflight"], as_json=as_json)
        else:
            run_batch(backends, given, as_json=as_json, **options)


def _columns(prompt: str | None, custom_id: str | None, params: str | None) -> Columns | None:
    if prompt is custom_id is params is None:
        return None
    names = [name.strip() for name in (params or "").split(",") if name.strip()]
    return Columns("prompt" if prompt is None else prompt, custom_id, names)


def _shard(given: str | None) -> tuple[int, int]:
    """Raises InvalidRequest."""
    if given is None:
        return 0, 1
    index, _, count = given.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise InvalidRequest("shard", repr(given)[:80], "I/N with 0 <= I < N, for example 0/3")
    return int(index), int(count)


def run_batch(backends: Backends, given: BatchInput, *, output: str | None, as_json: bool, **options: Any) -> None:
    """Check, compute, report. `options` are those of `client.bulk.Batch.run`.

    Raises:
        SystemExit: rows failed, or the user stopped it.
        HeadraceError, SettingsError, EmbeddedRedisError: nothing, or nothing more, could be computed.
    """
    if output is None:
        raise InvalidRequest("output-file", "none", "-o PATH, or --dry-run")
    _check_options(given.source, output, as_json=as_json, **options)
    settings, display, report = settings_for(given.model), ProgressDisplay(note), BatchReport()
    checked = given.check(backends, settings, display)
    if options["cancel"]:
        with Client(settings=settings) as checked.client:
            print_cancelled(_cancel(checked, output, options), as_json=as_json)
        return
    with backends.find_or_start_stack(settings) as stack:
        checked.client = stack.client

        def show_progress(now: BatchReport) -> None:
            nonlocal report
            report = now
            stop.check()
            stack.supervise()
            display.update(now)

        if options["resume"] or options["retry_errors"]:
            display.notify(f"resuming {output}")
        try:
            with StopRequest() as stop, display.shown():
                checked.run(output, notify=display.notify, on_progress=show_progress, **options)
        except Stopped:
            end_stopped(report, lambda: _cancel(checked, output, options).outstanding, local=stack.local)
            raise SystemExit(INTERRUPTED) from None
    note.print(summary(report, output, options["errors"]), soft_wrap=True, markup=False)
    if as_json:
        print_json(report)
    if report.failed or report.failed_before:
        raise SystemExit(FAILED)


def _cancel(batch: Batch, output: str, options: dict[str, Any]) -> BatchReport:
    """Cancel what a stopped run of the command left in the queue."""
    again = {"resume": True, "retry_errors": False, "overwrite": False, "cancel": True}
    return batch.run(output, **{**options, **again})


def _check_options(source: str, output: str, *, as_json: bool, **options: Any) -> None:
    """Refuse options that contradict each other, and an output that cannot be written, before anything is read."""
    resume = options["resume"] or options["retry_errors"] or options["cancel"]
    if output == STDOUT and (as_json or resume or options["overwrite"]):
        raise InvalidRequest("output-file", "'-'", "a file, for --json, --resume, --retry-errors and --overwrite")
    if options["overwrite"] and resume:
        raise InvalidRequest("overwrite", "--resume beside it", "one of them")
    if options["errors"] == STDOUT:
        raise InvalidRequest("error-file", "'-'", "a file")
    with Output(output, options["errors"], form=options["output_format"]) as sink:
        sink.check_free(source, resume=resume, overwrite=options["overwrite"])

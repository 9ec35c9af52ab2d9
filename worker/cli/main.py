"""The `headrace` command. Torch is loaded only by what needs it: `up`, and the worker that `generate` may start."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar, get_args

import click
from rich.console import Console
from rich.table import Table

from headrace import __version__
from headrace.client import Client, NoWorker, RedisUnreachable, Result, ResultTimeout, SamplingParams, Status
from headrace.client.batch.window import MAX_INFLIGHT
from headrace.client.wire.errors import HeadraceError, InvalidBatch, InvalidRequest, OutputRefused
from headrace.client.wire.keys import dead, queue
from headrace.client.wire.requests import parse_request
from headrace.config import SettingsError, load_settings
from headrace.worker.cli.local_stack import NothingRuns, note, own_pair, serving, settings_for
from headrace.worker.redis_server import EmbeddedRedisError

#: Exit codes: 0 done, 1 the job ended without a result, 2 wrong input, 3 nothing to run it, 4 not in time.
FAILED, WRONG_INPUT, NOT_RUNNING, TIMED_OUT, INTERRUPTED = 1, 2, 3, 4, 130

MANY = "may be given several times"
MODEL = "a model by name, as HEADRACE_MODEL; the first of those by default"

F = TypeVar("F", bound=Callable[..., Any])


class CommandFailed(click.ClickException):
    """Ends a command with a code, and a message on standard error or, with --json, an object on standard output."""

    def __init__(self, error: Exception, as_json: bool) -> None:
        super().__init__(str(error))
        self.error, self.as_json = error, as_json
        self.exit_code = _exit_code(error)  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:  # noqa: ARG002
        """Called by click."""
        if self.as_json:
            code = getattr(self.error, "code", None) or type(self.error).__name__
            click.echo(json.dumps({"error": {"code": code, "message": str(self.error)}}))
        else:
            click.echo(f"headrace: {self.error}", err=True)


def _exit_code(error: Exception) -> int:
    if isinstance(error, (InvalidRequest, InvalidBatch, OutputRefused, SettingsError)):
        return WRONG_INPUT
    if isinstance(error, (RedisUnreachable, NoWorker, EmbeddedRedisError, NothingRuns)):
        return NOT_RUNNING
    return TIMED_OUT if isinstance(error, ResultTimeout) else FAILED


@contextlib.contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    try:
        yield
    except (HeadraceError, SettingsError, EmbeddedRedisError) as error:
        raise CommandFailed(error, as_json) from error


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="headrace")
def main() -> None:
    """Turn a queue of prompts into text with GPT-2, many at a time.

    Settings are HEADRACE_* environment variables; see config/dev.env.
    """


@main.command()
def up() -> None:
    """Run a worker in the foreground, with an embedded Redis unless one is set or runs here."""
    with _errors(as_json=False):
        load_settings()
    from headrace.worker.celery import app

    app.worker_main(["worker", "--without-gossip", "--without-mingle"])


def sampling_options(command: F) -> F:
    """An option for every sampling parameter, named and described as in client.wire.requests."""
    for name, field in reversed(SamplingParams.model_fields.items()):
        flag = "--" + name.replace("_", "-")
        kinds = {field.annotation, *get_args(field.annotation)}
        option: Any
        if field.annotation is bool:
            option = click.option(flag, is_flag=True, default=None, help=_option_help(name))
        elif name in ("stop", "stop_token_ids"):
            kind = int if name == "stop_token_ids" else str
            option = click.option(flag, type=kind, multiple=True, help=MANY)
        elif name == "logit_bias":
            option = click.option(flag, multiple=True, metavar="ID=BIAS", help=MANY)
        else:
            option = click.option(flag, type=int if int in kinds else float, help=field.description)
        command = option(command)
    return command


def _option_help(name: str) -> str:
    return {"echo": "begin the text with the prompt", "ignore_eos": "go on past the end of the text"}[name]


@main.command()
@click.argument("prompt")
@click.option("--model", help=MODEL)
@sampling_options
@click.option("--timeout", type=float, default=300, show_default=True, help="seconds to wait for the result")
@click.option("--json", "as_json", is_flag=True, help="print the whole result as JSON")
def generate(prompt: str, model: str | None, timeout: float, as_json: bool, **params: Any) -> None:
    """Generate text after PROMPT ('-' reads it from standard input).

    Uses the worker that serves the model; if none runs and HEADRACE_REDIS_URL is not set, starts an embedded Redis
    and a worker for this call.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    with _errors(as_json):
        given = _given(params)
        parse_request({"prompt": prompt, **given})  # before anything is started for it
        settings = settings_for(model)
        with serving(settings.only(settings.model_name)) as served:
            result = served.client.submit(prompt, **given).result(timeout)
    if as_json:
        click.echo(result.model_dump_json())
    else:
        _print_result(result)


def _given(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters that were given, as `submit` takes them."""
    given = {name: list(v) if isinstance(v, tuple) else v for name, v in params.items() if v is not None and v != ()}
    if "logit_bias" in given:
        try:
            pairs = [item.split("=", 1) for item in given["logit_bias"]]
            given["logit_bias"] = {int(token): float(bias) for token, bias in pairs}
        except ValueError:
            raise InvalidRequest("logit_bias", repr(given["logit_bias"]), "ID=BIAS, for example 50256=-100") from None
    return given


@main.command()
@click.option(
    "-i", "--input-file", "source", required=True, metavar="PATH", help="JSON lines, gzipped or not; - is stdin"
)
@click.option("-o", "--output-file", "output", metavar="PATH", help="zipped if it ends in .gz; - is stdout")
@click.option("-e", "--error-file", "errors", metavar="PATH", help="failures go here instead of into the output")
@click.option("--model", help=f"{MODEL}, for rows that name none")
@click.option("--text", is_flag=True, help="each line of the input is a prompt as it stands")
@click.option("-p", "--params", multiple=True, metavar="NAME=VALUE", help=f"for rows that do not say it; {MANY}")
@click.option("--resume", is_flag=True, help="compute only what the output does not have")
@click.option("--retry-errors", is_flag=True, help="like --resume, and compute failures again")
@click.option("--overwrite", is_flag=True, help="compute all again")
@click.option("--max-inflight", type=int, default=MAX_INFLIGHT, show_default=True, help="rows queued at a time")
@click.option("--ordered", is_flag=True, help="write rows in the order of the input, not as they end")
@click.option("--limit", type=click.IntRange(min=1), help="only the first rows")
@click.option("--dry-run", is_flag=True, help="count tokens and estimate the time from a few rows; nothing is written")
@click.option("--json", "as_json", is_flag=True, help="print the summary as JSON")
def batch(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Compute the requests of a file into another, each written when it is done.

    Input lines are those of the OpenAI Batch API (custom_id, method, url, body), or {"prompt": ..., parameters}, or
    with --text prompts; output lines are those of the Batch API. The whole input is checked before anything is queued.
    After any kind of death, --resume goes on.

    Uses the worker that serves the model; if none runs and HEADRACE_REDIS_URL is not set, starts an embedded Redis and
    a worker for this call. Exit code 0 if all rows succeeded, 1 if some failed, 2 if the input is wrong.
    """
    from headrace.worker.cli.bulk import estimate, run_batch

    with _errors(as_json):
        if dry_run:
            estimate(as_json=as_json, **options)
        else:
            run_batch(as_json=as_json, **options)


def _print_result(result: Result) -> None:
    for choice in result.choices:
        if len(result.choices) > 1:
            note.print(f"--- {choice.index + 1} of {len(result.choices)}", style="dim")
        click.echo(choice.text)
    timings = result.timings
    seconds = timings.prefill_s + timings.decode_s
    note.print(
        f"{result.usage.completion_tokens} tokens in {seconds:.2f} s, {result.usage.completion_tokens / seconds:.0f} "
        f"tokens/s; model {result.model}, seed {result.seed}, {result.choices[0].finish_reason}",
        style="dim",
    )


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="the address to listen at")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="0 takes a free one")
@click.option("--api-key", "api_keys", multiple=True, help=f"beside HEADRACE_API_KEYS; {MANY}")
@click.option("--insecure", is_flag=True, help="without keys, answer everybody on the network")
@click.option("--cors", multiple=True, metavar="ORIGIN", help=f"let pages of this origin ask; {MANY}")
@click.option("--files", metavar="DIR", help="where files and batches lie; HEADRACE_FILES_DIR by default")
@click.option("--timeout", type=click.FloatRange(min=0.1), help="seconds that a request may take; 600 by default")
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="with each key; no limit by default")
@click.option("--max-body-bytes", type=click.IntRange(min=1), help="of a request; 4 MiB by default")
@click.option("--max-file-bytes", type=click.IntRange(min=1), help="of an uploaded file; 200 MiB by default")
@click.option("--max-files-bytes", type=click.IntRange(min=1), help="of all files together; 20 GiB by default")
def serve(**options: Any) -> None:
    """Answer HTTP as the OpenAI API does: completions, models, files, batches; /execute and /health.

    Requests go to the queue, whatever workers there are; no model is loaded here. See docs/http.md.
    """
    with _errors(as_json=False):
        try:
            from headrace.client.http.serve import serve as run_server
        except ModuleNotFoundError as error:
            missing = f"headrace serve needs {error.name}, which comes with an extra: pip install 'headrace[http]'"
            raise CommandFailed(NothingRuns(missing), as_json=False) from None
        given = {name: value for name, value in options.items() if value is not None}
        run_server(load_settings(), tell=lambda line: click.echo(line, err=True), **given)


@main.command()
@click.option("--model", help=MODEL)
@click.option(
    "--reference",
    "references",
    multiple=True,
    help="transformers, tinygrad, candle, or a file of tensors (safetensors, npz, npy); may be given several times; "
    "all that are installed by default",
)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16", "int8"]), default="float32", show_default=True
)
@click.option("--prompt", "prompts", multiple=True, help="check this prompt instead of the usual ones; may be repeated")
@click.option("--plot", type=click.Path(dir_okay=False), help="draw the difference by layer and position into a PNG")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def validate(
    model: str | None,
    references: tuple[str, ...],
    dtype: str,
    prompts: tuple[str, ...],
    plot: str | None,
    as_json: bool,
) -> None:
    """Compare the model, tensor by tensor, with other implementations: the thirteen checkpoints.

    Starts an embedded Redis and a worker of its own, so that the tensors come from the path that serves jobs. Exit code
    0 only if every checkpoint holds.
    """
    with _errors(as_json):
        from headrace.worker.fidelity.validate import Validation, report_json, report_text

        settings = settings_for(model, dtype=dtype)
        settings = settings.only(settings.model_name)
        validation = Validation(settings, references, prompts)
        with own_pair(settings) as pair, note.status("comparing") as shown:
            reports = validation.run(pair.client, shown.update)
        if plot:
            validation.draw(plot)
    click.echo(report_json(reports) if as_json else report_text(reports))
    if not all(report.ok for report in reports):
        raise SystemExit(FAILED)


@main.command()
@click.option("--here", is_flag=True, help="look at the workers of this host only, as a health check does")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def status(here: bool, as_json: bool) -> None:
    """Show queues, workers and slots.

    Exit code 0 if workers serve all of HEADRACE_MODEL and none that does is stalled, 1 if one is stalled, 3 if none
    serves one of the models.
    """
    with _errors(as_json):
        settings = load_settings()
        with Client(settings=settings) as client:
            found = client.status()
    if here:
        own = [worker for worker in found.workers if worker.host == socket.gethostname()]
        found = found.model_copy(update={"workers": own})
    if as_json:
        click.echo(found.model_dump_json())
    else:
        _print_status(found)
    if stalled := [worker for name in settings.models for worker in found.stalled(name)]:
        if not as_json:
            note.print(f"stalled: {', '.join(stalled)}; the engine is stuck in a step, restart the worker")
        raise SystemExit(FAILED)
    if missing := [name for name in settings.models if not found.serves(name)]:
        if not as_json:
            note.print(f"no worker serves {queue(missing[0])}; start one with `celery -A worker worker`")
        raise SystemExit(NOT_RUNNING)


def _print_status(found: Status) -> None:
    console = Console()
    columns = ("worker", "model", "slots", "running", "waiting", "tokens/s")
    workers = Table(*columns, title="Workers", title_justify="left")
    for w in found.workers:
        speed = f"{w.tokens_per_s:.0f}" if w.loaded else "not loaded"
        speed = f"stalled for {w.step_age_s:.0f} s" if w.stalled else speed
        workers.add_row(w.name, w.model, str(w.slots), str(w.running), str(w.waiting), speed)
    queues = Table("model", "interactive", "normal", "bulk", title="Queues", title_justify="left")
    for q in found.queues:
        queues.add_row(q.model, str(q.interactive), str(q.normal), str(q.bulk))
    console.print(workers, queues, f"{found.delivered} jobs are with workers")
    if found.dead:
        console.print(f"{found.dead} messages could not be understood; the list {dead()} says what they were")


def run() -> None:
    """The entry point: like `main`, and a signal to end cleans up, and --json speaks JSON about wrong options too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _exit_on_signal)
    try:
        main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except click.Abort:
        raise SystemExit(INTERRUPTED) from None
    except click.UsageError as error:
        if "--json" not in sys.argv:
            error.show()
        else:
            click.echo(json.dumps({"error": {"code": "UsageError", "message": error.format_message()}}))
        raise SystemExit(WRONG_INPUT) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None


def _exit_on_signal(number: int, _: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    run()

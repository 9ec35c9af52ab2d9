"""`headrace generate`: the text after one prompt."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import click

from headrace.client import Client, HeadraceError, Job, Result
from headrace.client.jobs.ahead import NOTICE_S, waiting_notice
from headrace.client.wire import keys
from headrace.client.wire.requests import parse_request
from headrace.worker.cli.backends import Backends, pass_backends
from headrace.worker.cli.errors import command_errors
from headrace.worker.cli.local_stack import note, settings_for
from headrace.worker.cli.options import MODEL, given_params, sampling_options


@click.command()
@click.argument("prompt")
@click.option("--model", help=MODEL)
@click.option("--chat", is_flag=True, help="send PROMPT as a user's message, in the form of the model's chat template")
@click.option("--system", metavar="TEXT", help="like --chat, with this message of the system before it")
@sampling_options
@click.option("--timeout", type=float, default=300, show_default=True, help="seconds to wait for the result")
@click.option("--json", "as_json", is_flag=True, help="print the whole result as JSON")
@pass_backends
def generate(
    backends: Backends,
    /,
    prompt: str,
    model: str | None,
    chat: bool,
    system: str | None,
    timeout: float,
    as_json: bool,
    **params: Any,
) -> None:
    """Generate text after PROMPT ('-' reads it from standard input).

    Uses the worker that serves the model; if none runs and HEADRACE_REDIS_URL is not set, starts an embedded Redis
    and a worker for this call.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    with command_errors(as_json):
        given = {**_source(prompt, chat, system), **given_params(params)}
        parse_request(given)  # before anything is started for it
        settings = settings_for(model)
        with backends.find_or_start_stack(settings.only(settings.model_name)) as stack:
            job = stack.client.submit(**given)
            with contextlib.nullcontext() if stack.local else _notice(stack.client, job):
                result = job.result(timeout)
    if as_json:
        click.echo(result.model_dump_json())
    else:
        _print_result(result)


@contextlib.contextmanager
def _notice(client: Client, job: Job) -> Iterator[None]:
    """In the block, say so after some seconds if the job waits behind those of others."""

    def say() -> None:
        with contextlib.suppress(HeadraceError):
            line = waiting_notice(client.reader, job.id, client.model_name, keys.PRIORITIES["normal"])
            if line is not None:
                note.print(line)

    timer = threading.Timer(NOTICE_S, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def _source(prompt: str, chat: bool, system: str | None) -> dict[str, Any]:
    """The prompt, or the messages of a chat."""
    if not chat and system is None:
        return {"prompt": prompt}
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, {"role": "user", "content": prompt}]}


def _print_result(result: Result) -> None:
    for choice in result.choices:
        if len(result.choices) > 1:
            note.print(f"--- {choice.index + 1} of {len(result.choices)}", style="dim")
        click.echo(choice.text)
    timings = result.timings
    adapter = "" if result.adapter is None else f", adapter {result.adapter}"
    seconds = timings.prefill_s + timings.decode_s
    note.print(
        f"{result.usage.completion_tokens} tokens in {seconds:.2f} s, {result.usage.completion_tokens / seconds:.0f} "
        f"tokens/s; model {result.model}{adapter}, seed {result.seed}, {result.choices[0].finish_reason}",
        style="dim",
    )

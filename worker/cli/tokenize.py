"""`headrace tokenize`: the token ids of a text."""

from __future__ import annotations

import sys
from typing import Any

import click

from headrace.client.wire.requests import parse_request
from headrace.worker.cli.backends import Backends, pass_backends
from headrace.worker.cli.errors import command_errors
from headrace.worker.cli.local_stack import note, settings_for
from headrace.worker.cli.options import MODEL, PROMPT_OPTIONS, field_options, given_params


@click.command()
@click.argument("prompt")
@click.option("--model", help=MODEL)
@field_options(PROMPT_OPTIONS)
@click.option("--timeout", type=float, default=300, show_default=True, help="seconds to wait for the answer")
@click.option("--json", "as_json", is_flag=True, help="print ids, names and the model's context as JSON")
@pass_backends
def tokenize(
    backends: Backends, /, prompt: str, model: str | None, timeout: float, as_json: bool, **params: Any
) -> None:
    """Print the token ids of PROMPT ('-' reads it from standard input).

    Uses a worker as `headrace generate` does.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    with command_errors(as_json):
        given = {"prompt": prompt, **given_params(params)}
        parse_request(given)  # before anything is started for it
        settings = settings_for(model)
        with backends.find_or_start_stack(settings.only(settings.model_name)) as stack:
            found = stack.client.tokenize(**given, timeout=timeout)
    if as_json:
        click.echo(found.model_dump_json())
    else:
        click.echo(" ".join(map(str, found.tokens)))
        note.print(f"{found.count} tokens; the model reads {found.max_model_len}", style="dim")

"""The group of commands, and the entry point that handles signals and wrong options."""

from __future__ import annotations

import json
import signal
import sys

import click

from headrace import __version__
from headrace.worker.cli.batch import batch
from headrace.worker.cli.cancel import cancel, purge
from headrace.worker.cli.convert import convert
from headrace.worker.cli.errors import INTERRUPTED, WRONG_INPUT
from headrace.worker.cli.generate import generate
from headrace.worker.cli.jobs import job, jobs
from headrace.worker.cli.serve import serve
from headrace.worker.cli.status import status
from headrace.worker.cli.tokenize import tokenize
from headrace.worker.cli.up import up
from headrace.worker.cli.validate import validate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="headrace")
def main() -> None:
    """Turn a queue of prompts into text with GPT-2, many at a time.

    Settings are HEADRACE_* environment variables; see config/dev.env.
    """


for command in (up, generate, tokenize, batch, serve, validate, convert, status, jobs, job, cancel, purge):
    main.add_command(command)


def run() -> None:
    """The entry point: `main`, with cleanup after a signal, and wrong options reported as JSON if --json is given."""
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

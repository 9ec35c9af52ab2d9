"""`headrace up`: a worker in the foreground."""

from __future__ import annotations

import contextlib
import os
import warnings

import click

from headrace.worker.cli.errors import command_errors
from headrace.worker.cli.local_stack import NothingRuns, check_worker_packages, settings_for
from headrace.worker.cli.worker_lines import WorkerLines, are_for_people
from headrace.worker.redis_server import EmbeddedRedis


@click.command()
@click.option("--model", help="what to serve, as in HEADRACE_MODEL: a name, a directory, NAME=DIRECTORY, or several")
@click.option(
    "--repair-redis",
    is_flag=True,
    help="First set a damaged data file of the embedded Redis aside, and keep the part of it that can be read.",
)
@click.option(
    "--generation-config",
    type=click.Choice(["none", "auto"]),
    help="Where parameters that a request does not set come from: auto is the model's generation_config.json. "
    "The same as HEADRACE_GENERATION_CONFIG.",
)
def up(*, model: str | None, repair_redis: bool, generation_config: str | None) -> None:
    """Run a worker in the foreground, with an embedded Redis unless one is configured or runs here."""
    with command_errors(as_json=False):
        if repair_redis:
            click.echo(EmbeddedRedis().repair(), err=True)
        if generation_config is not None:
            os.environ["HEADRACE_GENERATION_CONFIG"] = generation_config  # the app reads the settings from there
        settings = settings_for(model)
        if model is not None:
            os.environ |= {"HEADRACE_MODEL": settings.model, "HEADRACE_SERVED_NAME": settings.served_name or ""}
        check_worker_packages()
        with WorkerLines(settings) if are_for_people(settings) else contextlib.nullcontext():
            raise SystemExit(run_worker())


def run_worker() -> int:
    """Run a worker in this process until a signal ends it, as the `celery` command does. Returns the exit code.

    Raises:
        NothingRuns: a model cannot be loaded.
    """
    import celery.apps.worker
    from celery.exceptions import SecurityWarning

    from headrace.worker.celery import app  # reads the settings, and registers what starts an embedded Redis server

    # Celery says that a second Ctrl-C terminates all tasks. Here their messages go back to the queue.
    celery.apps.worker.safe_say = lambda *_: None
    # Its warning about root is about workers that take pickles, which this one refuses.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    # Without the banner: otherwise the reason why a worker cannot start would follow twenty lines of it.
    code = app.start(["--quiet", "worker", "--without-gossip", "--without-mingle"])
    if (reason := getattr(app, "headrace_unavailable", None)) is not None:
        raise NothingRuns(reason)
    return int(code or 0)

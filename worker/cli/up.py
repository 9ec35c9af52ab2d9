"""`headrace up`: a worker in the foreground."""

from __future__ import annotations

import os

import click

from headrace.config import load_settings
from headrace.worker.cli.errors import command_errors
from headrace.worker.cli.local_stack import NothingRuns, check_worker_packages
from headrace.worker.redis_server import EmbeddedRedis


@click.command()
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
def up(*, repair_redis: bool, generation_config: str | None) -> None:
    """Run a worker in the foreground, with an embedded Redis unless one is configured or runs here."""
    with command_errors(as_json=False):
        if repair_redis:
            click.echo(EmbeddedRedis().repair(), err=True)
        if generation_config is not None:
            os.environ["HEADRACE_GENERATION_CONFIG"] = generation_config  # the app reads the settings from there
        load_settings()
        check_worker_packages()
        raise SystemExit(run_worker())


def run_worker() -> int:
    """Run a worker in this process until a signal ends it, as the `celery` command does. Returns the exit code.

    Raises:
        NothingRuns: a model cannot be loaded.
    """
    from headrace.worker.celery import app  # reads the settings, and registers what starts an embedded Redis server

    # Without the banner: otherwise the reason why a worker cannot start would follow twenty lines of it.
    code = app.start(["--quiet", "worker", "--without-gossip", "--without-mingle"])
    if (reason := getattr(app, "headrace_unavailable", None)) is not None:
        raise NothingRuns(reason)
    return int(code or 0)

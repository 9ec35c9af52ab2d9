"""`headrace up`: a worker in the foreground."""

from __future__ import annotations

import click

from headrace.config import load_settings
from headrace.worker.cli.errors import command_errors
from headrace.worker.cli.local_stack import check_worker_packages


@click.command()
def up() -> None:
    """Run a worker in the foreground, with an embedded Redis unless one is set or runs here."""
    with command_errors(as_json=False):
        load_settings()
        check_worker_packages()
    from headrace.worker.celery import app

    app.worker_main(["worker", "--without-gossip", "--without-mingle"])

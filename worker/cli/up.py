"""`headrace up`: a worker in the foreground."""

from __future__ import annotations

import click

from headrace.config import load_settings
from headrace.worker.cli.errors import command_errors


@click.command()
def up() -> None:
    """Run a worker in the foreground, with an embedded Redis unless one is set or runs here."""
    with command_errors(as_json=False):
        load_settings()
    from headrace.worker.celery import app

    app.worker_main(["worker", "--without-gossip", "--without-mingle"])

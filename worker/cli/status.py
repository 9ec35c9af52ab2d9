"""`headrace status`: queues, workers and slots."""

from __future__ import annotations

import socket

import click
from rich.console import Console
from rich.table import Table

from headrace.client import Client, Status
from headrace.client.wire.keys import dead, queue
from headrace.config import load_settings
from headrace.worker.cli.errors import FAILED, NOT_RUNNING, command_errors
from headrace.worker.cli.local_stack import note


@click.command()
@click.option("--here", is_flag=True, help="check only the workers of this host, as a health check does")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def status(here: bool, as_json: bool) -> None:
    """Show queues, workers and slots.

    Exit code 0 if workers serve all of HEADRACE_MODEL and none of them is stalled, 1 if one is stalled, 3 if none
    serves one of the models.
    """
    with command_errors(as_json):
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
            note.print(f"no worker serves {queue(missing[0])}; start one with `celery -A headrace.worker worker`")
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
        console.print(f"{found.dead} messages could not be read; the list {dead()} contains them")
    for place in found.misplaced:
        console.print(f"{place.messages} messages for headrace are in the list {place.key}: {place.advice}")

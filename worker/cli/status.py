"""`headrace status`: queues, workers and slots."""

from __future__ import annotations

import socket
import time

import click
from rich.console import Console
from rich.table import Table

from headrace.client import Client, Status
from headrace.client.wire.adapters import totals
from headrace.client.wire.clock import SKEW_S
from headrace.client.wire.keys import dead, queue
from headrace.client.wire.model_description import ModelDescription, printable
from headrace.client.wire.redis import resolve_url
from headrace.client.wire.start_advice import start_worker
from headrace.client.wire.suitability import ServerReport
from headrace.config import load_settings
from headrace.worker.cli.errors import FAILED, NOT_RUNNING, command_errors
from headrace.worker.cli.local_stack import note

#: The most adapters of a model that are listed.
SHOWN_ADAPTERS = 50


@click.command()
@click.option("--here", is_flag=True, help="check only the workers of this host, as a health check does")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def status(here: bool, as_json: bool) -> None:
    """Show queues, workers and slots.

    Exit code 0 if workers serve all of HEADRACE_MODEL and none of them is stalled, 1 if one is stalled, 3 if none
    serves one of the models. Without --here also 1 if the settings of Redis lose jobs.
    """
    with command_errors(as_json):
        settings = load_settings()
        with Client(settings=settings) as client:
            found = client.status().model_copy(update={"redis": client.reader.server_report()})
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
    if not here and found.redis and found.redis.problems and settings.redis_unsuitable == "refuse":
        raise SystemExit(FAILED)
    if missing := [name for name in settings.models if not found.serves(name)]:
        if not as_json:
            start = start_worker(resolve_url(settings), missing, settings)
            note.print(f"no worker serves {queue(missing[0])}; start one with {start}", soft_wrap=True, markup=False)
        raise SystemExit(NOT_RUNNING)


def _print_status(found: Status) -> None:
    console = Console()
    columns = ("worker", "model", "slots", "running", "waiting", "tokens/s")
    workers = Table(*columns, title="Workers", title_justify="left")
    for w in found.workers:
        speed = f"{w.tokens_per_s:.0f}" if w.loaded else "not loaded"
        speed = f"stalled for {w.step_age_s:.0f} s" if w.stalled else speed
        workers.add_row(w.name, w.model, str(w.slots), str(w.running), str(w.waiting), speed)
    described = {w.model: w.description for w in reversed(found.workers) if w.description is not None}
    queues = Table("model", "interactive", "normal", "bulk", title="Queues", title_justify="left")
    for q in found.queues:
        queues.add_row(q.model, str(q.interactive), str(q.normal), str(q.bulk))
    console.print(workers, queues, f"{found.delivered} jobs are with workers")
    if scheduled := sum(worker.scheduled for worker in found.workers):
        console.print(f"{scheduled} of them wait for their ETA or for a rate limit")
    for model, description in sorted(described.items()):
        _print_model(console, model, description)
    _print_adapters(console, found)
    if found.redis:
        _print_server(console, found.redis)
    skews = {w.host: w.clock_skew_s for w in found.workers} | {"this machine": time.time() - found.at}
    for host, skew_s in skews.items():
        if abs(skew_s) > SKEW_S:
            side = "ahead of" if skew_s > 0 else "behind"
            console.print(f"The clock of {host} is {abs(skew_s):.0f} s {side} Redis'", soft_wrap=True, highlight=False)
    for model in sorted({w.model for w in found.workers}):
        if models := found.different_models(model):
            served = "; ".join(f"{name} by {', '.join(workers)}" for name, workers in models.items())
            console.print(f"Workers serve different models as {model}: {served}", soft_wrap=True, highlight=False)
        if phrases := found.different_adapters(model):
            shown = f"Workers of {model} have different adapters: {'; '.join(phrases)}"
            console.print(shown, soft_wrap=True, highlight=False, markup=False)
    if found.dead:
        console.print(f"{found.dead} messages could not be read; the list {dead()} contains them")
    for place in found.misplaced:
        console.print(f"{place.messages} messages for headrace are in the list {place.key}: {place.advice}")


def _print_model(console: Console, model: str, description: ModelDescription) -> None:
    """What the model's first worker understood of its files."""
    for line in [f"{model}: {description.summary()}", *(f"  {printable(text)}" for text in description.notes)]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _print_adapters(console: Console, found: Status) -> None:
    """The adapters of all models, at most SHOWN_ADAPTERS of each."""
    table = Table(
        *("adapter", "model", "in memory of", "rank", "bytes", "running", "finished", "tokens"),
        title="Adapters",
        title_justify="left",
    )
    for model in sorted({w.model for w in found.workers}):
        adapters = totals(w.adapters or () for w in found.workers if w.model == model)
        for each in adapters[:SHOWN_ADAPTERS]:
            size = (str(each.rank), f"{each.nbytes:,}") if each.loaded else ("", "")
            loaded = f"{each.loaded} of {each.workers} workers"
            table.add_row(each.name, model, loaded, *size, str(each.running), str(each.jobs), str(each.tokens))
        if len(adapters) > SHOWN_ADAPTERS:
            table.add_row(f"and {len(adapters) - SHOWN_ADAPTERS} more", model)
    if table.rows:
        console.print(table)


def _print_server(console: Console, report: ServerReport) -> None:
    parts = [report.server or "unknown server"]
    parts += [f"maxmemory-policy {report.eviction}"] if report.eviction else []
    parts += [f"on disk: {report.persistence}"] if report.persistence else []
    console.print(f"Redis: {', '.join(parts)}", soft_wrap=True, highlight=False, markup=False)
    if report.unchecked:
        console.print(f"Redis cannot be checked: {report.unchecked}", soft_wrap=True, highlight=False, markup=False)
    for finding in report.problems:
        console.print(f"Redis loses jobs: {finding}", soft_wrap=True, highlight=False, markup=False)
    for finding in report.warnings:
        console.print(f"Redis may lose jobs: {finding}", soft_wrap=True, highlight=False, markup=False)

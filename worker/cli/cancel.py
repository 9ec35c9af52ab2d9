"""`headrace cancel` and `headrace purge`: end jobs."""

from __future__ import annotations

import json
import sys

import click

from headrace.client import Client, UnknownJob
from headrace.client.jobs.cancelling import CANCEL_JOBS
from headrace.config import load_settings
from headrace.config.model_names import slug
from headrace.worker.cli.errors import FAILED, command_errors
from headrace.worker.cli.jobs import ONE_MODEL
from headrace.worker.cli.local_stack import note


@click.command()
@click.argument("job_ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="cancel all jobs of the model, whoever submitted them")
@click.option("--model", help=f"with --all: {ONE_MODEL}")
@click.option("--yes", is_flag=True, help="with --all: do not ask")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def cancel(job_ids: tuple[str, ...], everything: bool, model: str | None, yes: bool, as_json: bool) -> None:
    """Cancel jobs, whether they wait or run.

    A job that waits ends at once. One that runs ends at its next token, and its text so far is kept. Exit code 1 if
    there is no job with one of the IDs; the others are cancelled nevertheless.

    \b
    Examples:
      headrace cancel 1f0c8a2be4d5
      headrace cancel --all --model gpt2
    """
    if bool(job_ids) == everything:
        raise click.UsageError("name the IDs of jobs, or use --all --model MODEL; `headrace jobs` lists jobs")
    if everything != (model is not None):
        raise click.UsageError("--all and --model MODEL belong together")
    with command_errors(as_json), Client(settings=load_settings()) as client:
        if model is not None:
            _confirm(f"Cancel all jobs of {slug(model)}, also those that run?", yes)
            count = client.cancel_all(slug(model))
            click.echo(json.dumps({"cancelled": count}) if as_json else f"{_jobs(count)} cancelled")
            return
        cancelled, ended, unknown = _cancel(client, list(dict.fromkeys(job_ids)))
    if as_json:
        click.echo(json.dumps({"cancelled": cancelled, "ended_before": ended, "unknown": unknown}))
    else:
        click.echo(f"{_jobs(len(cancelled))} cancelled" + (f", {len(ended)} had ended before" if ended else ""))
        for job_id in unknown:
            note.print(str(UnknownJob(job_id)), soft_wrap=True, markup=False)
    if unknown:
        raise SystemExit(FAILED)


def _cancel(client: Client, job_ids: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Cancel jobs. Returns those that had not ended, those that had, and those that do not exist."""
    cancelled, ended, unknown = list[str](), list[str](), list[str]()
    for start in range(0, len(job_ids), CANCEL_JOBS):
        part = job_ids[start : start + CANCEL_JOBS]
        while part:
            try:
                open_before = client.cancel(part)
            except UnknownJob as error:  # none of this part was cancelled
                unknown.append(error.job_id)
                part.remove(error.job_id)
                continue
            for job_id, was_open in zip(part, open_before, strict=True):
                (cancelled if was_open else ended).append(job_id)
            break
    return cancelled, ended, unknown


@click.command()
@click.option("--model", required=True, help=ONE_MODEL)
@click.option("--yes", is_flag=True, help="do not ask")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def purge(model: str, yes: bool, as_json: bool) -> None:
    """End all jobs of a model that wait, as cancelled, whoever submitted them. Jobs that run continue.

    Use it in place of `celery purge`, which deletes messages but leaves their jobs queued: whoever waits for one would
    learn only later that it is lost.
    """
    name = slug(model)
    with command_errors(as_json), Client(settings=load_settings()) as client:
        _confirm(f"End the jobs of {name} that wait, about {client.purger.count_queued(name)}, as cancelled?", yes)
        count = client.purge(name)
    click.echo(json.dumps({"cancelled": count}) if as_json else f"{_jobs(count)} ended as cancelled")


def _confirm(question: str, yes: bool) -> None:
    """Ask the user. Raises click.Abort for another answer than yes."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("nobody can be asked, because the input is not a terminal; add --yes to go ahead")
    click.confirm(question, abort=True, err=True)


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"

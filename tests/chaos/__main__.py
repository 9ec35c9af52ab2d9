"""`python -m tests.chaos --seed 1 --jobs 2000 --minutes 3`: inject faults, print the ledger. Exit code 1 on errors."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from headrace.config import load_settings
from headrace.config.logging import setup_logging
from tests.chaos.ledger import balance, table
from tests.chaos.run import Plan, run
from tests.chaos.schedule import KINDS, WAVE_S


@click.command()
@click.option("--seed", "seeds", type=int, multiple=True, help="Seed of faults and jobs; repeat it for several runs.")
@click.option("--jobs", default=2000, show_default=True, help="Number of jobs for every three minutes.")
@click.option("--minutes", default=3.0, show_default=True, help="For how long faults are injected.")
@click.option("--workers", default=2, show_default=True, help="Number of workers.")
@click.option("--slots", default=8, show_default=True, help="Slots of each worker.")
@click.option("--lease", default=4, show_default=True, help="Lease in seconds.")
@click.option(
    "--appendfsync",
    type=click.Choice(["always", "everysec"]),
    default="always",
    show_default=True,
    help="The setting of Redis.",
)
@click.option("--without", type=click.Choice(KINDS), multiple=True, help="Leave out this kind of fault.")
@click.option("--json", "file", type=click.Path(dir_okay=False), help="File for the current figures and the ledgers.")
def main(
    seeds: tuple[int, ...],
    jobs: int,
    minutes: float,
    workers: int,
    slots: int,
    lease: int,
    appendfsync: str,
    without: tuple[str, ...],
    file: str | None,
) -> None:
    """Inject faults into real workers and a real Redis, and check that every job ends once with the right outcome."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up: a stopped worker must not outlive this process
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        del os.environ[name]
    setup_logging(load_settings(log_level="error"))  # hide warnings that Redis is unreachable
    balanced = True
    ledgers: list[dict[str, Any]] = []

    def write(latest: dict[str, Any]) -> None:
        if file is not None:
            Path(f"{file}.new").write_text(json.dumps([*ledgers, latest], indent=1))
            os.replace(f"{file}.new", file)

    for seed in seeds or (1,):
        plan = Plan(
            seed=seed,
            jobs=round(jobs * max(1.0, 60 * minutes / WAVE_S)),
            span_s=60 * minutes,
            workers=workers,
            slots=slots,
            lease_s=lease,
            appendfsync=appendfsync,
            without=[kind for kind in KINDS if kind in without],
            log=lambda line: click.echo(line, err=True),
            on_figures=lambda figures, seed=seed: write({"seed": seed, "over": False, **figures}),  # type: ignore[misc]
        )
        ledger = balance(run(plan))
        write(last := {"seed": seed, "over": True, "minutes": minutes, "balanced": not ledger.wrong, **asdict(ledger)})
        ledgers.append(last)
        click.echo(table(ledger))
        balanced &= not ledger.wrong
    sys.exit(0 if balanced else 1)


if __name__ == "__main__":
    main()

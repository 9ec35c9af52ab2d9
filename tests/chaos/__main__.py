"""`python -m tests.chaos --seed 1 --jobs 2000 --minutes 3`: a storm and its ledger. Exit code 1 if it is wrong."""

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
@click.option("--seed", "seeds", type=int, multiple=True, help="Of schedule and jobs; may be given several times.")
@click.option("--jobs", default=2000, show_default=True, help="Jobs, in every three minutes.")
@click.option("--minutes", default=3.0, show_default=True, help="Length of the storm.")
@click.option("--workers", default=2, show_default=True)
@click.option("--slots", default=8, show_default=True, help="Of each worker.")
@click.option("--lease", default=4, show_default=True, help="Seconds.")
@click.option("--appendfsync", type=click.Choice(["always", "everysec"]), default="always", show_default=True)
@click.option("--without", type=click.Choice(KINDS), multiple=True, help="Leave out this kind of fault.")
@click.option("--json", "file", type=click.Path(dir_okay=False), help="Write the ledgers here; figures as it goes.")
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
    """Kill, stop, cut off and fill up real workers and a real Redis, and see that every job ends once and rightly."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no worker, stopped perhaps, outlives this
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        del os.environ[name]
    setup_logging(load_settings(log_level="error"))  # that Redis is away is no news here
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
            say=lambda line: click.echo(line, err=True),
            tell=lambda figures, seed=seed: write({"seed": seed, "over": False, **figures}),  # type: ignore[misc]
        )
        ledger = balance(run(plan))
        write(last := {"seed": seed, "over": True, "minutes": minutes, "balanced": not ledger.wrong, **asdict(ledger)})
        ledgers.append(last)
        click.echo(table(ledger))
        balanced &= not ledger.wrong
    sys.exit(0 if balanced else 1)


if __name__ == "__main__":
    main()

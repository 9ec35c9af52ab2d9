"""`python -m tests.chaos.tables --rows 2000`: kill -9 of client and worker during batches of tables.

The same rows as CSV, Parquet and JSON lines are computed into flat rows of the same format. In each run the client is
killed and restarted with `--resume`, then the worker is killed. All outputs must have each row once, with equal texts,
and so must the outputs of `--shard 0/3`, `1/3` and `2/3` together.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pyarrow
from pyarrow import dataset, parquet

from headrace.client import Client
from headrace.client.batch.columns import Columns
from headrace.worker.child_processes import die_with_parent
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, worker_on
from tests.patience import PATIENCE_S

FORMATS = ("csv", "parquet", "jsonl")
#: Rows in a part, so that a resumed run finds parts.
PART_ROWS = 4
#: The command, with small parts.
COMMAND = f"""
from headrace.client.batch import part_files
part_files.PART_ROWS = {PART_ROWS}
from headrace.worker.cli.app import run
run()
"""


def make_rows(count: int) -> list[dict[str, Any]]:
    """Rows with columns that are passed through."""
    places = ["Oslo", 'the "old" mill', "a,b\nc", None]
    return [
        {"key": f"k{i}", "text": f"The river {i} and the mill", "place": places[i % 4], "number": i}
        for i in range(count)
    ]


def write_input(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows in the format of the extension."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=100)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_output(path: Path) -> list[dict[str, Any]]:
    """The rows of an output, with what every format can say about them."""
    if path.suffix == ".parquet":
        rows = dataset.dataset(path).to_table().to_pylist()
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = ("custom_id", "text", "error", "completion_tokens", "place", "number")
    return [{name: "" if row[name] is None else str(row[name]) for name in names} for row in rows]


class Tables:
    """Runs the batches on a Redis and a worker of its own.

    Args:
        directory: for inputs and outputs.
        rows: number of rows.
        deaths: the formats in whose runs client and worker are killed.
    """

    def __init__(self, directory: Path, rows: int, deaths: Sequence[str]) -> None:
        self._directory, self._deaths, self._rows = directory, deaths, make_rows(rows)
        for extension in FORMATS:
            write_input(self._rows, directory / f"in.{extension}")
        #: What was killed, by format.
        self.killed: dict[str, list[str]] = {extension: [] for extension in FORMATS}

    def run(self) -> dict[str, list[dict[str, Any]]]:
        """The rows of each output, ordered by their numbers: one for each format, and `shards`."""
        found = {}
        with (
            EmbeddedRedis.ephemeral() as redis,
            worker_on(redis, self._directory / "worker.log", HEADRACE_SLOTS="16") as worker,
        ):
            worker.wait_ready()
            for extension in FORMATS:
                output = self._directory / f"out.{extension}"
                if extension in self._deaths:
                    self._with_deaths(redis, worker, extension, output)
                else:
                    self._undisturbed(redis, extension, output)
                found[extension] = read_output(output)
            found["shards"] = []
            for index in range(3):
                output = self._directory / f"shard-{index}.parquet"
                self._undisturbed(redis, FORMATS[index], output, shard=(index, 3))
                found["shards"] += read_output(output)
        return {name: sorted(rows, key=lambda row: int(row["number"])) for name, rows in found.items()}

    def _undisturbed(self, redis: EmbeddedRedis, extension: str, output: Path, **options: Any) -> None:
        with Client(redis_url=redis.url) as client:
            columns = Columns("text", "key")
            source, params = self._directory / f"in.{extension}", {"max_tokens": 6}
            client.batch(source, output, columns=columns, params=params, output_format="flat", **options)

    def _with_deaths(self, redis: EmbeddedRedis, worker: WorkerProcess, extension: str, output: Path) -> None:
        run_file = output.with_name(f"{output.name}.run")
        with Client(redis_url=redis.url) as observer, worker.slowly():

            def done() -> int:
                try:
                    run = json.loads(run_file.read_text())["run"]
                except (OSError, ValueError, KeyError):
                    return 0
                return sum(1 for _ in observer._redis.scan_iter(f"headrace:celery-task-meta-{run}*", count=1000))

            client = self._start(redis, extension, output)
            self._wait(client, lambda: done() >= len(self._rows) // 4)
            client.kill()
            client.wait()
            self.killed[extension].append("client")
            client = self._start(redis, extension, output, "--resume")
            self._wait(client, lambda: done() >= len(self._rows) // 2)
            worker.kill()
            self.killed[extension].append("worker")
        worker.start()
        if client.wait(PATIENCE_S * 10):
            raise RuntimeError((self._directory / "client.log").read_text()[-3000:])

    def _start(self, redis: EmbeddedRedis, extension: str, output: Path, *flags: str) -> subprocess.Popen[bytes]:
        source = self._directory / f"in.{extension}"
        command = [sys.executable, "-c", COMMAND, "batch", "-i", str(source), "-o", str(output), "--format", "flat"]
        command += [
            "--prompt-column",
            "text",
            "--id-column",
            "key",
            "--max-tokens",
            "6",
            "--max-inflight",
            "64",
            *flags,
        ]
        with (self._directory / "client.log").open("ab") as log:
            environment = {**os.environ, "HEADRACE_REDIS_URL": redis.url}
            return subprocess.Popen(die_with_parent(command), env=environment, stdout=log, stderr=log)

    def _wait(self, client: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S * 10
        while not condition():
            if client.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._directory / "client.log").read_text()[-3000:])
            time.sleep(0.01)


def faults_of(outputs: dict[str, list[dict[str, Any]]], rows: int) -> list[str]:
    """What is wrong with the outputs: they must have each row once, without an error, and be equal."""
    first = outputs["jsonl"]
    keys = [row["custom_id"] for row in first]
    faults = [] if keys == [f"k{i}" for i in range(rows)] else ["the rows of jsonl are not those of the input"]
    faults += [f"{row['custom_id']} has failed: {row['error']}" for row in first if row["error"]]
    faults += [f"{name} differs from jsonl" for name, found in outputs.items() if found != first]
    return faults


@click.command()
@click.option("--rows", default=2000, show_default=True, help="Number of rows.")
def main(rows: int) -> None:
    """Kill client and worker during batches of tables, and check that their outputs are complete and equal."""
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        del os.environ[name]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        tables = Tables(Path(directory), rows, FORMATS)
        faults = faults_of(tables.run(), rows)
    killed = "; ".join(f"{name}: {', '.join(victims)}" for name, victims in tables.killed.items())
    click.echo(f"{rows} rows in each of {', '.join(FORMATS)} and in three shards; killed: {killed}")
    for fault in faults[:10]:
        click.echo(f"WRONG {fault}")
    click.echo(f"{time.monotonic() - began:.0f} s: {'WRONG' if faults else 'correct'}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()

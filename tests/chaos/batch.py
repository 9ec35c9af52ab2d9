"""`python -m tests.chaos.batch --lines 3000 --seed 1`: kill -9 of client, worker and Redis during a batch.

The client is restarted with `--resume` after each kill. At the end the output must contain each custom_id once, with
the same result as an undisturbed run. Exit code 1 if it does not.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from headrace.config import load_settings
from headrace.worker.redis_server import die_with_parent
from tests.chaos.actors import Server, Worker
from tests.chaos.ledger import difference
from tests.patience import PATIENCE_S

VICTIMS = ("client", "worker", "redis")
LEASE_S = 3

_TEXT = "the river mill turns a wheel of stone and water runs on under grey morning sky while people wait"


def make_lines(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests in the format of the Batch API: greedy and sampled ones, and a few that must fail."""
    dice = random.Random(f"lines {seed}")
    lines = []
    for number in range(count):
        body: dict[str, Any] = {"prompt": " ".join(dice.choices(_TEXT.split(), k=dice.randint(1, 20)))}
        body |= {"max_tokens": dice.randint(1, 12), "temperature": dice.choice((0, 0.8, 1))}
        if dice.random() < 0.1:
            body |= {"logprobs": 2, "stop": ["."]}
        if dice.random() < 0.02:
            body["max_tokens"] = 5000  # more than the model's context
        lines.append({"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body})
    return lines


def read_output(path: Path) -> list[dict[str, Any]]:
    """The lines of an output, without the fields that differ between runs: job ids and times."""
    rows = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            row = json.loads(line)
            if row["response"]:
                row["response"].pop("request_id")
                for name in ("id", "created"):
                    row["response"]["body"].pop(name, None)
            rows.append(row)
    return rows


@dataclass
class Verdict:
    """The result of a run."""

    lines: int
    deaths: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    #: Starts that correctly ended at once, because Redis or the worker was not available.
    refused: int = 0
    seconds: float = 0.0
    missing: int = 0
    repeated: int = 0
    different: int = 0
    #: The first lines that differ from the undisturbed run, each with the difference.
    examples: list[str] = field(default_factory=list)
    exit_code: int = 0

    @property
    def correct(self) -> bool:
        """Whether the output has each line once, as in the undisturbed run."""
        return not (self.missing or self.repeated or self.different)


class Storm:
    """Runs the batch and kills the next victim whenever the output reaches a planned length."""

    def __init__(self, directory: Path, lines: int, seed: int, deaths: int, *, zipped: bool) -> None:
        self._directory, self._dice = directory, random.Random(f"storm {seed}")
        self._source = directory / "in.jsonl"
        self._source.write_text("".join(json.dumps(line) + "\n" for line in make_lines(lines, seed)))
        self._output = directory / ("out.jsonl.gz" if zipped else "out.jsonl")
        order = [VICTIMS[number % len(VICTIMS)] for number in range(deaths)]
        self._dice.shuffle(order)
        at = sorted(self._dice.sample(range(lines * 9 // 10), deaths))
        self._plan = list(zip(at, order, strict=True))
        self._client: subprocess.Popen[bytes] | None = None
        self._redis_back_at = 0.0
        self.verdict = Verdict(lines)

    def run(self) -> Verdict:
        """Run the batch undisturbed, run it with kills, and compare the outputs."""
        with Server("always") as server:
            settings = load_settings(redis_url=server.url, lease_s=LEASE_S, slots=16)
            worker = Worker("one", self._directory, settings)
            worker.start()
            try:
                self._wait_ready(worker)
                expected = self._directory / "expected.jsonl"
                self._undisturbed(server.url, expected)
                began = time.monotonic()
                self._disturbed(server, worker)
                self.verdict.seconds = time.monotonic() - began
                self._compare(read_output(expected), read_output(self._output))
            finally:
                worker.kill()
                self._end_client()
        return self.verdict

    def _wait_ready(self, worker: Worker) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not worker.ready:
            if time.monotonic() > deadline:
                raise TimeoutError("the worker did not start")
            time.sleep(0.05)

    def _command(self, output: Path, *flags: str) -> list[str]:
        command = [sys.executable, "-m", "headrace.worker.cli", "batch", "-i", str(self._source), "-o", str(output)]
        return [*command, "--max-inflight", "64", *flags]

    def _environment(self, url: str) -> dict[str, str]:
        return {**os.environ, "HEADRACE_REDIS_URL": url, "HEADRACE_LEASE_S": str(LEASE_S)}

    def _undisturbed(self, url: str, output: Path) -> None:
        done = subprocess.run(self._command(output), env=self._environment(url), capture_output=True, timeout=600)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stderr.decode())

    def _disturbed(self, server: Server, worker: Worker) -> None:
        progress_at, before = time.monotonic(), 0
        while True:
            worker.supervise()
            self._revive(server)
            if (code := self._step_client(server)) is not None:
                self.verdict.exit_code = code
                return
            count = self._count_lines()
            if count != before:
                progress_at, before = time.monotonic(), count
            if time.monotonic() - progress_at > PATIENCE_S:
                raise TimeoutError(f"no line for {PATIENCE_S:g} s:\n{self._client_log()}")
            while self._plan and count >= self._plan[0][0] and self._client is not None:
                self._kill(self._plan.pop(0)[1], server, worker)
            time.sleep(0.03)

    def _step_client(self, server: Server) -> int | None:
        """Start the client if it does not run. Returns its exit code once it has ended by itself, else None."""
        if self._client is None:
            if self._redis_back_at:
                return None  # it would correctly report that Redis is unreachable
            self._client = self._start_client(server.url)
            return None
        code = self._client.poll()
        if code is None:
            return None
        self._client = None
        if code in (0, 1):
            return code
        if code == 3 and not self._has_begun():
            self.verdict.refused += 1
            time.sleep(0.2)
            return None
        raise RuntimeError(f"the client ended with {code}:\n{self._client_log()}")

    def _start_client(self, url: str) -> subprocess.Popen[bytes]:
        self.verdict.starts += 1
        with (self._directory / "client.log").open("wb") as log:
            return subprocess.Popen(
                die_with_parent(self._command(self._output, "--resume")),
                env=self._environment(url),
                stdout=log,
                stderr=log,
            )

    def _has_begun(self) -> bool:
        """Whether the last client had found Redis and a worker: it logs this before it computes."""
        return "resuming" in (self._directory / "client.log").read_text(errors="replace")

    def _kill(self, victim: str, server: Server, worker: Worker) -> None:
        time.sleep(self._dice.random() * 0.05)
        if victim == "client" and self._client is not None:
            self._client.kill()
            self._client.wait()
            self._client = None
        elif victim == "worker":
            worker.kill(self._dice.random())
        elif victim == "redis":
            server.kill()
            self._redis_back_at = time.monotonic() + self._dice.random() * 2
        self.verdict.deaths[victim] += 1

    def _revive(self, server: Server) -> None:
        if self._redis_back_at and time.monotonic() >= self._redis_back_at:
            self._redis_back_at = 0.0
            server.start()

    def _count_lines(self) -> int:
        if not self._output.exists():
            return 0
        return sum(1 for _ in readable(self._output))

    def _end_client(self) -> None:
        if self._client is not None:
            self._client.kill()
            self._client.wait()

    def _client_log(self) -> str:
        return (self._directory / "client.log").read_text(errors="replace")[-3000:]

    def _compare(self, expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> None:
        wanted = {row["custom_id"]: row for row in expected}
        count = Counter(row["custom_id"] for row in got)
        self.verdict.missing = len(wanted.keys() - count.keys())
        self.verdict.repeated = sum(1 for times in count.values() if times > 1)
        different = [row for row in got if wanted.get(row["custom_id"]) != row]
        self.verdict.different = len(different)
        self.verdict.examples = [
            f"{row['custom_id']}{difference(wanted.get(row['custom_id']), row)}" for row in different[:5]
        ]
        if len(wanted) != self.verdict.lines:
            raise RuntimeError(f"the undisturbed run has {len(wanted)} lines")


def readable(path: Path) -> Iterator[bytes]:
    """The complete lines of a file that may still be written to."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from file
        except (EOFError, OSError):
            return


def storm(lines: int, seed: int, deaths: int, *, zipped: bool = False) -> Verdict:
    """Run one batch with this number of kills."""
    with tempfile.TemporaryDirectory() as directory:
        return Storm(Path(directory), lines, seed, deaths, zipped=zipped).run()


@click.command()
@click.option("--lines", default=3000, show_default=True, help="Number of requests.")
@click.option("--seed", default=1, show_default=True, help="Seed of requests and kills.")
@click.option(
    "--deaths", default=24, show_default=True, help="Number of kills, a third each of client, worker and Redis."
)
@click.option("--zipped", is_flag=True, help="Write a gzipped output.")
def main(lines: int, seed: int, deaths: int, zipped: bool) -> None:
    """Kill client, worker and Redis during a batch, and check that its output is complete and correct."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        del os.environ[name]
    verdict = storm(lines, seed, deaths, zipped=zipped)
    died = ", ".join(f"{verdict.deaths[victim]} {victim}" for victim in VICTIMS)
    click.echo(
        f"seed {seed}: {verdict.lines} lines, killed: {died}; {verdict.starts} starts of the client "
        f"({verdict.refused} found no Redis or worker), "
        f"{verdict.seconds:.0f} s; missing {verdict.missing}, repeated {verdict.repeated}, "
        f"different {verdict.different}: {'correct' if verdict.correct else 'WRONG'}"
    )
    for example in verdict.examples:
        click.echo(f"WRONG {example}")
    sys.exit(0 if verdict.correct else 1)


if __name__ == "__main__":
    main()

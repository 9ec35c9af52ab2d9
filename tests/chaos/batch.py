"""`python -m tests.chaos.batch --lines 3000 --seed 1`: kill -9 of client, worker and Redis during a batch.

The client is started again with `--resume` after each of its deaths. In the end the output must hold each custom_id
once, with what an undisturbed run gives. Exit code 1 if not.
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
    """Requests in the Batch form: greedy and sampled, a few that must fail."""
    dice = random.Random(f"lines {seed}")
    lines = []
    for number in range(count):
        body: dict[str, Any] = {"prompt": " ".join(dice.choices(_TEXT.split(), k=dice.randint(1, 20)))}
        body |= {"max_tokens": dice.randint(1, 12), "temperature": dice.choice((0, 0.8, 1))}
        if dice.random() < 0.1:
            body |= {"logprobs": 2, "stop": ["."]}
        if dice.random() < 0.02:
            body["max_tokens"] = 5000  # more than the model reads
        lines.append({"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body})
    return lines


def read_output(path: Path) -> list[dict[str, Any]]:
    """The lines of an output, without what differs between two runs: the names of jobs, and when they ended."""
    rows = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            row = json.loads(line)
            if row["response"]:
                row["response"].pop("request_id")
                for name in ("id", "created"):
                    row["response"]["body"].pop(name)
            rows.append(row)
    return rows


@dataclass
class Verdict:
    """What came of it."""

    lines: int
    deaths: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    #: Starts that ended at once, rightly, because Redis or the worker was not there.
    refused: int = 0
    seconds: float = 0.0
    missing: int = 0
    repeated: int = 0
    different: int = 0
    #: Of the first lines that are not as in the undisturbed run: what they say, and what they should.
    examples: list[str] = field(default_factory=list)
    exit_code: int = 0

    @property
    def right(self) -> bool:
        """Whether each line is there once, as in the undisturbed run."""
        return not (self.missing or self.repeated or self.different)


class Storm:
    """Runs the batch and kills who has his turn, whenever the output has come so far."""

    def __init__(self, directory: Path, lines: int, seed: int, deaths: int, *, zipped: bool) -> None:
        self._directory, self._dice = directory, random.Random(f"storm {seed}")
        self._source = directory / "in.jsonl"
        self._source.write_text("".join(json.dumps(line) + "\n" for line in make_lines(lines, seed)))
        self._output = directory / ("out.jsonl.gz" if zipped else "out.jsonl")
        order = [VICTIMS[turn % len(VICTIMS)] for turn in range(deaths)]
        self._dice.shuffle(order)
        at = sorted(self._dice.sample(range(lines * 9 // 10), deaths))
        self._plan = list(zip(at, order, strict=True))
        self._client: subprocess.Popen[bytes] | None = None
        self._redis_back_at = 0.0
        self.verdict = Verdict(lines)

    def run(self) -> Verdict:
        """The undisturbed run, the disturbed one, and how they compare."""
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
        moved_at, before = time.monotonic(), 0
        while True:
            worker.look()
            self._revive(server)
            if (code := self._step_client(server)) is not None:
                self.verdict.exit_code = code
                return
            there = self._lines_there()
            if there != before:
                moved_at, before = time.monotonic(), there
            if time.monotonic() - moved_at > PATIENCE_S:
                raise TimeoutError(f"no line for {PATIENCE_S:g} s:\n{self._said()}")
            while self._plan and there >= self._plan[0][0] and self._client is not None:
                self._kill(self._plan.pop(0)[1], server, worker)
            time.sleep(0.03)

    def _step_client(self, server: Server) -> int | None:
        """Start it if it is not there; its exit code when it has ended by itself, with nobody to die any more."""
        if self._client is None:
            if self._redis_back_at:
                return None  # it would say, rightly, that there is no Redis
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
        raise RuntimeError(f"the client ended with {code}:\n{self._said()}")

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
        """Whether the process that ended last had found Redis and a worker: it says so before it computes."""
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

    def _lines_there(self) -> int:
        if not self._output.exists():
            return 0
        return sum(1 for _ in readable(self._output))

    def _end_client(self) -> None:
        if self._client is not None:
            self._client.kill()
            self._client.wait()

    def _said(self) -> str:
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
    """The lines of a file that is being written."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            yield from file
        except (EOFError, OSError):
            return


def storm(lines: int, seed: int, deaths: int, *, zipped: bool = False) -> Verdict:
    """One batch through so many deaths."""
    with tempfile.TemporaryDirectory() as directory:
        return Storm(Path(directory), lines, seed, deaths, zipped=zipped).run()


@click.command()
@click.option("--lines", default=3000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--deaths", default=24, show_default=True, help="A third each: client, worker, Redis.")
@click.option("--zipped", is_flag=True, help="Write gzip.")
def main(lines: int, seed: int, deaths: int, zipped: bool) -> None:
    """Kill client, worker and Redis during a batch and see that its output is whole and right."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        del os.environ[name]
    verdict = storm(lines, seed, deaths, zipped=zipped)
    died = ", ".join(f"{verdict.deaths[victim]} {victim}" for victim in VICTIMS)
    click.echo(
        f"seed {seed}: {verdict.lines} lines, killed: {died}; {verdict.starts} starts of the client "
        f"({verdict.refused} found no Redis or worker), "
        f"{verdict.seconds:.0f} s; missing {verdict.missing}, repeated {verdict.repeated}, "
        f"different {verdict.different}: {'right' if verdict.right else 'WRONG'}"
    )
    for example in verdict.examples:
        click.echo(f"WRONG {example}")
    sys.exit(0 if verdict.right else 1)


if __name__ == "__main__":
    main()

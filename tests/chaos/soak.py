"""`python -m tests.chaos.soak --minutes 60`: an hour of mixed traffic, after which everything is back where it was.

A real Redis, a real worker and `headrace serve`, each with its data and its temporary files in one directory. After a
warm-up the traffic stops until all lifetimes have passed: what is there then is the baseline. The same is measured
again after the rest of the run, and judged by `tests.chaos.soak_ledger`. Only these two times, programs give back what
their allocators kept (`tests.chaos.soak_memory`): users' programs do not do that either.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import click
import redis

from headrace.client.wire import keys
from headrace.config import Settings, load_settings
from headrace.config.logging import setup_logging
from headrace.worker.redis_server import EmbeddedRedis
from tests.chaos.soak_ledger import InUse, ProcessSample, Sample, SoakFacts, balance, table
from tests.chaos.soak_memory import ask, environment, in_use
from tests.chaos.soak_traffic import Book, Traffic
from tests.integration.http_server import HttpServer
from tests.integration.processes import WorkerProcess
from tests.patience import PATIENCE_S

#: Seconds between samples.
SAMPLE_S = 60.0
#: How long the traffic of the warm-up lasts: five minutes of an hour, and long enough for each caller to act often.
WARM_UP_SHARE, WARM_UP_S = 1 / 12, 60.0
#: Seconds that Redis keeps results, events and tensors. The shortest that the settings allow, in a run of few minutes.
TTL_S, SHORT_TTL_S = 120, 60
#: Hints that messages wait live for HINT_TTL_S, and servers collect what they deleted within a minute.
SETTLE_S = 75.0


def main_settings(url: str, ttl_s: int) -> Settings:
    """The settings of the client; worker and server get the same from their environment."""
    return load_settings(redis_url=url, result_ttl_s=ttl_s, events_ttl_s=ttl_s, checkpoint_ttl_s=ttl_s)


class Soak:
    """The processes of a run and what is measured of them."""

    def __init__(self, directory: Path, seed: int, minutes: float, log: Callable[[str], None]) -> None:
        self.directory, self.seed, self.span_s, self.log = directory, seed, 60 * minutes, log
        self.ttl_s = TTL_S if minutes >= 10 else SHORT_TTL_S
        self.temporary, self.data, self.logs = (directory / name for name in ("tmp", "data", "log"))
        for place in (self.temporary, self.data, self.logs):
            place.mkdir()
        os.environ |= {"TMPDIR": str(self.temporary), "XDG_DATA_HOME": str(self.data)}
        tempfile.tempdir = None  # read TMPDIR again
        self.book = Book()
        self.samples: list[Sample] = []
        self.began = time.monotonic()
        self.processes: dict[str, int] = {}

    def carry_out(self, on_sample: Callable[[SoakFacts], None]) -> SoakFacts:
        """Run everything. Takes `span_s` of traffic, and twice the time that it takes for all lifetimes to pass."""
        with ExitStack() as stack:
            server = stack.enter_context(EmbeddedRedis(directory=self.data / "redis", socket=self.directory / "s"))
            settings = main_settings(server.url, self.ttl_s)
            variables = environment(self.directory / "memory") | {
                f"HEADRACE_{name.upper()}": str(value)
                for name, value in settings.model_dump(exclude_unset=True).items()
            }
            worker = stack.enter_context(
                WorkerProcess(self.logs / "worker.log", bare=True, HEADRACE_SLOTS="16", **variables)
            )
            http = HttpServer(self.logs, server.url, "--files", str(self.data / "store"), **variables)
            stack.enter_context(http)
            worker.wait_ready()
            assert worker.process is not None
            self.processes = {
                "worker": worker.process.pid,
                "serve": http.pid or 0,
                "redis": server.pid or 0,
                "client": os.getpid(),
            }
            self.redis = redis.Redis.from_url(server.url, decode_responses=True)
            self.began = time.monotonic()
            warm_up_s = max(WARM_UP_S, self.span_s * WARM_UP_SHARE)
            self._traffic(settings, http.url, "warm-up", warm_up_s, on_sample)
            self._quiet("baseline", on_sample)
            self._traffic(settings, http.url, "traffic", self.span_s - warm_up_s, on_sample)
            self._quiet("end", on_sample)
            codes = {"worker": worker.process.poll(), "serve": 0 if http.alive else 1}
            return self.facts(codes)

    def facts(self, codes: dict[str, int | None] | None = None) -> SoakFacts:
        """What is known so far."""
        return SoakFacts(
            samples=list(self.samples),
            accepted=self.book.accepted(),
            ends=self.book.ends(),
            open=self.book.open(),
            refused=self.book.refused(),
            surprises=list(self.book.surprises),
            files_left=self.book.files_left(),
            batches=self.book.batches,
            logged=self._logged(),
            exited={name: code for name, code in (codes or {}).items() if code not in (None, 0)},
        )

    def _traffic(
        self, settings: Settings, url: str, phase: str, seconds: float, on_sample: Callable[[SoakFacts], None]
    ) -> None:
        self.log(f"{phase}: {seconds / 60:.1f} minutes of traffic")
        place = self.directory / "client"
        place.mkdir(exist_ok=True)
        traffic = Traffic(settings, url, place, f"{self.seed} {phase}", self.book)
        traffic.start()
        self._sample_until(time.monotonic() + seconds, phase, on_sample)
        traffic.stop()
        self._sample(f"{phase} stopped", on_sample)

    def _quiet(self, phase: str, on_sample: Callable[[SoakFacts], None]) -> None:
        """Wait until all lifetimes have passed, and take the sample that counts."""
        self.log(f"{phase}: waiting {self.ttl_s + SETTLE_S:.0f} s for all lifetimes to pass")
        time.sleep(self.ttl_s + SETTLE_S)
        self._sample(phase, on_sample, trim=True)

    def _in_use(self, *, trim: bool) -> dict[str, InUse]:
        asked = {name: self.processes[name] for name in ("worker", "serve")}
        found = {name: ask(pid, self.directory / "memory", PATIENCE_S, trim=trim) for name, pid in asked.items()}
        return {name: InUse(**values) for name, values in (found | {"client": in_use(trim=trim)}).items()}

    def _sample_until(self, until: float, phase: str, on_sample: Callable[[SoakFacts], None]) -> None:
        while (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, SAMPLE_S))
            self._sample(phase, on_sample)

    def _sample(self, phase: str, on_sample: Callable[[SoakFacts], None], *, trim: bool = False) -> None:
        memory, kinds = self.redis.info("memory"), self._kinds()
        passing = sum(int(memory[name]) for name in ("mem_clients_normal", "mem_clients_slaves", "mem_aof_buffer"))
        self.samples.append(
            Sample(
                at=round(time.monotonic() - self.began),
                phase=phase,
                processes={name: measure(pid) for name, pid in self.processes.items()},
                keys=kinds,
                redis_bytes=int(memory["used_memory"]) - passing,
                redis_peak=int(memory["used_memory_peak"]),
                redis_scripts=int(memory["used_memory_lua"]),
                connections=int(self.redis.info("clients")["connected_clients"]),
                temporary_files=count(self.temporary),
                client_files=count(self.directory / "client"),
                data_files={place.name: count(place) for place in sorted(self.data.iterdir())},
                log_bytes=sum(path.stat().st_size for path in self.logs.iterdir()),
                in_use=self._in_use(trim=trim),  # last, because it may trim what the others measure
            )
        )
        on_sample(self.facts())
        rss = {name: f"{sample.rss / 2**20:.0f}" for name, sample in self.samples[-1].processes.items()}
        used = {name: f"{one.malloc / 2**20:.1f}+{one.blocks}" for name, one in self.samples[-1].in_use.items()}
        self.log(f"      MiB in malloc + Python's blocks: {used}")
        self.log(f"{self.samples[-1].at:5d} s {phase}: MiB {rss}, {sum(kinds.values())} keys, {self.book.so_far()}")

    def _kinds(self) -> dict[str, int]:
        """The number of keys of each kind, and of the elements of lists, hashes and sets without a lifetime."""
        found: dict[str, int] = {}
        for name in self.redis.scan_iter("*", count=1000):
            kind = kind_of(name)
            found[kind] = found.get(kind, 0) + 1
        lists = sum(int(self.redis.llen(name)) for name in keys.queue_lists("demo"))
        unacked = int(self.redis.hlen(keys.unacked()))
        return found | {"(queued messages)": lists, "(unacked messages)": unacked}

    def _logged(self) -> dict[str, int]:
        """Log events of level warning and above, and tracebacks, with their number."""
        found: dict[str, int] = {}
        for path in self.logs.glob("*.log"):
            for line in path.read_text(errors="replace").splitlines():
                event = ""
                if line.startswith("{"):
                    entry = json.loads(line)
                    if entry.get("level") in ("warning", "error", "critical"):
                        event = f"{path.stem} {entry['level']} {entry['event']}"
                elif line.startswith("Traceback"):
                    event = f"{path.stem} Traceback"
                if event:
                    found[event[:100]] = found.get(event[:100], 0) + 1
        return found


def measure(pid: int) -> ProcessSample:
    """Memory, descriptors and threads of a process, and of its children unless it is this process.

    Redis has a child while it saves. One that ends meanwhile counts as nothing, as does one that waits to be reaped.
    """
    own = _measure_one(pid)
    if pid == os.getpid():
        return own  # the children are measured by themselves
    children: list[ProcessSample] = []
    for task in Path("/proc", str(pid), "task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError, KeyError):
                    children.append(measure(int(child)))
    return ProcessSample(*(sum(values) for values in zip(*(astuple(one) for one in [own, *children]), strict=True)))


def _measure_one(pid: int) -> ProcessSample:
    """Raises OSError or KeyError for a process that has ended."""
    proc = Path("/proc", str(pid))
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    return ProcessSample(int(status["VmRSS"].split()[0]) * 1024, len(os.listdir(proc / "fd")), int(status["Threads"]))


def kind_of(name: str) -> str:
    """The kind of a key: its name without job ids and names of workers."""
    for kind in ("job:", "cancel:", "events:", "checkpoint:", "worker:", "celery-task-meta-"):
        if name.startswith(keys.PREFIX + kind):
            return kind
    return name.removeprefix(keys.PREFIX)


def count(directory: Path) -> int:
    """The number of files below a directory."""
    return sum(len(files) for _, _, files in os.walk(directory)) if directory.exists() else 0


@click.command()
@click.option("--minutes", default=60.0, show_default=True, help="For how long there is traffic.")
@click.option("--seed", default=1, show_default=True, help="Seed of the traffic.")
@click.option("--json", "file", type=click.Path(dir_okay=False), help="File for the samples and the ledger.")
@click.option("--keep", is_flag=True, help="Keep the directory with the logs.")
def main(minutes: float, seed: int, file: str | None, keep: bool) -> None:
    """Mixed traffic, after which memory, descriptors, keys and files must be back where they were."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up: a stopped worker must not outlive this process
    for name in [name for name in os.environ if name.startswith("HEADRACE_")]:
        del os.environ[name]
    setup_logging(load_settings(log_level="error"))
    directory = Path(tempfile.mkdtemp(prefix="headrace-soak-"))

    def write(facts: SoakFacts) -> None:
        if file is not None:
            ledger = balance(facts)
            report: dict[str, Any] = {
                "seed": seed,
                "minutes": minutes,
                "over": any(sample.phase == "end" for sample in facts.samples),
                **asdict(ledger),
                "samples": [asdict(sample) for sample in facts.samples],
            }
            Path(f"{file}.new").write_text(json.dumps(report, indent=1))
            os.replace(f"{file}.new", file)

    try:
        facts = Soak(directory, seed, minutes, lambda line: click.echo(line, err=True)).carry_out(write)
    finally:
        if keep:
            click.echo(f"logs in {directory}", err=True)
        else:
            shutil.rmtree(directory, ignore_errors=True)
    write(facts)
    click.echo(table(balance(facts)))
    sys.exit(1 if balance(facts).wrong else 0)


if __name__ == "__main__":
    main()

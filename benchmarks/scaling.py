"""Many workers on one Redis: how throughput grows with them, how evenly they work, and what a job costs Redis.

    python -m benchmarks.scaling                                   # 1, 2, 4, 8, 16 workers, 100 ms a step
    python -m benchmarks.scaling --only saturate --workers 1 2 4   # jobs of one token, steps that take no time

The workers are processes as users start them, with a device that takes a fixed time for a step and no processor
(benchmarks/modelled.py): so what is measured is everything around the model. Redis, workers and client share the cores
of this machine; the share of each is told, and that of everybody else. Where all cores are busy the figures say what
this machine can do, not what Redis can: for that there is the processor time a job takes of Redis.

`idle` is what workers with nothing to do cost, `scale` is bulk jobs of 32 to 96 tokens with an interactive one among
them now and then, `saturate` is jobs of one token in messages of 16 and of one, `memory` is what jobs take that wait.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import redis

from benchmarks.conditions import conditions
from benchmarks.workloads import Item, echo
from headrace.client import Client
from headrace.client.wire.redis import connect
from headrace.worker.redis_server import EmbeddedRedis, die_with_parent

MODEL = "modelled"
NOBODY = "nobody-serves-this"
START_S = 300.0


def long_jobs(count: int) -> list[Item]:
    """Prompts of 8 to 128 tokens, 32 to 96 new ones, 64 in the mean."""
    rng = random.Random(1)
    return [Item([rng.randrange(50000) for _ in range(rng.randint(8, 128))], 32 + i * 37 % 65) for i in range(count)]


def short_jobs(count: int) -> list[Item]:
    """Prompts of 8 to 32 tokens, one new."""
    rng = random.Random(3)
    return [Item([rng.randrange(50000) for _ in range(rng.randint(8, 32))], 1) for _ in range(count)]


def request(item: Item, **fields: Any) -> dict[str, Any]:
    """An item as a client writes it."""
    return {"prompt": item.prompt, "max_tokens": item.new_tokens, "temperature": 0, "ignore_eos": True, **fields}


@dataclass(frozen=True)
class Reading:
    """What had been used by some moment, or between two; times in seconds of one core."""

    at: float
    redis_s: float
    workers_s: float
    client_s: float
    #: Of all cores of the machine, whoever used them.
    busy_s: float
    commands: int
    bytes_in: int
    bytes_out: int

    def __sub__(self, earlier: Reading) -> Reading:
        before = asdict(earlier)
        return Reading(**{name: value - before[name] for name, value in asdict(self).items()})

    def shares(self) -> dict[str, float]:
        """Cores in use: by Redis, by all workers, by this client, and by everybody else on the machine."""
        ours = {"redis": self.redis_s, "workers": self.workers_s, "client": self.client_s}
        others = max(0.0, self.busy_s - sum(ours.values()))
        return {name: used / self.at for name, used in {**ours, "others": others}.items()}

    def per_job(self, jobs: int) -> dict[str, float]:
        """What each job took."""
        return {
            "redis_cpu_ms": 1000 * self.redis_s / jobs,
            "workers_cpu_ms": 1000 * self.workers_s / jobs,
            "client_cpu_ms": 1000 * self.client_s / jobs,
            "redis_commands": self.commands / jobs,
            "redis_bytes_in": self.bytes_in / jobs,
            "redis_bytes_out": self.bytes_out / jobs,
        }


def processor_s(pid: int | str) -> float:
    """Processor time that a process has used so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """Processor time that all processes of this machine have used so far: user, nice, system, irq and softirq."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split()[1:8]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


class Fleet:
    """A Redis of its own, a client, and worker processes with modelled devices; gone at the end of the block."""

    def __init__(self, *, step_ms: float, slots: int, flags: Sequence[str] = ()) -> None:
        self.step_ms, self.slots, self._flags = step_ms, slots, flags
        self._workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Fleet:
        with contextlib.ExitStack() as stack:
            self.server = stack.enter_context(EmbeddedRedis.ephemeral())
            self._logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.callback(self._end)
            self.client = stack.enter_context(Client(redis_url=self.server.url, model=MODEL))
            self.redis: redis.Redis = stack.enter_context(connect(self.server.url))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end(self) -> None:
        for process in self._workers:
            process.kill()
        for process in self._workers:
            process.wait()

    def grow(self, count: int) -> None:
        """Have so many workers, all of which read the queue."""
        for number in range(len(self._workers), count):
            self._workers.append(self._start(number))
        deadline = time.monotonic() + START_S
        for number, process in enumerate(self._workers):
            log = self._logs / f"{number}.log"
            while "worker.ready" not in log.read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"a worker did not start: {log.read_text()[-3000:]}")
                time.sleep(0.1)

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "HEADRACE_REDIS_URL": self.server.url,
            "HEADRACE_SERVED_NAME": MODEL,
            "HEADRACE_SLOTS": str(self.slots),
            "HEADRACE_LOG_FORMAT": "json",
            "MODELLED_STEP_MS": str(self.step_ms),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "celery", "-A", "benchmarks.modelled", "worker", "-n", f"w{number}@%h"]
        with (self._logs / f"{number}.log").open("wb") as log:
            return subprocess.Popen(die_with_parent([*command, *self._flags]), env=environment, stdout=log, stderr=log)

    @property
    def ideal_tokens_per_s(self) -> float:
        """What the devices would give if every slot were always full and all else took no time."""
        return len(self._workers) * self.slots * 1000 / self.step_ms

    def read(self) -> Reading:
        """Now."""
        info: dict[str, Any] = self.redis.info("all")  # type: ignore[assignment]
        calls = [value["calls"] for name, value in info.items() if name.startswith("cmdstat_")]
        return Reading(
            at=time.perf_counter(),
            redis_s=info["used_cpu_user"] + info["used_cpu_sys"],
            workers_s=sum(processor_s(process.pid) for process in self._workers),
            client_s=time.process_time(),
            busy_s=busy_s(),
            commands=sum(calls),
            bytes_in=info["total_net_input_bytes"],
            bytes_out=info["total_net_output_bytes"],
        )

    def memory(self) -> int:
        """Bytes that Redis has in use."""
        info: dict[str, Any] = self.redis.info("memory")  # type: ignore[assignment]
        return int(info["used_memory"])

    def connections(self) -> int:
        """Of everybody to Redis."""
        info: dict[str, Any] = self.redis.info("clients")  # type: ignore[assignment]
        return int(info["connected_clients"])


class Visitor:
    """Submits an interactive job of one token now and then, and notes how long its token takes to be seen."""

    def __init__(self, fleet: Fleet, every_s: float) -> None:
        self._client, self._every_s = Client(redis_url=fleet.server.url, model=MODEL), every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.seconds: list[float] = []

    def __enter__(self) -> Visitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._client.close()

    def _loop(self) -> None:
        while not self._over.wait(self._every_s):
            began = time.perf_counter()
            fields = request(Item([464, 3290, 318], 1), priority="interactive", stream=True)
            for event in self._client.submit(**fields).stream(timeout=START_S):
                if event.token_ids:
                    self.seconds.append(time.perf_counter() - began)


def rate_in_the_middle(spans: Sequence[tuple[float, float, int]], began: float) -> float:
    """Tokens per second in the middle half of a run, in which it neither fills its slots nor runs out of jobs.

    Args:
        spans: of each job when it ended, how long it had its slot, over which its tokens are spread, and these.
        began: when the run did.
    """
    ended = max(end for end, _, _ in spans)
    first, last = began + (ended - began) / 4, began + (ended - began) * 3 / 4
    made = sum(tokens * max(0.0, min(end, last) - max(end - took, first)) / took for end, took, tokens in spans)
    return made / (last - first)


def run(fleet: Fleet, items: Sequence[Item], *, together: bool = True, every_s: float | None = None) -> dict[str, Any]:
    """Compute the items, and say what it took.

    Args:
        together: submitted in messages of up to 16; else each in its own.
        every_s: how often somebody comes with an interactive job; None if nobody does.
    """
    wanted = [request(item, priority="bulk") for item in items]
    spans: list[tuple[float, float, int]] = []
    with Visitor(fleet, every_s) if every_s else contextlib.nullcontext() as visitor:
        before = fleet.read()
        jobs = fleet.client.submit_many(wanted) if together else [fleet.client.submit(**fields) for fields in wanted]
        submitted = fleet.read()
        for job in fleet.client.as_completed(jobs, timeout=3600):
            result = job.result(0)
            took = result.timings.prefill_s + result.timings.decode_s
            spans.append((time.perf_counter(), max(took, 1e-6), result.usage.completion_tokens))
        used = fleet.read() - before
    for item, job in zip(items, jobs, strict=True):
        if job.result(0).choices[0].token_ids != [echo(item.prompt, i) for i in range(item.new_tokens)]:
            raise SystemExit(f"job {job.id} has tokens that its device did not give")
    tokens = sum(item.new_tokens for item in items)
    shares = Counter(job.result(0).fingerprint for job in jobs)
    return {
        "workers": len(fleet._workers),
        "jobs": len(jobs),
        "seconds": used.at,
        "submitted_per_s": len(jobs) / (submitted - before).at,
        "jobs_per_s": len(jobs) / used.at,
        "tokens_per_s": tokens / used.at,
        "tokens_per_s_in_the_middle": rate_in_the_middle(spans, before.at),
        "ideal_tokens_per_s": fleet.ideal_tokens_per_s if fleet.step_ms else None,
        "jobs_by_worker": [0] * (len(fleet._workers) - len(shares)) + sorted(shares.values()),
        "interactive_s": visitor.seconds if visitor else [],
        "per_job": used.per_job(len(jobs)),
        "cores": used.shares(),
        "connections": fleet.connections(),
    }


def told(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row of `run`, and give it back."""
    per_job, cores, shares = row["per_job"], row["cores"], row["jobs_by_worker"]
    rate = f"{row['jobs_per_s']:7.1f} jobs/s"
    if row["ideal_tokens_per_s"]:
        middle = row["tokens_per_s_in_the_middle"]
        rate += f" {middle:8.0f} tokens/s in the middle, {middle / row['ideal_tokens_per_s']:6.1%} of ideal"
    print(
        f"{row['workers']:3} workers {row['jobs']:6} jobs {row['seconds']:6.1f} s {rate}"
        f"   jobs a worker {min(shares)} to {max(shares)}"
        f"   a job: {per_job['redis_commands']:.1f} commands, Redis {per_job['redis_cpu_ms']:.3f} ms, workers "
        f"{per_job['workers_cpu_ms']:.2f} ms, client {per_job['client_cpu_ms']:.2f} ms, "
        f"{per_job['redis_bytes_in']:.0f} bytes in, {per_job['redis_bytes_out']:.0f} out"
        f"   cores: {', '.join(f'{name} {share:.2f}' for name, share in cores.items())}",
        flush=True,
    )
    if waits := row["interactive_s"]:
        print(f"    interactive: median {statistics.median(waits):.2f} s, longest {max(waits):.2f} s of {len(waits)}")
    return row


def idle(fleet: Fleet, seconds: float) -> dict[str, Any]:
    """What workers cost that have nothing to do, each second."""
    time.sleep(2)
    before = fleet.read()
    time.sleep(seconds)
    used = fleet.read() - before
    row = {
        "workers": len(fleet._workers),
        "seconds": used.at,
        "commands_per_s": used.commands / used.at,
        "bytes_in_per_s": used.bytes_in / used.at,
        "bytes_out_per_s": used.bytes_out / used.at,
        "cores": used.shares(),
        "connections": fleet.connections(),
    }
    print(
        f"{row['workers']:3} workers idle: {row['commands_per_s']:.0f} commands/s, {row['bytes_in_per_s']:.0f} bytes/s "
        f"in, {row['bytes_out_per_s']:.0f} out, {row['connections']} connections   cores: "
        f"{', '.join(f'{name} {share:.3f}' for name, share in used.shares().items())}",
        flush=True,
    )
    return row


def scale(fleet: Fleet, counts: Sequence[int], *, waves: float, idle_s: float, every_s: float) -> list[dict[str, Any]]:
    """More and more workers, each time with so many jobs for each slot."""
    rows = []
    for count in counts:
        fleet.grow(count)
        row: dict[str, Any] = {"idle": idle(fleet, idle_s)} if idle_s else {}
        rows.append(row | told(run(fleet, long_jobs(round(count * fleet.slots * waves)), every_s=every_s)))
    return rows


def saturate(fleet: Fleet, counts: Sequence[int], jobs: int) -> list[dict[str, Any]]:
    """As many jobs of one token as this machine carries, in messages of 16 and then of one."""
    rows = []
    for count in counts:
        fleet.grow(count)
        run(fleet, short_jobs(64))
        for together in (True, False):
            items = short_jobs(jobs if together else jobs // 4)
            rows.append({"together": together} | told(run(fleet, items, together=together)))
    return rows


def memory(fleet: Fleet, jobs: int) -> dict[str, float]:
    """Bytes that Redis holds for a job that waits, and for one that has ended."""
    items = long_jobs(jobs)
    fleet.grow(1)
    begin = fleet.memory()
    fleet.client.submit_many([request(item) for item in items], model=NOBODY)
    together = fleet.memory()
    for item in items[: jobs // 8]:
        fleet.client.submit(**request(item), model=NOBODY)
    alone = fleet.memory()
    run(fleet, items[: jobs // 8])
    figures = {
        "queued_together_bytes": (together - begin) / jobs,
        "queued_alone_bytes": (alone - together) / (jobs // 8),
        "ended_bytes": (fleet.memory() - alone) / (jobs // 8),
    }
    print("a job in Redis: " + ", ".join(f"{name} {value:.0f}" for name, value in figures.items()), flush=True)
    return figures


@dataclass(frozen=True)
class Cost:
    """What Redis spends: milliseconds of its core, bytes in and bytes out."""

    cpu_ms: float
    bytes_in: float
    bytes_out: float


@dataclass(frozen=True)
class Needs:
    """What many GPUs ask of Redis."""

    jobs_per_s: float
    redis_cores: float
    #: Servers of which each is busy with commands for half of one core.
    servers: int
    mbit_in: float
    mbit_out: float
    connections: float


def needs(gpus: int, gpu_tokens_per_s: float, job_tokens: float, job: Cost, worker: Cost, connections: float) -> Needs:
    """The arithmetic from one job and one worker to many; it assumes that what each costs stays as it is.

    Args:
        job: for each job.
        worker: for each second of a busy worker, beside its jobs.
        connections: of each worker.
    """
    jobs_per_s = gpus * gpu_tokens_per_s / job_tokens
    cores = (jobs_per_s * job.cpu_ms + gpus * worker.cpu_ms) / 1000
    return Needs(
        jobs_per_s=jobs_per_s,
        redis_cores=cores,
        servers=max(1, -int(-cores // 0.5)),
        mbit_in=(jobs_per_s * job.bytes_in + gpus * worker.bytes_in) * 8 / 1e6,
        mbit_out=(jobs_per_s * job.bytes_out + gpus * worker.bytes_out) * 8 / 1e6,
        connections=gpus * connections,
    )


def costs(figures: dict[str, Any]) -> tuple[Cost, Cost]:
    """Of a job, from `saturate`, where next to nothing else happens; and of a worker, which is the rest of `scale`."""

    def cost(row: dict[str, Any]) -> Cost:
        per_job = row["per_job"]
        return Cost(per_job["redis_cpu_ms"], per_job["redis_bytes_in"], per_job["redis_bytes_out"])

    job = cost([row for row in figures["saturate"] if row["together"]][-1])
    busy, row = cost(figures["scale"][-1]), figures["scale"][-1]
    share = row["jobs_per_s"] / row["workers"]
    rest = [share * (one - other) for one, other in zip(astuple(busy), astuple(job), strict=True)]
    return job, Cost(*rest)


def paper(figures: dict[str, Any], gpus: int, rates: Sequence[float]) -> None:
    """Print what so many GPUs of each rate would need, with jobs of 64 new tokens."""
    job, worker = costs(figures)
    row = figures["scale"][-1]
    print(f"a job: {job}\na busy worker, each second: {worker}")
    for rate in rates:
        found = needs(gpus, rate, 64, job, worker, row["connections"] / row["workers"])
        print(f"{gpus} GPUs at {rate:g} tokens/s: {found}")


def measure(kind: str, options: argparse.Namespace) -> Any:
    """One of `scale`, `saturate` and `memory`, with workers of its own."""
    step_ms = options.step_ms if kind == "scale" else 0.0
    with Fleet(step_ms=step_ms, slots=options.slots, flags=options.flag) as fleet:
        if kind == "scale":
            return scale(fleet, options.workers, waves=options.waves, idle_s=options.idle, every_s=options.every)
        return saturate(fleet, options.workers, options.jobs) if kind == "saturate" else memory(fleet, options.jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--step-ms", type=float, default=100.0, help="what the device takes for a step")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--waves", type=float, default=3.0, help="jobs for each slot")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds of looking at idle workers; 0 for none")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two interactive jobs")
    parser.add_argument("--jobs", type=int, default=8_000, help="of `saturate` and `memory`")
    parser.add_argument("--flag", action="append", default=[], help="for each worker, as --flag=--without-gossip")
    parser.add_argument("--only", nargs="+", choices=["scale", "saturate", "memory"], help="leave the rest out")
    parser.add_argument("--json", "--output", type=Path, dest="json", help="write the figures as JSON")
    parser.add_argument("--paper", type=Path, nargs="+", help="measure nothing; 1,000 GPUs from the JSON of these runs")
    options = parser.parse_args()
    if options.paper:
        read = [json.loads(path.read_text()) for path in options.paper]
        paper({kind: rows for figures in read for kind, rows in figures.items()}, 1000, (1_000, 5_000, 20_000))
        return
    figures: dict[str, Any] = {"conditions": conditions(1) | {"cores": os.cpu_count(), "options": vars(options)}}
    for kind in options.only or ["scale", "saturate", "memory"]:
        figures[kind] = measure(kind, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, default=str))


if __name__ == "__main__":
    main()

"""Benchmark many workers on one Redis: scaling of throughput, balance between workers, cost of a job in Redis.

    python -m benchmarks.scaling                                   # 1, 2, 4, 8, 16 workers, 100 ms a step
    python -m benchmarks.scaling --only saturate --workers 1 2 4   # jobs of one token, steps that take no time

The workers are ordinary processes with a simulated device, which takes a fixed time for a step and no processor time
(benchmarks/modelled.py), so everything except the model is measured. Redis, workers and client share the cores of this
machine; the share of each is reported, and that of other processes. If all cores are busy, the throughput is the limit
of this machine and not of Redis; the limit of Redis follows from the processor time that a job takes there.

`idle` measures workers without jobs, `scale` bulk jobs of 32 to 96 tokens with occasional interactive jobs, `saturate`
jobs of one token in messages of 16 and of 1, and `memory` the size of waiting and finished jobs in Redis.
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
from pathlib import Path
from typing import Any

import redis

from benchmarks.capacity import paper
from benchmarks.conditions import conditions
from benchmarks.usage import Reading, busy_s, processor_s, rate_in_the_middle
from benchmarks.workloads import Item, echo
from headrace.client import Client
from headrace.client.wire.redis import connect
from headrace.worker.child_processes import die_with_parent
from headrace.worker.redis_server import EmbeddedRedis

MODEL = "modelled"
NOBODY = "nobody-serves-this"
START_S = 300.0


def long_jobs(count: int) -> list[Item]:
    """Prompts of 8 to 128 tokens with 32 to 96 new tokens each, 64 on average."""
    rng = random.Random(1)
    return [Item([rng.randrange(50000) for _ in range(rng.randint(8, 128))], 32 + i * 37 % 65) for i in range(count)]


def short_jobs(count: int) -> list[Item]:
    """Prompts of 8 to 32 tokens with one new token each."""
    rng = random.Random(3)
    return [Item([rng.randrange(50000) for _ in range(rng.randint(8, 32))], 1) for _ in range(count)]


def request(item: Item, **fields: Any) -> dict[str, Any]:
    """The request of an item."""
    return {"prompt": item.prompt, "max_tokens": item.new_tokens, "temperature": 0, "ignore_eos": True, **fields}


class Fleet:
    """A context manager: its own Redis, a client, and worker processes with simulated devices."""

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
        """Start or stop workers until this many read the queue."""
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
        """Tokens per second of the devices if every slot were always full and everything else took no time."""
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
        """Memory in use by Redis, in bytes."""
        info: dict[str, Any] = self.redis.info("memory")  # type: ignore[assignment]
        return int(info["used_memory"])

    def connections(self) -> int:
        """The number of connections to Redis, of all its clients."""
        info: dict[str, Any] = self.redis.info("clients")  # type: ignore[assignment]
        return int(info["connected_clients"])


class Visitor:
    """Submits an interactive job of one token at intervals, and records its latency."""

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


def run(fleet: Fleet, items: Sequence[Item], *, together: bool = True, every_s: float | None = None) -> dict[str, Any]:
    """Run the items and return the measurements.

    Args:
        together: submit the jobs in messages of up to 16; otherwise one message for each job.
        every_s: seconds between two interactive jobs; None for no interactive jobs.
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
            raise SystemExit(f"job {job.id} has tokens that its device did not compute")
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
    """Print the measurements of `run` and return them."""
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
    """Resources that idle workers use per second."""
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
    """Increase the number of workers, each time with `waves` jobs for each slot."""
    rows = []
    for count in counts:
        fleet.grow(count)
        row: dict[str, Any] = {"idle": idle(fleet, idle_s)} if idle_s else {}
        rows.append(row | told(run(fleet, long_jobs(round(count * fleet.slots * waves)), every_s=every_s)))
    return rows


def saturate(fleet: Fleet, counts: Sequence[int], jobs: int) -> list[dict[str, Any]]:
    """Submit as many jobs of one token as this machine can process, in messages of 16 and then of 1."""
    rows = []
    for count in counts:
        fleet.grow(count)
        run(fleet, short_jobs(64))
        for together in (True, False):
            items = short_jobs(jobs if together else jobs // 4)
            rows.append({"together": together} | told(run(fleet, items, together=together)))
    return rows


def memory(fleet: Fleet, jobs: int) -> dict[str, float]:
    """Bytes in Redis for a waiting job and for a finished one."""
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


def measure(kind: str, options: argparse.Namespace) -> Any:
    """Run `scale`, `saturate` or `memory` with newly started workers."""
    step_ms = options.step_ms if kind == "scale" else 0.0
    with Fleet(step_ms=step_ms, slots=options.slots, flags=options.flag) as fleet:
        if kind == "scale":
            return scale(fleet, options.workers, waves=options.waves, idle_s=options.idle, every_s=options.every)
        return saturate(fleet, options.workers, options.jobs) if kind == "saturate" else memory(fleet, options.jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--step-ms", type=float, default=100.0, help="time of a step of the device, in milliseconds")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--waves", type=float, default=3.0, help="jobs for each slot")
    parser.add_argument("--idle", type=float, default=5.0, help="seconds to measure idle workers; 0 to skip")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between two interactive jobs")
    parser.add_argument("--jobs", type=int, default=8_000, help="number of jobs of `saturate` and `memory`")
    parser.add_argument(
        "--flag", action="append", default=[], help="an option for each worker, for example --flag=--without-gossip"
    )
    parser.add_argument("--only", nargs="+", choices=["scale", "saturate", "memory"], help="run only these")
    parser.add_argument("--json", "--output", type=Path, dest="json", help="write the figures as JSON")
    parser.add_argument(
        "--paper", type=Path, nargs="+", help="do not measure; estimate 1,000 GPUs from the JSON of these runs"
    )
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

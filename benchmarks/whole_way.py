"""Benchmark the whole path through client, Redis and Celery against the engine alone, with the same jobs.

Starts its own Redis and its own `celery -A worker worker`. Engine and worker have the same model, number type and
threads, and are measured alternately, so that only one of them computes at a time. Figures are new tokens per second.
The time includes the prompts, and the client's checking, publishing and reading. Only ratios within one run are
meaningful.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.workloads import WORKLOADS, Item
from headrace.client import Client
from headrace.client.wire.requests import parse_request
from headrace.config import load_settings
from headrace.worker.child_processes import die_with_parent
from headrace.worker.engine.build import load_engine
from headrace.worker.redis_server import EmbeddedRedis

FLOOD_JOBS = 5_000
QUEUED_JOBS = 100_000
IDLE_S = 30.0


def flood(count: int) -> list[Item]:
    """Prompts of 8 to 32 tokens with 4 new tokens each."""
    rng = random.Random(3)
    return [Item([rng.randrange(50000) for _ in range(rng.randint(8, 32))], 4) for _ in range(count)]


def requests(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The requests of the items: greedy, with exactly the requested number of tokens."""
    return [{"prompt": i.prompt, "max_tokens": i.new_tokens, "temperature": 0, "ignore_eos": True} for i in items]


def tokens(items: Sequence[Item]) -> int:
    """The number of new tokens of all items."""
    return sum(item.new_tokens for item in items)


class EngineOnly:
    """The engine, driven step by step in this thread."""

    def __init__(self, model: str, dtype: str) -> None:
        self.engine = load_engine(
            load_settings(model=model, dtype=dtype, device="cpu", draft_tokens=0, prefix_cache=False)
        )

    def run(self, items: Sequence[Item]) -> float:
        """Seconds from the first submission to the last result."""
        parsed = [parse_request(fields) for fields in requests(items)]
        began = time.perf_counter()
        futures = [self.engine.submit(request) for request in parsed]
        while self.engine.step():
            pass
        took = time.perf_counter() - began
        assert all(future.done() for future in futures)
        return took


class WholeWay:
    """A client, a Redis, and a worker process."""

    def __init__(self, client: Client, process: subprocess.Popen[bytes]) -> None:
        self.client, self.process = client, process

    def run(self, items: Sequence[Item]) -> tuple[float, float]:
        """Seconds until all is submitted, and until the last result is read."""
        wanted = requests(items)
        began = time.perf_counter()
        jobs = self.client.submit_many(wanted)
        submitted = time.perf_counter() - began
        got = sum(job.result(0).usage.completion_tokens for job in self.client.as_completed(jobs, timeout=3600))
        took = time.perf_counter() - began
        assert got == tokens(items)
        return submitted, took

    def cpu_seconds(self) -> float:
        """Processor time that the worker has used so far, user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        """Resident memory of the worker."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def whole_way(model: str, dtype: str, threads: int) -> Iterator[WholeWay]:
    """A context manager: a Redis and a worker that is ready."""
    settings = {"HEADRACE_MODEL": model, "HEADRACE_DTYPE": dtype, "HEADRACE_THREADS": str(threads)}
    settings["HEADRACE_DRAFT_TOKENS"] = "0"  # too favourable here: random weights repeat themselves
    with EmbeddedRedis.ephemeral() as server, tempfile.NamedTemporaryFile() as log:
        environment = {**os.environ, **settings, "HEADRACE_REDIS_URL": server.url, "HEADRACE_DEVICE": "cpu"}
        command = die_with_parent([sys.executable, "-m", "celery", "-A", "worker", "worker"])
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            with Client(redis_url=server.url, model=model) as client:
                while not client.status().serves(client.model_name):
                    if process.poll() is not None:
                        raise SystemExit(Path(log.name).read_text())
                    time.sleep(0.2)
                yield WholeWay(client, process)
        finally:
            process.kill()
            process.wait()


def compare(engine_only: EngineOnly, way: WholeWay, name: str, items: Sequence[Item], rounds: int) -> dict[str, Any]:
    """Measure both alternately; returns the best round of each."""
    engine_s, way_s, submit_s = [], [], []
    for _ in range(rounds):
        time.sleep(1)
        engine_s.append(engine_only.run(items))
        time.sleep(1)
        submitted, took = way.run(items)
        submit_s.append(submitted)
        way_s.append(took)
    engine, whole = tokens(items) / min(engine_s), tokens(items) / min(way_s)
    row = {"workload": name, "jobs": len(items), "engine_tokens_per_s": engine, "whole_way_tokens_per_s": whole}
    print(
        f"{name:10} {len(items):6} jobs   engine {engine:8.0f} tokens/s   whole way {whole:8.0f} tokens/s   "
        f"{whole / engine:6.1%}   submitted in {min(submit_s):.2f} s",
        flush=True,
    )
    return row | {"ratio": whole / engine, "submit_s": min(submit_s)}


def idle_share(way: WholeWay) -> float:
    """Share of one core that an idle worker uses."""
    time.sleep(3)
    began, used = time.perf_counter(), way.cpu_seconds()
    time.sleep(IDLE_S)
    share = (way.cpu_seconds() - used) / (time.perf_counter() - began)
    print(f"idle       {share:.2%} of a core over {IDLE_S:g} s", flush=True)
    return share


def backlog(way: WholeWay, count: int) -> dict[str, Any]:
    """Speed on W64 at priority `interactive`, and memory, with an empty queue and with `count` jobs behind it."""
    items = WORKLOADS["ragged"]()
    urgent = [{**fields, "priority": "interactive"} for fields in requests(items)]

    def seconds() -> float:
        began = time.perf_counter()
        for _ in way.client.as_completed(way.client.submit_many(urgent), timeout=3600):
            pass
        return time.perf_counter() - began

    seconds()
    before_s, before = min(seconds(), seconds()), way.resident_bytes()
    other = Client(settings=way.client.settings)
    began = time.perf_counter()
    other.submit_many(requests(flood(count)), model="nobody-serves-this")
    queued_s = time.perf_counter() - began
    behind_s, behind = min(seconds(), seconds()), way.resident_bytes()
    other.close()
    row = {"queued": count, "queued_in_s": queued_s, "w64_s": before_s, "w64_backlog_s": behind_s}
    row |= {"resident_bytes": before, "resident_backlog_bytes": behind}
    print(
        f"backlog    {count} jobs queued in {queued_s:.1f} s; W64 {before_s:.2f} s -> {behind_s:.2f} s, "
        f"memory {before / 2**20:.0f} -> {behind / 2**20:.0f} MiB",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="a directory, or a name as in HEADRACE_MODEL")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--flood", type=int, default=FLOOD_JOBS, help="number of short jobs that are submitted at once")
    parser.add_argument("--queued", type=int, default=QUEUED_JOBS, help="jobs that wait while W64 is measured again")
    parser.add_argument("--only", nargs="+", choices=["ragged", "flood", "idle", "backlog"], help="run only these")
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    wanted = options.only or ["ragged", "flood", "idle", "backlog"]
    torch.set_num_threads(options.threads)
    conditions = {"model": Path(options.model).name, "dtype": options.dtype, "threads": options.threads}
    conditions |= {
        "torch": torch.__version__,
        "cpu": platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
    print(", ".join(f"{name} {value}" for name, value in conditions.items()), flush=True)
    figures: dict[str, Any] = {"conditions": conditions}
    with whole_way(options.model, options.dtype, options.threads) as way:
        if "idle" in wanted:
            figures["idle_share"] = idle_share(way)
        if {"ragged", "flood"} & set(wanted):
            engine_only = EngineOnly(options.model, options.dtype)
            engine_only.run(flood(64))  # warm up both
            way.run(flood(64))
            for name, items in (("ragged", WORKLOADS["ragged"]()), ("flood", flood(options.flood))):
                if name in wanted:
                    figures[name] = compare(engine_only, way, name, items, options.rounds)
        if "backlog" in wanted:
            figures["backlog"] = backlog(way, options.queued)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

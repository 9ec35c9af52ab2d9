"""Benchmark `headrace batch`: memory of the client, lines checked per second, and throughput relative to the engine.

    python -m benchmarks.bulk --only memory --lines 200000 1000000
    python -m benchmarks.bulk --only rate

`memory` checks a file with the given number of lines in one process, makes a dry run of it in another, and reports the
peak memory of each. `rate` runs the ragged workload on the engine and through the command, with the same model. The
command's time is the one it reports, which excludes starting and checking.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.whole_way import EngineOnly, requests, tokens, whole_way
from benchmarks.workloads import WORKLOADS, Item

#: Repetitions of the ragged workload, so that the end of a run, where slots are empty, has little weight.
REPEATS = 16


WORDS = "the river mill turns a wheel of stone and water runs on under grey morning sky while people wait"


def write_lines(path: Path, count: int) -> int:
    """Write a file in the Batch format with 60 words in each prompt. Returns its size in bytes."""
    dice = random.Random(1)
    words = WORDS.split()
    with path.open("w") as file:
        for number in range(count):
            body = {"prompt": " ".join(dice.choices(words, k=60)), "max_tokens": 16, "temperature": 0}
            line = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path.stat().st_size


#: Run in a separate process without torch: checks a file and prints lines per second and peak memory before and after.
CHECK = """
import json, sys, time
from headrace.client import Client
from headrace.client.batch.run import Batch
from headrace.config import load_settings
from headrace.worker.cli.batch_report import peak_memory as peak

with Client(settings=load_settings(redis_url="redis://localhost:1/0")) as client:
    before, began = peak(), time.perf_counter()
    rows = Batch(client, sys.argv[1]).checked.rows
    took = time.perf_counter() - began
print(json.dumps({"rows": rows, "seconds": took, "before_bytes": before, "peak_bytes": peak()}))
"""


def own_process(*command: str, **environment: str) -> dict[str, Any]:
    """Run a process and parse its output as JSON."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory(counts: Sequence[int], url: str) -> list[dict[str, Any]]:
    """Speed and memory of checking, and memory of a dry run, for files with these numbers of lines."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for count in counts:
            path = Path(directory) / "in.jsonl"
            size = write_lines(path, count)
            checked = own_process("-c", CHECK, str(path))
            print(
                f"{count:9} lines, {size / 1e6:.0f} MB: checked {count / checked['seconds']:,.0f} lines/s, "
                f"memory {checked['before_bytes'] / 1e6:.0f} -> {checked['peak_bytes'] / 1e6:.0f} MB",
                flush=True,
            )
            command = ("-m", "headrace.worker.cli", "batch", "-i", str(path), "--dry-run", "--json")
            dry = own_process(*command, HEADRACE_REDIS_URL=url)
            print(f"{'':9} dry run: memory {dry['peak_memory_bytes'] / 1e6:.0f} MB, {dry}", flush=True)
            rows.append({"lines": count, "file_bytes": size, "check": checked, "dry_run": dry})
    return rows


def rate(url: str, threads: int, rounds: int) -> dict[str, Any]:
    """New tokens per second of the engine alone and of the command, measured alternately."""
    items: list[Item] = WORKLOADS["ragged"]() * REPEATS
    engine_only = EngineOnly("demo", "float32")
    engine_only.run(items[:64])
    best: dict[str, float] = {"engine": 0.0, "batch": 0.0}
    with tempfile.TemporaryDirectory() as directory:
        source, output = Path(directory) / "in.jsonl", Path(directory) / "out.jsonl"
        source.write_text("".join(json.dumps(fields) + "\n" for fields in requests(items)))
        command = ("-m", "headrace.worker.cli", "batch", "-i", str(source), "-o", str(output), "--overwrite", "--json")
        for _ in range(rounds):
            best["engine"] = max(best["engine"], tokens(items) / engine_only.run(items))
            report = own_process(*command, HEADRACE_REDIS_URL=url)
            if report["completion_tokens"] != tokens(items):
                raise SystemExit(f"the batch made {report['completion_tokens']} tokens of {tokens(items)}")
            best["batch"] = max(best["batch"], report["completion_tokens"] / report["seconds"])
    print(
        f"{len(items)} rows, {threads} threads: engine {best['engine']:.0f} tokens/s, headrace batch "
        f"{best['batch']:.0f} tokens/s, {best['batch'] / best['engine']:.0%}"
    )
    return {"rows": len(items), "tokens_per_s": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["memory", "rate"])
    parser.add_argument("--json", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with whole_way("demo", "float32", options.threads) as way:
        if options.only != "rate":
            figures["memory"] = memory(options.lines, way.client.url)
        if options.only != "memory":
            figures["rate"] = rate(way.client.url, options.threads, options.rounds)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

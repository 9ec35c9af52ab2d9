"""`python -m tests.fuzz`: every target on many cases, each in a process of its own, as a table. Exit code 1 on a fault.

python -m tests.fuzz [--cases N] [TARGET ...]
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import time

import structlog

from tests.fuzz.harness import run
from tests.fuzz.targets import TARGETS

#: Cases of one round.
ROUND = 500

#: A target that takes longer waits for something that never comes.
TARGET_TIMEOUT_S = 900


def main() -> None:
    """Run the targets named, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Fuzz everything that comes from outside."
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(target.name for target in TARGETS))
    parser.add_argument("--cases", type=int, help="of each target, instead of its usual number")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    chosen = [target for target in TARGETS if not given.targets or target.name in given.targets]
    if given.child:
        _child(chosen[0].name, given.cases or chosen[0].many)
        return
    print(f"{'target':<14}{'cases':>8}{'seconds':>9}{'peak MB':>9}", flush=True)
    failed, total, began = [], 0, time.monotonic()
    for target in chosen:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--child",
            target.name,
            "--cases",
            str(given.cases or target.many),
        ]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TARGET_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"{target.name:<14} hangs", flush=True)
            failed.append(target.name)
            continue
        if done.returncode:
            print(f"{done.stdout}{target.name:<14} failed (exit code {done.returncode})", flush=True)
            failed.append(target.name)
            continue
        cases, seconds, peak = done.stdout.split()
        total += int(cases)
        print(f"{target.name:<14}{int(cases):>8,}{float(seconds):>9.1f}{int(peak):>9,}", flush=True)
    print(f"{'all':<14}{total:>8,}{time.monotonic() - began:>9.1f}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _child(name: str, cases: int) -> None:
    target = next(target for target in TARGETS if target.name == name)
    # What the code says of hostile input as it should, a line for each, is not what is looked for here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    run(target, 1, seeded=True)  # what is built once, models and tables, is no case's doing
    before = _peak()
    began = time.monotonic()
    done = 0
    while done < cases:  # in rounds: hypothesis remembers what it has tried, and that is not to count
        done += run(target, min(ROUND, cases - done), seeded=False)
    print(done, f"{time.monotonic() - began:.1f}", _peak() - before)


def _peak() -> int:
    """The most memory this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()

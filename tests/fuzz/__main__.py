"""`python -m tests.fuzz`: run each target in its own process and print a table. Exit code 1 if one fails.

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

#: Number of cases in one round.
ROUND = 500

#: A target that takes longer hangs.
TARGET_TIMEOUT_S = 900


def main() -> None:
    """Run the given targets, or all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Fuzz all code that reads untrusted input."
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(target.name for target in TARGETS))
    parser.add_argument("--cases", type=int, help="number of cases of each target, instead of its default")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    chosen = [target for target in TARGETS if not given.targets or target.name in given.targets]
    if given.child:
        _child(chosen[0].name, given.cases or chosen[0].full_cases)
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
            str(given.cases or target.full_cases),
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
    # The code logs a line for each hostile input, as it should; here these lines would only hide the table.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    run(target, 1, seeded=True)  # build models and tables once, so that their memory is not counted
    before = _peak()
    began = time.monotonic()
    done = 0
    while done < cases:  # in rounds: hypothesis stores every example, and that memory must not count
        done += run(target, min(ROUND, cases - done), seeded=False)
    print(done, f"{time.monotonic() - began:.1f}", _peak() - before)


def _peak() -> int:
    """The peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()

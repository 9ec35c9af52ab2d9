"""Benchmark the engine and its peers, alternately within one run: `make bench`, or see `--help`.

The machine may be shared and noisy: only ratios within one run mean anything. Each contender runs a workload `--rounds`
times, in alternation, and its best time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from benchmarks.contenders import OURS, PEERS, Entry, Seat, Tokens, entries, missing
from benchmarks.limits import BYTES, Machine, Rates, Shape, bytes_read, limit_s, operations
from benchmarks.models import SHAPES, VOCABULARY, demo_model, random_model
from benchmarks.processes import Failed, Remote, TooSlow
from benchmarks.rungs import FIXED, RUNGS, environment
from benchmarks.workloads import WORKLOADS, Item

#: The precisions of a run.
DTYPES = ("float32", "bfloat16")
#: A float32 contender that agrees with our engine on a smaller share of tokens does not compute the same function.
LEAST_AGREEMENT = 0.95


@dataclass
class Standing:
    """The result of one contender on one workload. Rates are in new tokens per second."""

    plan: str = ""
    rounds: list[float] = field(default_factory=list)
    tried: dict[str, float | str] = field(default_factory=dict)
    out: str = ""

    @property
    def best(self) -> float:
        return max(self.rounds, default=0.0)


class Place:
    """The process of a contender, restarted after a call failed or took too long."""

    def __init__(self, entry: Entry, threads: int, scratch: Path, folder: Path) -> None:
        self.entry, self._threads, self._scratch, self._folder = entry, threads, scratch, folder
        self._remote: Remote | None = None
        self.agreement: float | None = None

    @property
    def remote(self) -> Remote:
        if self._remote is None or not self._remote.alive:
            remote = Remote(Seat, self.entry, self._threads, self._scratch)
            try:
                remote.call("load", self._folder)
            except Failed:
                remote.close()  # the next call starts a new process and fails in the same way
                raise
            self._remote = remote
            self.run(_warm_up(), self._remote.call("plans", _warm_up())[0], None)
        return self._remote

    def generate(self, folder: Path, items: Sequence[Item]) -> Tokens:
        """The tokens for another model, computed in a separate process."""
        remote = Remote(Seat, self.entry, self._threads, self._scratch)
        try:
            remote.call("load", folder)
            tokens: Tokens = remote.call("run", items, remote.call("plans", items)[0])[1]
            return tokens
        finally:
            remote.close()

    def run(self, items: Sequence[Item], plan: str, limit: float | None) -> float:
        """New tokens per second; raises TooSlow after `limit` seconds, and Failed with the contender's message."""
        took, _ = self.remote.call("run", items, plan, limit_s=limit)
        return sum(item.new_tokens for item in items) / float(took)

    def close(self) -> None:
        if self._remote:
            self._remote.close()


def _warm_up() -> list[Item]:
    rng = random.Random(5)
    return [Item([rng.randrange(50000) for _ in range(rng.randint(8, 40))], 8) for _ in range(8)]


def check_items() -> list[Item]:
    """Prompts of different lengths that must give the same tokens from every contender."""
    rng = random.Random(6)
    return [Item([rng.randrange(50000) for _ in range(rng.randint(5, 60))], rng.randint(16, 32)) for _ in range(16)]


def agreement(tokens: Tokens, reference: Tokens) -> float:
    """The share of the reference's tokens that come before a row's first difference from it."""
    same = 0
    for row, expected in zip(tokens, reference, strict=True):
        differs = (i for i, pair in enumerate(zip(row, expected, strict=True)) if pair[0] != pair[1])
        same += next(differs, len(expected))
    return same / sum(map(len, reference))


def verify(places: Sequence[Place], reference: Place) -> list[Place]:
    """Compare each contender's greedy tokens on the bundled model with ours in float32, and print the agreement.

    Random weights are not suitable: with a tied head they repeat the last token of the prompt, whatever attention does.

    Returns:
        The contenders that can be measured: they load the model and, in float32, agree.
    """
    expected = reference.generate(demo_model(), check_items())
    fit = []
    for place in places:
        try:
            place.agreement = agreement(place.generate(demo_model(), check_items()), expected)
        except Failed as error:
            print(f"  {place.entry.name:32} left out: {error}", flush=True)
            continue
        right = place.entry.precision != "float32" or place.agreement >= LEAST_AGREEMENT
        verdict = "" if right else ": left out, its tokens differ too much"
        print(f"  {place.entry.name:32} {place.agreement:6.1%} of tokens agree with ours{verdict}", flush=True)
        if right:
            fit.append(place)
    return fit


def measure(places: Sequence[Place], items: Sequence[Item], options: argparse.Namespace) -> dict[str, Standing]:
    """Try the plans of each contender, then run the best plan of each in alternation.

    Our engine is first, and its time sets the time limit of the others. The run that selected a plan counts as its
    first round.
    """
    standings = {place.entry.name: Standing() for place in places}
    patience = float(options.limit)
    for place in places:
        standing = standings[place.entry.name]
        _choose(place, items, standing, patience, options.tuning)
        if place.entry.peer == OURS and standing.rounds:
            patience = min(patience, max(10.0, options.patience * _seconds(items, standing.best)))
    for _ in range(options.rounds - 1):
        for place in places:
            standing = standings[place.entry.name]
            if not standing.out:
                _attempt(place, items, standing, patience)
    return standings


def _choose(place: Place, items: Sequence[Item], standing: Standing, limit: float, tuning: float) -> None:
    """Run every plan once, within `tuning` seconds. A plan is stopped when it takes a quarter longer than the best."""
    spent = 0.0
    try:
        plans = place.remote.call("plans", items)
    except Failed as error:
        standing.out = str(error)
        return
    for plan in plans:
        if spent > tuning:
            standing.tried[plan] = f"not tried, because {tuning:.0f} s had passed"
            continue
        within = min(limit, 1.25 * _seconds(items, standing.best) + 1) if standing.best else limit
        try:
            rate = place.run(items, plan, within)
        except (TooSlow, Failed) as error:
            standing.tried[plan] = str(error)
            spent += within if isinstance(error, TooSlow) else 0
            continue
        standing.tried[plan] = rate
        spent += _seconds(items, rate)
        if rate > standing.best:
            standing.plan, standing.rounds = plan, [rate]
    if not standing.rounds:
        standing.out = str(next(iter(standing.tried.values())))


def _attempt(place: Place, items: Sequence[Item], standing: Standing, limit: float) -> None:
    try:
        standing.rounds.append(place.run(items, standing.plan, limit))
    except (TooSlow, Failed) as error:
        standing.out = f"in a later round: {error}"


def _seconds(items: Sequence[Item], rate: float) -> float:
    return sum(item.new_tokens for item in items) / rate


def figure(
    shape: str, dtype: str, workload: str, standings: dict[str, Standing], rates: dict[str, Rates]
) -> dict[str, Any]:
    """One workload, ready for JSON. Seconds, new tokens per second, shares from 0 to 1. `rates`: for each precision."""
    items = WORKLOADS[workload]()
    layers, heads, width, shared = SHAPES[shape]
    numbers = Shape(layers, width, VOCABULARY, width // heads * shared)
    peers = {name: s.best for name, s in standings.items() if not name.startswith(OURS) and s.best}
    best = max(peers, key=peers.__getitem__) if peers else None
    tokens = sum(item.new_tokens for item in items)

    def ours(precision: str) -> dict[str, Any]:
        limit = limit_s(numbers, items, BYTES[precision], rates[precision])
        rate = standings[f"{OURS} {precision}"].best
        return {
            "ratio": rate / peers[best] if best else None,
            "rates": asdict(rates[precision]),
            "bytes_read": bytes_read(numbers, items, BYTES[precision]),
            "limit_s": limit,
            "limit_tokens_per_s": tokens / limit,
            "share_of_limit": rate * limit / tokens,
        }

    return {
        "shape": shape,
        "dtype": dtype,
        "workload": workload,
        "new_tokens": tokens,
        "prompt_tokens": sum(len(item.prompt) for item in items),
        "contenders": {name: {"tokens_per_s": s.best, **asdict(s)} for name, s in standings.items()},
        "best_peer": best,
        "operations": operations(numbers, items),
        "ours": {precision: ours(precision) for precision in rates if standings[f"{OURS} {precision}"].best},
    }


def show(result: dict[str, Any]) -> None:
    """Print a figure as a table."""
    print(f"{result['shape']} {result['dtype']} {result['workload']}")
    for precision, ours in result["ours"].items():
        ratio = f", {ours['ratio']:.2f} times {result['best_peer']}" if ours["ratio"] else ""
        limit = f"{ours['share_of_limit']:.0%} of the machine's limit of {ours['limit_tokens_per_s']:.0f} tokens/s"
        print(f"  {OURS} {precision}: {limit}{ratio}")
    for name, standing in result["contenders"].items():
        if standing["rounds"]:
            print(f"  {name:32} {standing['tokens_per_s']:8.1f} tokens/s  {standing['plan']}", flush=True)
        else:
            print(f"  {name:32}        - {standing['out']}", flush=True)


def compare(options: argparse.Namespace, dtype: str, folder: Path, scratch: Path) -> Iterator[dict[str, Any]]:
    """Measure every requested workload in one precision."""
    with ExitStack() as stack:

        def place(entry: Entry) -> Place:
            made = Place(entry, options.threads, scratch, folder)
            stack.callback(made.close)
            return made

        machine = Remote(Machine, options.threads)
        stack.callback(machine.close)
        print(f"{dtype}, {options.threads} threads", flush=True)
        places = [place(entry) for entry in entries(dtype, options.peers)]
        if options.verify:
            places = verify(places, place(Entry(OURS, "float32")))
        for workload in options.workload:
            precisions = [place.entry.precision for place in places if place.entry.peer == OURS]
            before = {precision: machine.call("rates", precision) for precision in precisions}
            standings = measure(places, WORKLOADS[workload](), options)
            after = {precision: machine.call("rates", precision) for precision in precisions}
            best = {precision: before[precision].best(after[precision]) for precision in precisions}
            result = figure(options.shape, dtype, workload, standings, best)
            result["agreement"] = {place.entry.name: place.agreement for place in places}
            yield result


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        help="bfloat16 compares our bfloat16 and int8 with every peer in bfloat16 and int8",
    )
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contender's best plan")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help="none if no name follows")
    parser.add_argument("--isa", choices=RUNGS, help="hold every contender to this instruction set")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--models", type=Path, help="keep the random models in this directory")
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="do not compare tokens first")
    parser.add_argument("--patience", type=float, default=4, help="stop a peer that takes this many times our time")
    parser.add_argument("--limit", type=float, default=600, help="stop any run that takes this many seconds")
    parser.add_argument("--tuning", type=float, default=60, help="seconds for finding a contender's best plan")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--picture", type=Path, help="write the figures as a PNG")
    return parser.parse_args(words)


def set_environment(threads: int, rung: str | None) -> None:
    """The environment of the contenders' processes: threads, instruction set, and no log messages."""
    os.environ |= {
        **environment(rung),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
        # A process that was ended leaves semaphores, which the system frees; do not warn about them.
        "PYTHONWARNINGS": "ignore:resource_tracker",
    }


def main() -> None:
    options = parse()
    set_environment(options.threads, options.isa)
    if options.isa and (fixed := FIXED & set(options.peers)):
        print(f"{', '.join(fixed)}: left out, its instruction set is chosen when it is compiled")
        options.peers = [name for name in options.peers if name not in fixed]
    for peer in options.peers[:]:
        if absent := missing(peer):
            print(f"{peer}: not installed ({', '.join(absent)}); `make peers` installs it")
            options.peers = [name for name in options.peers if name != peer]
    report: dict[str, Any] = {"conditions": conditions(options.threads), "figures": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_model(options.shape, (options.models or Path(scratch)) / options.shape)
        for dtype in options.dtype:
            for result in compare(options, dtype, folder, Path(scratch)):
                show(result)
                report["figures"].append(result)
                if options.output:  # after each workload, because a run takes long and may be interrupted
                    options.output.write_text(json.dumps(report, indent=2))
    if options.picture:
        from benchmarks.picture import draw

        draw(report, options.picture)


if __name__ == "__main__":
    main()

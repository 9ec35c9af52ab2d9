"""Measures what the prefix cache gains for prompts with a common instruction, and what it costs for those without one.

    python -m benchmarks.prefixes                          # waves of 4, 1,000 prompts, and a second run of the same
    python -m benchmarks.prefixes --prompts 200 --waves 1 2 4 8 16
    python -m benchmarks.prefixes --apart --pairs 10       # the workloads "ragged" and "long", which share no prefix

The model has the shape of GPT-2 124M and random weights, and greedy tokens are computed without proposed ones. Both
engines have the same model. They take turns, wave by wave or run by run, so that other load on the machine meets both.
A wave arrives when the one before has been answered: what is measured is the time in which there is something to do.
On a busy machine use `--threads 1`, with which seconds are those of the process on its core.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.models import VOCABULARY, random_model
from benchmarks.workloads import WORKLOADS, Item

if TYPE_CHECKING:
    from headrace.worker.engine.engine import Engine

#: Tokens of the common instruction, tokens of each prompt's own, and new tokens.
INSTRUCTION, OWN, NEW = 512, 32, 16


def instructed(count: int) -> list[Item]:
    """Prompts that begin with the same instruction."""
    draw = random.Random(5)
    common = [draw.randrange(VOCABULARY) for _ in range(INSTRUCTION)]
    return [Item([*common, *(draw.randrange(VOCABULARY) for _ in range(OWN))], NEW) for _ in range(count)]


def load(folder: Path, *, prefix_cache: bool, dtype: str, threads: int | None) -> Engine:
    """An engine for the model, which is not started."""
    from headrace.config import Settings
    from headrace.worker.engine.build import load_engine

    options = {"dtype": dtype, "threads": threads, "prefix_cache": prefix_cache}
    return load_engine(Settings.model_validate({"model": str(folder), "device": "cpu", "draft_tokens": 0, **options}))


def compute(engine: Engine, items: list[Item]) -> tuple[float, list[list[int]]]:
    """Seconds, and the new tokens of each prompt."""
    import torch

    from headrace.client.wire.requests import GenerateRequest

    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    futures = [
        engine.submit(GenerateRequest(prompt=item.prompt, max_tokens=item.new_tokens, temperature=0, ignore_eos=True))
        for item in items
    ]
    while engine.step():
        pass
    return now() - start, [future.result().choices[0].token_ids for future in futures]


def forget(engine: Engine) -> None:
    """Evict all cached prefixes."""
    engine.scheduler.slots.evict_all()


def interval(ratios: list[float]) -> str:
    """The median with an interval that holds it in 95 % of measurements (of bootstrap samples)."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} [{medians[50]:.3f}, {medians[-51]:.3f}]"


def measure_waves(kept: Engine, living: Engine, items: list[Item], wave: int) -> None:
    """Print the seconds of both engines for prompts in waves of this size, and of a second run of the first engine."""
    forget(kept)
    ours, theirs, again, ratios = 0.0, 0.0, 0.0, []
    waves = [items[start : start + wave] for start in range(0, len(items), wave)]
    for i, part in enumerate(waves):
        first, second = (kept, living) if i % 2 else (living, kept)
        took = {engine: compute(engine, part) for engine in (first, second)}
        if took[kept][1] != took[living][1]:
            raise SystemExit(f"wave {i}: the two engines gave different tokens")
        ours, theirs = ours + took[kept][0], theirs + took[living][0]
        ratios.append(took[living][0] / took[kept][0])
    for part in waves:
        again += compute(kept, part)[0]
    print(
        f"{len(items)} prompts in waves of {wave}: kept {ours:.1f} s, living rows only {theirs:.1f} s, "
        f"ratio {theirs / ours:.2f}; of a wave {interval(ratios)}; second run {again:.1f} s",
        flush=True,
    )


def measure_apart(kept: Engine, living: Engine, workload: str, pairs: int) -> None:
    """Print the ratio of the two engines' times for prompts that share nothing: in each run prompts of their own."""
    ratios = []
    draw = random.Random(6)
    for i in range(pairs + 1):
        items = [Item([draw.randrange(VOCABULARY) for _ in x.prompt], x.new_tokens) for x in WORKLOADS[workload]()]
        first, second = (kept, living) if i % 2 else (living, kept)
        took = {engine: compute(engine, items)[0] for engine in (first, second)}
        print(f"  {workload}: {took[kept]:.2f} s with the cache, {took[living]:.2f} s without", flush=True)
        if i:  # the first run lets the arenas grow
            ratios.append(took[kept] / took[living])
    print(f"{workload}, time with the cache / without, {pairs} pairs: {interval(ratios)}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--waves", type=int, nargs="+", default=[4], help="prompts in a wave")
    parser.add_argument("--apart", nargs="*", choices=list(WORKLOADS), help="measure prompts that share nothing")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = random_model("124M", Path(folder))
        kept, living = (
            load(model, prefix_cache=on, dtype=arguments.dtype, threads=arguments.threads) for on in (True, False)
        )
    living.runner.model = kept.runner.model  # type: ignore[attr-defined]  # the same memory
    for engine in (kept, living):
        compute(engine, instructed(2))
    if arguments.apart is not None:
        for workload in arguments.apart or ("ragged", "long"):
            measure_apart(kept, living, workload, arguments.pairs)
        return
    for wave in arguments.waves:
        measure_waves(kept, living, instructed(arguments.prompts), wave)


if __name__ == "__main__":
    main()

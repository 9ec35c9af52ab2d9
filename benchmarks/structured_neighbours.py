"""Measures what hostile forms cost other jobs: the seconds of a job of 64 tokens beside eight jobs of 16 samples each.

    OMP_WAIT_POLICY=passive python -m benchmarks.structured_neighbours --threads 1 --rounds 3

The eight jobs have no form (the control), or each one of its own that is slow to follow or fails. The measured job has
no form, or a simple one. It first waits until rows of the others end, because 64 run at once. Load alone makes it slow,
so the ratio to the control counts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headrace.client.wire.requests import parse_request
from headrace.config import Settings

if TYPE_CHECKING:
    from headrace.worker.engine.engine import Engine

JOBS, SAMPLES, TOKENS = 8, 16, 64


def words(seed: int, count: int, length: int) -> list[str]:
    """Random words of lower-case letters."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length)) for _ in range(count)]


FORMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "400 choices": lambda seed: {"choice": words(seed, 400, 60)},
    "400 alternatives, repeated": lambda seed: {"regex": f"({'|'.join(words(seed, 400, 18))}){{1,20}}"},
    "200 words anywhere": lambda seed: {"regex": "|".join(f".*{word}" for word in words(seed, 200, 6))},
    "counted letters": lambda seed: {"regex": f"([a-z ]{{1,40}}[A-Z]){{1,{20 + seed}}}"},
    "patterns in JSON": lambda seed: {
        "json": {
            "type": "array",
            "items": {"type": "string", "pattern": "|".join(f"^.*{word}" for word in words(seed, 40, 5))},
        }
    },
    "exponential": lambda seed: {"regex": f"(.*a.{{{30 + seed}}})|(.*b.{{31}})|(.*c.{{32}})"},
}
SIMPLE = {"regex": "( [a-z]+)+"}


def neighbour_s(engine: Engine, make: Callable[[int], dict[str, Any]] | None, form: dict[str, Any] | None) -> float:
    """Seconds of a job that comes once the eight jobs have begun."""
    common = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0}
    futures = [
        engine.submit(
            parse_request(
                {"prompt": f"Job {i}:", "n": SAMPLES, "seed": i, "structured_outputs": make and make(i), **common}
            )
        )
        for i in range(JOBS)
    ]
    rows = min(engine.stats().slots - 1, JOBS * SAMPLES)
    while engine.stats().running < rows and not all(future.done() for future in futures):
        time.sleep(0.01)
    start = time.perf_counter()
    engine.submit(parse_request({"prompt": "The river", "seed": 1, "structured_outputs": form, **common})).result()
    took = time.perf_counter() - start
    for future in futures:
        future.cancel()
    while engine.stats().running:
        time.sleep(0.01)
    return took


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS])
    arguments = parser.parse_args()
    from headrace.worker.engine.build import load_engine

    with load_engine(Settings(model="demo", device="cpu", dtype="float32", threads=arguments.threads)) as engine:
        for form in (None, SIMPLE):
            neighbour_s(engine, None, form)  # compiles the form and the kernels
            for name in arguments.forms:
                pairs = [
                    (neighbour_s(engine, None, form), neighbour_s(engine, FORMS[name], form))
                    for _ in range(arguments.rounds)
                ]
                ratio = statistics.median(hostile / control for control, hostile in pairs)
                shown = ", ".join(f"{control:.2f} and {hostile:.2f} s" for control, hostile in pairs)
                print(f"{name}, job {'with' if form else 'without'} form: ratio {ratio:.2f} ({shown})", flush=True)


if __name__ == "__main__":
    main()

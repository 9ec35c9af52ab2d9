"""Measures what a form of the text costs: tokens per second with all rows under a pattern or a JSON schema, or without.

    python -m benchmarks.structured --dtype float32 --rounds 5

64 rows with prompts of 8 to 128 random tokens write 64 tokens each, sampled at temperature 1. The model has the shape
of GPT-2 124M and random weights. The forms allow no end before that, so that all runs have the same number of tokens.
Each run under a form has one without beside it, before or after it in turn; the median of the ratios counts. The ratio
of the processor time, which includes that of the thread that computes masks, hardly depends on what else the machine
does: let idle threads sleep for it (OMP_WAIT_POLICY=passive).
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.models import VOCABULARY, random_model

if TYPE_CHECKING:
    from headrace.worker.engine.engine import Engine

ROWS = 64
FORMS: dict[str, dict[str, Any]] = {
    "regex": {"regex": r"([A-Z][a-z]+( [a-z]+)+, \d{4}-\d\d-\d\d\n){100}"},
    # Each number of letters that were written is a state of its own, so that rows share few masks.
    "counting regex": {"regex": r"([A-Z][a-z]{1,10} [a-z ]{1,40}, \d{4}-\d\d-\d\d\n){100}"},
    "json": {
        "json": {
            "type": "array",
            "minItems": 100,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 30},
                    "age": {"type": "integer", "minimum": 0, "maximum": 120},
                    "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
                },
                "required": ["name", "age", "tags"],
                "additionalProperties": False,
            },
        }
    },
}


class Run(NamedTuple):
    """What a run gave per second of the clock, prompts included, and per second of processor time."""

    tokens_per_s: float
    tokens_per_cpu_s: float


def run(engine: Engine, prompts: list[list[int]], count: int, form: dict[str, Any] | None) -> Run:
    """Write `count` tokens after each prompt."""
    from headrace.client.wire.requests import parse_request

    fields = {"max_tokens": count, "ignore_eos": True, "structured_outputs": form}
    requests = [parse_request({"prompt": prompt, "seed": i, **fields}) for i, prompt in enumerate(prompts)]
    start, cpu = time.perf_counter(), time.process_time()
    futures = [engine.submit(request) for request in requests]
    tokens = sum(future.result().usage.completion_tokens for future in futures)
    found = Run(tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu))
    if tokens != len(prompts) * count:
        raise RuntimeError(f"{tokens} tokens were written in place of {len(prompts) * count}")
    return found


def measure(engine: Engine, names: list[str], rounds: int, count: int) -> None:
    """Print the ratios of each form, and the tokens per second of all runs."""
    draw = random.Random(0)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(8, 128))] for _ in range(ROWS)]
    for name in names:
        form = FORMS[name]
        run(engine, prompts, 2, form)  # compiles the grammar and the kernels
        pairs = []
        for number in range(rounds):
            if number % 2:
                formed, free = run(engine, prompts, count, form), run(engine, prompts, count, None)
            else:
                free, formed = run(engine, prompts, count, None), run(engine, prompts, count, form)
            pairs.append((formed, free))
            print(f"{name}: {formed} and without {free}", flush=True)
        for field in Run._fields:
            ratios = [getattr(formed, field) / getattr(free, field) for formed, free in pairs]
            shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"{name}, {field}: median ratio {statistics.median(ratios):.3f} ({shown})", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each row")
    parser.add_argument("--models", type=Path, help="directory where the model is kept")
    arguments = parser.parse_args()
    from headrace.config import Settings
    from headrace.worker.engine.build import load_engine

    with tempfile.TemporaryDirectory() as scratch:
        folder = random_model("124M", (arguments.models or Path(scratch)) / "124M")
        with load_engine(Settings(model=str(folder), device="cpu", dtype=arguments.dtype)) as engine:
            measure(engine, arguments.forms, arguments.rounds, arguments.tokens)


if __name__ == "__main__":
    main()

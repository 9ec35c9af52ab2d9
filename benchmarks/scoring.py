"""Measures scoring of continuations: headrace's engine beside transformers' best padded batch, and both beside float64.

    python -m benchmarks.scoring --pairs 1000 --prompt 300 --continuation 10

The model has the shape of GPT-2 124M and random weights. Both compute in float32 with the threads that torch uses. The
two take turns, half of the pairs each time, so that other load on the machine meets both.
"""

from __future__ import annotations

import argparse
import functools
import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.models import VOCABULARY, random_model

if TYPE_CHECKING:
    from headrace.worker.engine.engine import Engine

Pair = tuple[list[int], list[int]]
#: Sizes of transformers' batches; the fastest counts.
BATCHES = (1, 4, 16, 32)
#: Pairs from which the fastest size is found, and pairs that are compared with float64.
TRIALS, COMPARED = 32, 4


def make_pairs(count: int, prompt: int, continuation: int) -> list[Pair]:
    """Random pairs of token ids; no two share a prefix."""
    draw = random.Random(0)
    ids = [[draw.randrange(VOCABULARY) for _ in range(prompt + continuation)] for _ in range(count)]
    return [(each[:prompt], each[prompt:]) for each in ids]


def headrace_scores(engine: Engine, pairs: list[Pair]) -> list[list[float]]:
    """The log probabilities of each continuation, computed by the engine."""
    from headrace.client.wire.requests import GenerateRequest

    futures = [
        engine.submit(GenerateRequest(prompt=prompt, continuation=continuation, max_tokens=0))
        for prompt, continuation in pairs
    ]
    return [[each.logprob or 0.0 for each in future.result().choices[0].logprobs or []] for future in futures]


def transformers_scores(model: Any, pairs: list[Pair], batch: int, *, kept: bool) -> list[list[float]]:
    """The same by transformers, in padded batches; `kept`: logits of the needed rows only."""
    import torch

    found: list[list[float]] = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        count = len(part[0][1])
        ids = torch.tensor([[*prompt, *continuation] for prompt, continuation in part])
        with torch.inference_mode():
            more = {"logits_to_keep": count + 1} if kept else {}
            logits = model(ids, use_cache=False, **more).logits[:, -count - 1 : -1]
            scores = logits.log_softmax(-1).gather(2, ids[:, -count:, None])[..., 0]
        found += scores.tolist()
    return found


def largest_error(folder: Path, pairs: list[Pair], scores: list[list[float]]) -> float:
    """The largest difference of a log probability from float64."""
    from headrace.worker.fidelity.references.float64 import Float64

    worst = 0.0
    traces = Float64(folder).traces([[*prompt, *continuation] for prompt, continuation in pairs])
    for (prompt, continuation), trace, found in zip(pairs, traces, scores, strict=True):
        for at, (token, score) in enumerate(zip(continuation, found, strict=True), start=len(prompt) - 1):
            row = trace["logits"][at]
            top = float(row.max())
            expected = float(row[token]) - top - math.log(math.fsum(math.exp(float(x) - top) for x in row))
            worst = max(worst, abs(expected - score))
    return worst


def timed(compute: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def time_part(engine: Engine, model: Any, part: list[Pair], batch: int, kept: bool, full: int) -> list[float]:
    """Seconds for some pairs: of headrace, of transformers, and of transformers with the logits of all rows."""
    few = part[:TRIALS]
    return [
        timed(lambda: headrace_scores(engine, part)),
        timed(lambda: transformers_scores(model, part, batch, kept=kept)),
        timed(lambda: transformers_scores(model, few, full, kept=False)) * len(part) / len(few),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--continuation", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(random_model("124M", Path(folder)), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Print seconds, ratios and errors."""
    import torch
    from transformers import GPT2LMHeadModel

    from headrace.config import Settings
    from headrace.worker.engine.build import load_engine

    pairs = make_pairs(arguments.pairs, arguments.prompt, arguments.continuation)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    with load_engine(Settings(model=str(folder), device="cpu", dtype="float32")) as engine:
        few = pairs[:TRIALS]
        headrace_scores(engine, few[:4])
        tried = {
            (kept, batch): timed(functools.partial(transformers_scores, model, few, batch, kept=kept))
            for kept in (False, True)
            for batch in BATCHES
        }
        print("transformers, seconds for", TRIALS, "pairs:", {key: round(value, 2) for key, value in tried.items()})
        kept, batch = min(tried, key=lambda key: tried[key])
        full = min(BATCHES, key=lambda size: tried[False, size])
        size = max(1, len(pairs) // arguments.rounds)
        parts = [pairs[start : start + size] for start in range(0, size * arguments.rounds, size)]
        seconds = [time_part(engine, model, part, batch, kept, full) for part in parts]
        ours, theirs, whole = (sum(column) for column in zip(*seconds, strict=True))
        print(
            f"{size * len(parts)} pairs: headrace {ours:.1f} s, transformers {theirs:.1f} s (batch {batch}, {kept=}),"
        )
        print(f"  with all logits {whole:.1f} s (extrapolated); ratios {theirs / ours:.2f} and {whole / ours:.2f}")
        compared = pairs[:COMPARED]
        errors = [
            largest_error(folder, compared, scores)
            for scores in (headrace_scores(engine, compared), transformers_scores(model, compared, batch, kept=kept))
        ]
        print(f"largest error: headrace {errors[0]:.2e}, transformers {errors[1]:.2e}")


if __name__ == "__main__":
    main()

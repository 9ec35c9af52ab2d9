"""Measures scoring of continuations: headrace's engine beside transformers' best padded batch, and both beside float64.

    OMP_NUM_THREADS=1 python -m benchmarks.scoring --pairs 1000 --dtype int8 --dtype bfloat16 --peer-dtype bfloat16
    OMP_NUM_THREADS=1 python -m benchmarks.scoring --pairs 1000 --dtype float32 --peer-dtype float32
    OMP_NUM_THREADS=1 python -m benchmarks.scoring --pairs 1000 --continuations 4

The model has the shape of GPT-2 124M and random weights. All take turns, some pairs each time, so that other load on
the machine meets all of them. Times are seconds of the process on its cores, which say little if threads wait for each
other: on a busy machine use one thread.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.models import VOCABULARY, random_model

if TYPE_CHECKING:
    from headrace.worker.engine.engine import Engine

Pair = tuple[list[int], list[int]]
#: Scores pairs; returns the log probabilities of each continuation.
Scorer = Callable[[list[Pair]], list[list[float]]]
#: Sizes of transformers' batches; the fastest counts.
BATCHES = (1, 4, 8, 16, 32)
#: Pairs that are compared with float64.
COMPARED = 4
#: Bytes of each engine's cache.
CACHE_BYTES = 10**9


def make_pairs(count: int, prompt: int, continuation: int, each: int = 1) -> list[Pair]:
    """Random pairs of token ids; `each` of them in a row have the same prompt, no others share a prefix."""
    draw = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(length)]

    prompts = [tokens(prompt) for _ in range(-(-count // each))]
    return [(prompts[index // each], tokens(continuation)) for index in range(count)]


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


def float64_scores(folder: Path, pairs: list[Pair]) -> list[list[float]]:
    """The same by the formula in float64."""
    from headrace.worker.fidelity.references.float64 import Float64

    found = []
    traces = Float64(folder).traces([[*prompt, *continuation] for prompt, continuation in pairs])
    for (prompt, continuation), trace in zip(pairs, traces, strict=True):
        rows = [trace["logits"][at] for at in range(len(prompt) - 1, len(prompt) + len(continuation) - 1)]
        tops = [float(row.max()) for row in rows]
        sums = [math.fsum(math.exp(float(x) - top) for x in row) for row, top in zip(rows, tops, strict=True)]
        found.append(
            [
                float(row[token]) - top - math.log(total)
                for row, token, top, total in zip(rows, continuation, tops, sums, strict=True)
            ]
        )
    return found


def largest_error(scores: list[list[float]], expected: list[list[float]]) -> float:
    """The largest difference of a log probability."""
    pairs = zip(itertools.chain(*scores), itertools.chain(*expected), strict=True)
    return max(abs(found - right) for found, right in pairs)


def timed(compute: Callable[[], Any]) -> float:
    """Seconds of the process that it takes, all threads together."""
    start = time.process_time()
    compute()
    return time.process_time() - start


def best_batch(model: Any, pairs: list[Pair]) -> int:
    """The size of transformers' batches that is fastest on these pairs."""
    tried = {
        size: timed(functools.partial(transformers_scores, model, pairs, size, kept=True))
        for size in BATCHES
        if size <= len(pairs)
    }
    print(f"transformers, seconds for {len(pairs)} pairs:", {size: round(value, 2) for size, value in tried.items()})
    return min(tried, key=lambda size: tried[size])


def take_turns(scorers: dict[str, Scorer], pairs: list[Pair], part: int) -> None:
    """Let all score all pairs, part by part; print the seconds so far after each part."""
    seconds = dict.fromkeys(scorers, 0.0)
    for start in range(0, len(pairs), part):
        done = pairs[start : start + part]
        for name, score in scorers.items():
            # With the logits of all rows, transformers takes long: it scores a fifth, which is counted fivefold.
            few = done[: -(-len(done) // 5)] if name.endswith("all logits") else done
            seconds[name] += timed(functools.partial(score, few)) * len(done) / len(few)
        found = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(f"{start + len(done)} pairs: {found}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--continuation", type=int, default=10)
    parser.add_argument("--continuations", type=int, default=1, help="pairs in a row with the same prompt")
    parser.add_argument("--dtype", action="append", help="of headrace, may be repeated  [default: bfloat16]")
    parser.add_argument("--peer-dtype", default="bfloat16", help="of transformers  [default: bfloat16]")
    parser.add_argument("--part", type=int, default=40, help="pairs that each scores in turn")
    parser.add_argument("--trials", type=int, default=32, help="pairs from which transformers' batch size is found")
    parser.add_argument("--batch", type=int, help="transformers' batch size  [default: the fastest of some]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(random_model("124M", Path(folder)), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Print seconds and errors."""
    import torch
    from transformers import GPT2LMHeadModel

    from headrace.config import Settings
    from headrace.worker.engine.build import load_engine

    pairs = make_pairs(arguments.pairs, arguments.prompt, arguments.continuation, arguments.continuations)
    warm_up = make_pairs(arguments.trials, arguments.prompt + 1, arguments.continuation - 1)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, arguments.peer_dtype)).eval()
    batch = arguments.batch or best_batch(model, warm_up)
    peer = f"transformers {arguments.peer_dtype}, batch {batch}"
    with ExitStack() as stack:
        scorers: dict[str, Scorer] = {
            f"{peer}, {logits}": functools.partial(transformers_scores, model, batch=batch, kept=logits == "few logits")
            for logits in ("few logits", "all logits")
        }
        for dtype in arguments.dtype or ["bfloat16"]:
            settings = Settings(model=str(folder), device="cpu", dtype=dtype, kv_cache_bytes=CACHE_BYTES)
            engine = stack.enter_context(load_engine(settings))
            headrace_scores(engine, warm_up)
            scorers[f"headrace {dtype}"] = functools.partial(headrace_scores, engine)
        compared = pairs[:COMPARED]
        expected = float64_scores(folder, compared)
        for name, score in scorers.items():
            print(f"{name}: largest error {largest_error(score(compared), expected):.2e}", flush=True)
        take_turns(scorers, pairs[COMPARED:], arguments.part)


if __name__ == "__main__":
    main()

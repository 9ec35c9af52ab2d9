"""How much a draft model saves, against n-gram proposals and none, for few texts at once.

python -m benchmarks.drafts TARGET DRAFT BOOKS [--dtype bfloat16] [--rows 1 2 4] [--sampling '{"temperature": 0.8}']

TARGET and DRAFT are models with the same vocabulary, BOOKS a folder of plain text, of which the prompts are pieces. The
three ways take turns with the same prompts and seeds, and must write the same tokens.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.worker.engine.engine import Engine

PROMPT_TOKENS, NEW_TOKENS = 64, 96
KINDS = ("none", "n-grams", "draft model")


@dataclass
class Turns:
    """What the turns of one way took."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    steps: int = 0
    proposed: int = 0
    accepted: int = 0


def prompts_of(books: Path, engine: Engine, count: int) -> list[list[int]]:
    """Pieces of the books, evenly spaced."""
    tokens = engine.tokenizer.encode("\n".join(path.read_text() for path in sorted(books.glob("*.txt"))))
    starts = [i * (len(tokens) - PROMPT_TOKENS) // count + PROMPT_TOKENS // 2 for i in range(count)]
    return [tokens[start : start + PROMPT_TOKENS] for start in starts]


def run(engine: Engine, prompts: list[list[int]], sampling: dict[str, Any], turns: Turns) -> list[list[int]]:
    """Compute the prompts together, and note what it took. Returns their new tokens."""
    from headrace.client.wire.requests import parse_request

    form = {"max_tokens": NEW_TOKENS, "ignore_eos": True, **sampling}
    requests = [parse_request({"prompt": prompt, "seed": seed, **form}) for seed, prompt in enumerate(prompts)]
    before = engine.stats()
    wall, cpu = time.perf_counter(), time.process_time()
    futures = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    turns.wall_s.append(time.perf_counter() - wall)
    turns.cpu_s.append(time.process_time() - cpu)
    after = engine.stats()
    turns.steps += after.steps - before.steps
    turns.proposed += after.proposed - before.proposed
    turns.accepted += after.accepted - before.accepted
    return [list(future.result().choices[0].token_ids) for future in futures]


def compare(engine: Engine, prompts: list[list[int]], rows: int, sampling: dict[str, Any]) -> dict[str, Turns]:
    """The three ways in turns, `rows` prompts at a time."""
    scheduler = engine.scheduler
    draft_tokens, drafts = scheduler.draft_tokens, scheduler.drafts

    def choose(kind: str) -> None:
        scheduler.draft_tokens = 0 if kind == "none" else draft_tokens
        scheduler.drafts = drafts if kind == "draft model" else None

    found = {kind: Turns() for kind in KINDS}
    for kind in KINDS[1:]:  # once before, to load kernels and to measure how often tokens are accepted
        choose(kind)
        run(engine, prompts[:rows], sampling, Turns())
    for start in range(0, len(prompts) - rows + 1, rows):
        texts = []
        for kind, turns in found.items():
            choose(kind)
            texts.append(run(engine, prompts[start : start + rows], sampling, turns))
        if not texts[0] == texts[1] == texts[2]:
            raise SystemExit("the three ways have written different tokens")
    choose("draft model")
    return found


def line(rows: int, kind: str, turns: Turns, found: dict[str, Turns]) -> str:
    """A line of the table: tokens per second, and how many times as fast as the two others by wall and CPU time."""
    rate = rows * NEW_TOKENS * len(turns.wall_s) / sum(turns.wall_s)
    speedups = []
    for other in KINDS[:2]:
        wall = statistics.median(b / a for a, b in zip(turns.wall_s, found[other].wall_s, strict=True))
        speedups.append(f"{wall:.2f}, {sum(found[other].cpu_s) / sum(turns.cpu_s):.2f}")
    proposed, accepted = turns.proposed / turns.steps, turns.accepted / turns.steps
    return f"| {rows} | {kind} | {rate:.1f} | {' | '.join(speedups)} | {proposed:.2f} | {accepted:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("books", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--sampling", type=json.loads, action="append", help="parameters of the requests, as JSON")
    arguments = parser.parse_args()

    import structlog

    from headrace.config import Settings
    from headrace.worker.engine.build import load_engine

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    names = {"model": arguments.target, "draft_model": arguments.draft}
    options = {"dtype": arguments.dtype, "device": "cpu", "threads": arguments.threads, "prefix_cache": False}
    engine = load_engine(Settings.model_validate({**names, **options}))
    prompts = prompts_of(arguments.books, engine, arguments.prompts)
    for sampling in arguments.sampling or [{"temperature": 0.8}]:
        print(f"\n{arguments.dtype}, {sampling}; times as fast by wall time and by CPU time; tokens by step\n")
        print("| texts | proposals | tokens/s | than none | than n-grams | proposed | accepted |")
        print("|---|---|---|---|---|---|---|")
        for rows in arguments.rows:
            found = compare(engine, prompts, rows, sampling)
            for kind, turns in found.items():
                print(line(rows, kind, turns, found), flush=True)


if __name__ == "__main__":
    main()

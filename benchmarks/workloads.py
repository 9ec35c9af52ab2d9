"""The prompts of all benchmarks: random token ids, because speed does not depend on their values."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One prompt and the number of new tokens."""

    prompt: list[int]
    new_tokens: int


def w64(*, uniform: bool) -> list[Item]:
    """64 prompts of 8 to 128 tokens with 16 to 96 new tokens each ("ragged"), or 64 each ("uniform")."""
    rng = random.Random(1)
    items = []
    for _ in range(64):
        prompt = [rng.randrange(50000) for _ in range(rng.randint(8, 128))]
        items.append(Item(prompt, 64 if uniform else rng.randint(16, 96)))
    return items


def long_prompts() -> list[Item]:
    """64 prompts of 512 to 900 tokens with 32 new tokens each."""
    rng = random.Random(2)
    return [Item([rng.randrange(50000) for _ in range(rng.randint(512, 900))], 32) for _ in range(64)]


def short_jobs() -> list[Item]:
    """256 prompts of 8 to 32 tokens with 4 new tokens each."""
    rng = random.Random(3)
    return [Item([rng.randrange(50000) for _ in range(rng.randint(8, 32))], 4) for _ in range(256)]


def one_row() -> list[Item]:
    """One prompt of 32 tokens with 64 new tokens."""
    rng = random.Random(4)
    return [Item([rng.randrange(50000) for _ in range(32)], 64)]


def echo(prompt: list[int], index: int) -> int:
    """The new token with this index on a simulated device, which repeats the prompt."""
    return prompt[index % len(prompt)]


WORKLOADS = {
    "ragged": lambda: w64(uniform=False),
    "uniform": lambda: w64(uniform=True),
    "long": long_prompts,
    "short": short_jobs,
    "one row": one_row,
}

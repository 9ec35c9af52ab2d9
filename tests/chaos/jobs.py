"""What is asked for, and when: pure functions of the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: The prompt at which the worker of this suite kills itself (tests/chaos/startup.py); to the product it is a prompt.
POISON_PROMPT = "This prompt ends the process that computes it."

PRIORITIES = ("interactive", "normal", "bulk")

_TEXT = "the river mill turns a wheel of stone and water runs on under grey morning sky while people wait"
_STOPS = (["."], ["\n"], [" the", ","], ["a"])


@dataclass(frozen=True)
class Draft:
    """A job to submit. `request` is an index into the catalogue; None is the poison."""

    name: str
    request: int | None
    #: Submitted under an id of our own, so that it may be submitted again; else the client chooses one.
    own_id: bool
    priority: str = "normal"
    #: Nobody waits for longer than this; such a job may expire.
    timeout_s: float | None = None

    def fields(self, catalogue: list[dict[str, Any]]) -> dict[str, Any]:
        """What `Client.submit` takes."""
        request = {"prompt": POISON_PROMPT, "max_tokens": 4} if self.request is None else catalogue[self.request]
        fields = {**request, "priority": self.priority, "timeout_s": self.timeout_s}
        return {**fields, "id": self.name} if self.own_id else fields


@dataclass(frozen=True)
class Batch:
    """Jobs that are submitted by one call: one by `submit`, more by `submit_many`."""

    at: float
    drafts: tuple[Draft, ...]


def catalogue(seed: int, size: int) -> list[dict[str, Any]]:
    """Different requests, each with a seed of its own; about one in 25 is one that only the worker can refuse."""
    dice = random.Random(f"catalogue {seed}")
    return [_request(dice) for _ in range(size)]


def _request(dice: random.Random) -> dict[str, Any]:
    if dice.random() < 0.04:
        return dice.choice(
            [{"prompt": [60_000 + dice.randrange(99)]}, {"prompt": "Long.", "max_tokens": 9_000 + dice.randrange(99)}]
        )
    length = dice.choice((1, 4, 12, 12, 40, 150))
    request: dict[str, Any] = {
        "prompt": " ".join(dice.choices(_TEXT.split(), k=length)),
        "max_tokens": dice.choice((1, 8, 8, 20, 20, 40, 40, 80, 240)),
        "seed": dice.getrandbits(40),
        "temperature": dice.choice((0, 0.7, 1)),
        "ignore_eos": dice.random() < 0.7,
    }
    if request["max_tokens"] <= 60 and dice.random() < 0.2:
        request["n"] = dice.randint(2, 4)
    if dice.random() < 0.15:
        request["stop"] = dice.choice(_STOPS)
    if dice.random() < 0.1:
        request["logprobs"] = dice.randint(0, 3)
    if request["temperature"] and dice.random() < 0.3:
        request["top_p"] = 0.9
    return request


def plan(seed: int, count: int, span_s: float, requests: int) -> list[Batch]:
    """`count` jobs over `span_s` seconds, by time."""
    dice = random.Random(f"plan {seed}")
    sizes: list[int] = []
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(left, 1 if dice.random() < 0.85 else dice.choice((2, 5, 16, 17, 40))))
    times = sorted(dice.uniform(0, span_s) for _ in sizes)
    batches, number = [], 0
    for at, size in zip(times, sizes, strict=True):
        own_id = dice.random() < 0.7
        # Where the client chooses the ids, only the order says which of many were accepted, and that is by priority.
        priorities = PRIORITIES if own_id else (dice.choice(PRIORITIES),)
        batches.append(
            Batch(at, tuple(_draft(dice, f"s{seed}-{number + i}", requests, own_id, priorities) for i in range(size)))
        )
        number += size
    return batches


def _draft(
    dice: random.Random, name: str, requests: int, own_id: bool = True, priorities: Sequence[str] = PRIORITIES
) -> Draft:
    timeout_s = 3.0 if dice.random() < 0.03 else None
    return Draft(name, dice.randrange(requests), own_id, dice.choice(priorities), timeout_s)


def poison(salt: int, requests: int) -> Batch:
    """A poison alone, or one among innocents in one message."""
    dice = random.Random(f"poison {salt}")
    crowd = 5 if dice.random() < 0.5 else 0
    drafts = [_draft(dice, f"p{salt}-{i}", requests) for i in range(crowd)]
    drafts.insert(crowd // 2, Draft(f"poison-{salt}", None, True))
    return Batch(0, tuple(drafts))

"""The requests, and when they are submitted: pure functions of the seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.chaos.adapters import BROKEN, RANKS

#: The prompt at which the worker of this suite kills itself (tests/chaos/startup.py); headrace does not treat it
#: specially.
POISON_PROMPT = "This prompt ends the process that computes it."

PRIORITIES = ("interactive", "normal", "bulk")

_TEXT = "the river mill turns a wheel of stone and water runs on under grey morning sky while people wait"
_STOPS = (["."], ["\n"], [" the", ","], ["a"])


@dataclass(frozen=True)
class PlannedJob:
    """A job to submit. `request` is an index into the catalogue, or None for the poison."""

    name: str
    request: int | None
    #: Whether the caller chooses the id, so that the job can be submitted again; otherwise the client generates one.
    chosen_id: bool
    priority: str = "normal"
    #: A job with a time limit may expire.
    timeout_s: float | None = None

    def fields(self, catalogue: list[dict[str, Any]]) -> dict[str, Any]:
        """The arguments of `Client.submit`."""
        request = {"prompt": POISON_PROMPT, "max_tokens": 4} if self.request is None else catalogue[self.request]
        fields = {**request, "priority": self.priority, "timeout_s": self.timeout_s}
        return {**fields, "id": self.name} if self.chosen_id else fields


@dataclass(frozen=True)
class Batch:
    """Jobs that are submitted in one call: a single one with `submit`, several with `submit_many`."""

    at: float
    jobs: tuple[PlannedJob, ...]


def catalogue(seed: int, size: int) -> list[dict[str, Any]]:
    """Different requests, each with its seed; about one in 25 can only be refused by the worker."""
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
    if dice.random() < 0.4:
        request["adapter"] = BROKEN if dice.random() < 0.05 else dice.choice(tuple(RANKS))
    return request


def plan(seed: int, count: int, span_s: float, requests: int) -> list[Batch]:
    """`count` jobs spread over `span_s` seconds, ordered by time."""
    dice = random.Random(f"plan {seed}")
    sizes: list[int] = []
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(left, 1 if dice.random() < 0.85 else dice.choice((2, 5, 16, 17, 40))))
    times = sorted(dice.uniform(0, span_s) for _ in sizes)
    batches, number = [], 0
    for at, size in zip(times, sizes, strict=True):
        chosen_id = dice.random() < 0.7
        # Without chosen ids the accepted jobs are identified by their order, which depends on the priority.
        priorities = PRIORITIES if chosen_id else (dice.choice(PRIORITIES),)
        batches.append(
            Batch(
                at,
                tuple(
                    _planned_job(dice, f"s{seed}-{number + i}", requests, chosen_id, priorities) for i in range(size)
                ),
            )
        )
        number += size
    return batches


def _planned_job(
    dice: random.Random, name: str, requests: int, chosen_id: bool = True, priorities: Sequence[str] = PRIORITIES
) -> PlannedJob:
    timeout_s = 3.0 if dice.random() < 0.03 else None
    return PlannedJob(name, dice.randrange(requests), chosen_id, dice.choice(priorities), timeout_s)


def poison(salt: int, requests: int) -> Batch:
    """A poison in a separate message, or in one message with harmless jobs."""
    dice = random.Random(f"poison {salt}")
    neighbours = 5 if dice.random() < 0.5 else 0
    jobs = [_planned_job(dice, f"p{salt}-{i}", requests) for i in range(neighbours)]
    jobs.insert(neighbours // 2, PlannedJob(f"poison-{salt}", None, True))
    return Batch(0, tuple(jobs))

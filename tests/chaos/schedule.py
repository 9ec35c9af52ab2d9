"""The schedule of faults: a pure function of the seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "kill_worker",  # kill -9, restarted after `seconds`
    "end_worker",  # SIGTERM; it finishes its running jobs in about `seconds`, and is restarted
    "stop_worker",  # SIGSTOP for `seconds`: its leases run out without its notice
    "kill_redis",  # kill -9, restarted after `seconds`
    "stop_redis",  # SIGSTOP for `seconds`: connections stay open, but Redis does not answer
    "fill_redis",  # at its memory limit for `seconds`
    "lose_redis",  # all data is gone and all connections end, as when an empty replica becomes the primary
    "lose_writes",  # the writes of `seconds` are gone, as when a replica becomes the primary that did not get them
    "replace_weights",  # the file of a worker's weights has other bytes, or half of them, for `seconds`
    "skew_clock",  # the clock of a worker or of the client jumps by an hour or two, or back to the right time
    "cut",  # CLIENT KILL of connections
    "cancel",  # cancel jobs that have not ended
    "poison",  # a job that kills the worker which computes it
]

KINDS: tuple[Kind, ...] = (
    "kill_worker",
    "end_worker",
    "stop_worker",
    "kill_redis",
    "stop_redis",
    "fill_redis",
    "lose_redis",
    "lose_writes",
    "replace_weights",
    "skew_clock",
    "cut",
    "cancel",
    "poison",
)

#: Seconds that a worker needs to start; its next fault begins later than that.
WORKER_START_S = 9.0
#: Seconds between two faults of the same process.
GAP_S = 1.0
SHORT_OUTAGE_S, LONG_OUTAGE_S = 1.0, 40.0
#: In a shorter storm the long outage would leave too little time for other faults.
SHORTEST_FOR_LONG_OUTAGE_S = 75.0
#: The kinds of which a process of Redis has one at a time.
OF_REDIS: tuple[Kind, ...] = ("kill_redis", "stop_redis", "fill_redis", "lose_writes")
#: A storm of this length has each kind of fault at least once.
WAVE_S = 180.0


@dataclass(frozen=True, order=True)
class Action:
    """One fault, undone after `seconds`. `salt` seeds the remaining choices: which connections, which jobs."""

    at: float
    kind: Kind
    worker: int = -1
    seconds: float = 0.0
    salt: int = 0

    @property
    def length(self) -> float:
        """Seconds until the next fault of the same process may begin."""
        return self.seconds + (WORKER_START_S if self.kind in ("kill_worker", "end_worker") else 0.0)

    @property
    def until(self) -> float:
        return self.at + self.length


def storm(
    seed: int, span_s: float, *, workers: int = 2, lease_s: float = 4.0, without: Sequence[Kind] = ()
) -> list[Action]:
    """The faults within `span_s` seconds, ordered by time. All are undone by the end.

    Faults of one process do not overlap. Those of different processes may: a worker may die during an outage of Redis.
    """
    dice = random.Random(f"storm {seed}")
    waves = max(1.0, span_s / WAVE_S)
    lanes = [_redis_lane(dice, span_s, waves, lease_s)]
    lanes += [_worker_lane(dice, waves, lease_s, worker) for worker in range(workers)]
    actions = [action for lane in lanes for action in _place(dice, [a for a in lane if a.kind not in without], span_s)]
    at_once: dict[Kind, int] = {"cut": 5, "cancel": 8, "poison": 2, "skew_clock": 6}
    for kind, times in at_once.items():
        for _ in range(0 if kind in without else round(times * waves)):
            actions.append(Action(dice.uniform(0.03, 0.97) * span_s, kind, salt=dice.getrandbits(32)))
    for _ in range(0 if "lose_redis" in without else round(waves)):
        actions.append(Action(dice.uniform(0.2, 0.8) * span_s, "lose_redis"))
    return sorted(actions)


def _redis_lane(dice: random.Random, span_s: float, waves: float, lease_s: float) -> list[Action]:
    lane = [Action(0, "kill_redis", seconds=SHORT_OUTAGE_S) for _ in range(round(2 * waves))]
    lane += [Action(0, "stop_redis", seconds=lease_s + dice.uniform(0.5, 2)) for _ in range(round(waves))]
    lane += [Action(0, "fill_redis", seconds=dice.uniform(2, lease_s + 2)) for _ in range(round(2 * waves))]
    lane += [Action(0, "lose_writes", seconds=dice.uniform(1, lease_s + 2)) for _ in range(round(waves))]
    if span_s >= SHORTEST_FOR_LONG_OUTAGE_S:
        lane += [Action(0, "kill_redis", seconds=LONG_OUTAGE_S) for _ in range(round(waves))]
    return lane


def _worker_lane(dice: random.Random, waves: float, lease_s: float, worker: int) -> list[Action]:
    lane = [Action(0, "kill_worker", worker, seconds=dice.uniform(0.2, lease_s + 1)) for _ in range(round(3 * waves))]
    lane += [
        Action(0, "stop_worker", worker, seconds=lease_s + dice.uniform(1, lease_s)) for _ in range(round(2 * waves))
    ]
    lane += [Action(0, "end_worker", worker, seconds=4)] * round(waves)
    lane += [Action(0, "replace_weights", worker, seconds=dice.uniform(3, 8)) for _ in range(round(waves))]
    return lane


def _place(dice: random.Random, lane: list[Action], span_s: float) -> Iterator[Action]:
    """Place faults one after another in random order, with random pauses. Faults that do not fit are dropped."""
    dice.shuffle(lane)
    lane.sort(key=lambda action: action.seconds != LONG_OUTAGE_S)  # it is dropped last
    while lane and sum(action.length + GAP_S for action in lane) > 0.9 * span_s:
        lane.pop()
    dice.shuffle(lane)
    spare = span_s - sum(action.length + GAP_S for action in lane)
    cuts = sorted(dice.uniform(0, spare) for _ in lane)
    taken = 0.0
    for cut, action in zip(cuts, lane, strict=True):
        yield Action(cut + taken, action.kind, action.worker, action.seconds, dice.getrandbits(32))
        taken += action.length + GAP_S

"""Faults and jobs are functions of the seed, and every fault is undone at the end."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from tests.chaos.adapters import BROKEN, RANKS
from tests.chaos.jobs import catalogue, plan, poison
from tests.chaos.schedule import KINDS, LONG_OUTAGE_S, OF_REDIS, storm


def test_a_seed_gives_one_storm() -> None:
    assert storm(1, 180) == storm(1, 180)
    assert storm(1, 180) != storm(2, 180)
    assert storm(1, 180) == sorted(storm(1, 180))


@pytest.mark.parametrize("seed", range(20))
def test_a_storm_of_three_minutes_has_everything(seed: int) -> None:
    actions = storm(seed, 180)
    assert {action.kind for action in actions} == set(KINDS)
    assert sum(action.seconds == LONG_OUTAGE_S for action in actions) == 1
    assert {action.worker for action in actions if action.kind == "kill_worker"} == {0, 1}


@pytest.mark.parametrize("span_s", [20, 90, 180, 1800])
@pytest.mark.parametrize("seed", range(5))
def test_all_is_undone_at_the_end_and_faults_of_one_process_do_not_overlap(seed: int, span_s: float) -> None:
    actions = storm(seed, span_s)
    assert all(action.at >= 0 and action.until <= span_s for action in actions)
    redis = [action for action in actions if action.kind in OF_REDIS]
    workers = [[action for action in actions if action.worker == worker] for worker in (0, 1)]
    for lane in (redis, *workers):
        assert all(one.until < two.at for one, two in itertools.pairwise(lane))


def test_a_worker_is_stopped_for_longer_than_its_lease() -> None:
    stops = [action for action in storm(3, 1800, lease_s=5) if action.kind == "stop_worker"]
    assert len(stops) == 40
    assert all(action.seconds > 5 for action in stops)


def test_what_is_left_out_is_left_out() -> None:
    kinds = {action.kind for action in storm(1, 180, without=["poison", "fill_redis"])}
    assert kinds == set(KINDS) - {"poison", "fill_redis"}


def test_the_jobs_are_mixed_and_as_many_as_asked_for() -> None:
    batches = plan(7, 2000, 150, 400)
    assert batches == plan(7, 2000, 150, 400)
    jobs = [planned for batch in batches for planned in batch.jobs]
    assert len(jobs) == len({planned.name for planned in jobs}) == 2000
    assert [batch.at for batch in batches] == sorted(batch.at for batch in batches)
    assert {len(batch.jobs) for batch in batches} >= {1, 2, 5, 16, 17, 40}
    assert {planned.priority for planned in jobs} == {"interactive", "normal", "bulk"}
    assert {planned.chosen_id for planned in jobs} == {True, False}
    assert len({planned.request for planned in jobs}) > 350


def test_the_catalogue_holds_requests_of_every_kind() -> None:
    requests = catalogue(7, 400)
    assert requests == catalogue(7, 400)
    invalid = [r for r in requests if isinstance(r["prompt"], list) or r["max_tokens"] >= 9000]
    assert 4 < len(invalid) < 40
    fields = Counter(name for request in requests for name in request)
    assert all(fields[name] > 10 for name in ("n", "stop", "logprobs", "top_p"))
    adapters = Counter(request["adapter"] for request in requests if "adapter" in request)
    assert set(adapters) == {*RANKS, BROKEN}
    assert 0 < adapters[BROKEN] < min(adapters[name] for name in RANKS)
    assert {request.get("temperature") for request in requests} >= {0, 0.7, 1}


def test_the_poison_comes_alone_and_among_innocents() -> None:
    batches = [poison(salt, 400) for salt in range(20)]
    assert {len(batch.jobs) for batch in batches} == {1, 6}
    assert all(sum(planned.request is None for planned in batch.jobs) == 1 for batch in batches)

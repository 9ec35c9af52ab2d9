"""Which jobs run at the same time: a neighbour of a poison message loses only the attempts that they shared."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.jobs.quarantine import Candidate, Quarantine


def put_all(quarantine: Quarantine, attempts: dict[str, int]) -> None:
    for job_id, count in attempts.items():
        quarantine.put(Candidate(job_id, None, count, "demo"))


def admitted(quarantine: Quarantine) -> list[str]:
    return [candidate.job_id for candidate in quarantine.admit({"demo"})]


def test_new_jobs_are_admitted_together_and_later_ones_join_them() -> None:
    quarantine = Quarantine(64, 3)
    put_all(quarantine, {"a": 0, "b": 0})
    assert admitted(quarantine) == ["a", "b"]
    put_all(quarantine, {"c": 0})
    assert admitted(quarantine) == ["c"]
    assert quarantine.inside() == {"a", "b", "c"}


def test_quarantined_jobs_wait_for_an_empty_engine_and_new_jobs_for_the_quarantined() -> None:
    quarantine = Quarantine(8, 3)
    put_all(quarantine, {"a": 0})
    assert admitted(quarantine) == ["a"]
    put_all(quarantine, {"s": 1, "t": 1, "b": 0})
    assert admitted(quarantine) == []
    assert quarantine.leave("a")
    for quarantined in ("s", "t"):  # an eighth of 8 slots is one
        assert admitted(quarantine) == [quarantined]
        assert admitted(quarantine) == []
        assert quarantine.leave(quarantined)
    assert admitted(quarantine) == ["b"]
    assert not quarantine.leave("b"), "no job waits"


@pytest.mark.parametrize(
    ("slots", "limit", "attempts", "groups"),
    [
        (16, 3, [1, 1, 1], [2, 1]),
        (64, 3, [1] * 9, [8, 1]),
        (64, 3, [2, 2], [1, 1]),
        (64, 2, [1, 1], [1, 1]),
        (64, 4, [2, 1, 2], [1, 2]),
        (4, 3, [1, 1], [1, 1]),
    ],
)
def test_groups_shrink_to_one_before_the_last_attempt(
    slots: int, limit: int, attempts: list[int], groups: list[int]
) -> None:
    quarantine = Quarantine(slots, limit)
    put_all(quarantine, {str(number): count for number, count in enumerate(attempts)})
    sizes = []
    while group := admitted(quarantine):
        sizes.append(len(group))
        for job_id in group:
            quarantine.leave(job_id)
    assert sizes == groups


def test_jobs_whose_model_is_not_loaded_wait_without_blocking_others() -> None:
    quarantine = Quarantine(8, 3)
    quarantine.put(Candidate("new", None, 0, "large"))
    quarantine.put(Candidate("quarantined", None, 1, "large"))
    put_all(quarantine, {"a": 0})
    assert admitted(quarantine) == ["a"]
    assert quarantine.models() == {"large"}
    assert quarantine.admit({"demo", "large"}) == [], "the quarantined job waits for an empty engine"
    assert quarantine.leave("a")
    for expected in ("quarantined", "new"):
        assert [candidate.job_id for candidate in quarantine.admit({"demo", "large"})] == [expected]
        quarantine.leave(expected)
    assert quarantine.models() == set()


def test_a_waiting_job_is_withdrawn_once() -> None:
    quarantine = Quarantine(8, 3)
    put_all(quarantine, {"a": 0, "s": 1})
    assert quarantine.withdraw("s")
    assert not quarantine.withdraw("s")
    assert admitted(quarantine) == ["a"]
    assert not quarantine.withdraw("a"), "it is inside"


@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=4))),
    st.integers(1, 64),
    st.integers(2, 5),
)
def test_whoever_kills_is_failed_and_nobody_else(queue: tuple[int, set[int]], slots: int, limit: int) -> None:
    """Simulates processes, each of which computes jobs until a poison message is in its engine and kills it."""
    count, poison = queue
    attempts = dict.fromkeys(range(count), 0)
    ended: set[int] = set()
    failed: set[int] = set()
    for _ in range(limit * (len(poison) + 1) + 1):
        quarantine = Quarantine(slots, limit)
        for number in set(attempts) - ended - failed:
            if attempts[number] >= limit:
                failed.add(number)
            else:
                put_all(quarantine, {str(number): attempts[number]})
        while group := {int(job_id) for job_id in admitted(quarantine)}:
            for number in group:
                attempts[number] += 1
            if group & poison:
                break  # the process is dead
            ended |= group
            for number in group:
                quarantine.leave(str(number))
    assert failed == poison
    assert ended == set(attempts) - poison

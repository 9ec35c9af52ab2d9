"""Who may be computed beside whom: nobody loses more attempts to a killer than those it had in company with it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.worker.jobs.quarantine import Candidate, Probation


def line_up(probation: Probation, attempts: dict[str, int]) -> None:
    for job_id, count in attempts.items():
        probation.put(Candidate(job_id, None, count, "demo"))


def admitted(probation: Probation) -> list[str]:
    return [candidate.job_id for candidate in probation.admit({"demo"})]


def test_new_jobs_go_in_together_and_later_ones_beside_them() -> None:
    probation = Probation(64, 3)
    line_up(probation, {"a": 0, "b": 0})
    assert admitted(probation) == ["a", "b"]
    line_up(probation, {"c": 0})
    assert admitted(probation) == ["c"]
    assert probation.inside() == {"a", "b", "c"}


def test_suspects_wait_for_the_engine_to_be_empty_and_new_ones_for_the_suspects() -> None:
    probation = Probation(8, 3)
    line_up(probation, {"a": 0})
    assert admitted(probation) == ["a"]
    line_up(probation, {"s": 1, "t": 1, "b": 0})
    assert admitted(probation) == []
    assert probation.leave("a")
    for suspect in ("s", "t"):  # an eighth of 8 slots is one
        assert admitted(probation) == [suspect]
        assert admitted(probation) == []
        assert probation.leave(suspect)
    assert admitted(probation) == ["b"]
    assert not probation.leave("b"), "nobody waits"


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
    probation = Probation(slots, limit)
    line_up(probation, {str(number): count for number, count in enumerate(attempts)})
    sizes = []
    while group := admitted(probation):
        sizes.append(len(group))
        for job_id in group:
            probation.leave(job_id)
    assert sizes == groups


def test_those_whose_model_is_not_loaded_wait_and_hold_up_nobody() -> None:
    probation = Probation(8, 3)
    probation.put(Candidate("new", None, 0, "large"))
    probation.put(Candidate("suspect", None, 1, "large"))
    line_up(probation, {"a": 0})
    assert admitted(probation) == ["a"]
    assert probation.models() == {"large"}
    assert probation.admit({"demo", "large"}) == [], "the suspect waits for an empty engine"
    assert probation.leave("a")
    for expected in ("suspect", "new"):
        assert [candidate.job_id for candidate in probation.admit({"demo", "large"})] == [expected]
        probation.leave(expected)
    assert probation.models() == set()


def test_a_job_is_taken_out_of_the_line_once() -> None:
    probation = Probation(8, 3)
    line_up(probation, {"a": 0, "s": 1})
    assert probation.withdraw("s")
    assert not probation.withdraw("s")
    assert admitted(probation) == ["a"]
    assert not probation.withdraw("a"), "it is inside"


@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=4))),
    st.integers(1, 64),
    st.integers(2, 5),
)
def test_whoever_kills_is_failed_and_nobody_else(crowd: tuple[int, set[int]], slots: int, limit: int) -> None:
    """The whole life of a queue, by hand: each process computes until a killer is in its engine, and dies with it."""
    count, killers = crowd
    attempts = dict.fromkeys(range(count), 0)
    ended: set[int] = set()
    failed: set[int] = set()
    for _ in range(limit * (len(killers) + 1) + 1):
        probation = Probation(slots, limit)
        for number in set(attempts) - ended - failed:
            if attempts[number] >= limit:
                failed.add(number)
            else:
                line_up(probation, {str(number): attempts[number]})
        while group := {int(job_id) for job_id in admitted(probation)}:
            for number in group:
                attempts[number] += 1
            if group & killers:
                break  # the process is dead
            ended |= group
            for number in group:
                probation.leave(str(number))
    assert failed == killers
    assert ended == set(attempts) - killers

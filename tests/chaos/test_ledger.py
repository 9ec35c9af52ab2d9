"""The ledger reports errors: each test passes it the facts of a run with one error, made by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.chaos.ledger import (
    Computation,
    Death,
    Delivery,
    End,
    Facts,
    Fault,
    JobFact,
    Remains,
    balance,
    table,
)

GOOD = End("succeeded", digest="abc")
ONE, TWO = 101, 102


def seconds(*reads: float) -> list[tuple[float, float]]:
    """Renewals that took no time."""
    return [(at, at) for at in reads]


@pytest.fixture
def facts() -> Facts:
    """Job `a` was delivered to worker ONE at 1 and ended at 3, without errors. The lease is 4 seconds."""
    return Facts(
        lease_s=4,
        jobs={"a": JobFact(GOOD, [(0.0, 0.1)])},
        seen={"a": End("succeeded", digest="abc", at=3.2)},
        final={"a": End("succeeded", digest="abc")},
        deliveries=[Delivery(1.0, ONE, ("a",))],
        computations=[Computation("a", ONE, 1.0, 3.0, "succeeded")],
        renewals={ONE: seconds(1.5, 2.5, 3.5)},
        max_attempts=3,
    )


def computed_again(facts: Facts, started: float = 5.0) -> Facts:
    """Add a second computation of the job, by worker TWO."""
    facts.deliveries.append(Delivery(started, TWO, ("a",)))
    facts.computations.append(Computation("a", TWO, started, started + 1, "succeeded"))
    facts.seen["a"] = End("succeeded", digest="abc", at=started + 1.2)
    facts.renewals[ONE] = seconds(1.5, 2.5, 3.5, 4.5, 5.5)
    return facts


def wrong(facts: Facts) -> str:
    """The only error of the ledger."""
    (complaint,) = balance(facts).wrong
    return complaint


def test_a_job_may_be_lost_only_with_redis_data_and_only_if_the_caller_is_told(facts: Facts) -> None:
    facts.final, facts.seen, facts.computations = {}, {}, []
    assert "never ended" in wrong(facts)
    facts.lost = {"a": 3.0}
    assert "was told lost, and Redis had lost nothing" in wrong(facts)
    facts.faults = [Fault("lose_redis", 2.0, 2.1)]
    ledger = balance(facts)
    assert (ledger.wrong, ledger.lost) == ([], 1)


def test_a_run_in_which_all_is_well_balances(facts: Facts) -> None:
    ledger = balance(facts)
    assert ledger.wrong == []
    assert (ledger.submitted, ledger.ends, ledger.computed, ledger.redelivered) == (1, {"succeeded": 1}, 1, 0)
    assert table(ledger).endswith("\nbalanced")
    assert asdict(ledger)["ends"] == {"succeeded": 1}


def test_a_job_that_never_ended(facts: Facts) -> None:
    facts.seen.clear()
    facts.final.clear()
    assert wrong(facts).startswith(
        "a never ended: +1.00 delivered to 101; +1.00 started by 101; +3.00 succeeded in 101"
    )
    facts.deliveries.clear()
    facts.computations.clear()
    facts.faults = [Fault("cut", 0.5, 0.5)]
    assert wrong(facts) == "a never ended: never delivered; +0.50 (cut for 0.0)"


def test_a_job_that_ended_in_two_ways(facts: Facts) -> None:
    facts.seen["a"] = End("cancelled", "cancelled", at=2)
    assert wrong(facts) == "a ended first as cancelled cancelled and then as succeeded abc"


def test_another_text_than_the_reference(facts: Facts) -> None:
    facts.seen["a"] = facts.final["a"] = End("succeeded", digest="xyz")
    assert wrong(facts) == "a ended as succeeded xyz instead of succeeded abc"


def test_the_first_place_where_a_success_is_another_is_named(facts: Facts) -> None:
    expected: dict[str, Any] = {"seed": 1, "choices": [{"text": "so", "logprobs": [-1.0, -2.0]}]}
    other = {"seed": 1, "choices": [{"text": "so", "logprobs": [-1.0, -2.5]}]}
    facts.jobs["a"] = JobFact(replace(GOOD, content=expected), [(0.0, 0.1)])
    facts.final["a"] = facts.seen["a"] = End("succeeded", digest="xyz", content=other)
    assert wrong(facts).endswith("instead of succeeded abc choices 0 logprobs 1: -2.5 instead of -2.0")


@pytest.mark.parametrize(
    ("end", "excuse", "complaint"),
    [
        (End("cancelled", "cancelled"), {"cancel_asked": True}, "a was cancelled without a request"),
        (End("expired", "expired"), {"may_expire": True}, "a expired without a time limit"),
        (
            End("failed", "invalid_token_id"),
            {"expected": End("failed", "invalid_token_id")},
            "a ended as failed invalid_token_id instead of succeeded abc",
        ),
    ],
    ids=["cancelled", "expired", "failed"],
)
def test_an_end_that_needs_a_reason(facts: Facts, end: End, excuse: dict[str, object], complaint: str) -> None:
    facts.seen["a"] = facts.final["a"] = end
    assert wrong(facts) == complaint
    for name, value in excuse.items():
        setattr(facts.jobs["a"], name, value)
    assert balance(facts).wrong == []


def test_a_poison_must_fail_by_its_attempts(facts: Facts) -> None:
    facts.jobs["a"].expected = None
    assert wrong(facts) == "a ended as succeeded abc instead of failed max_attempts"
    facts.seen["a"] = facts.final["a"] = End("failed", "max_attempts")
    assert balance(facts).wrong == []
    assert balance(facts).given_up == 0


def test_an_innocent_may_be_given_up_only_beside_that_many_workers_that_died(facts: Facts) -> None:
    facts.seen["a"] = facts.final["a"] = End("failed", "max_attempts")
    facts.computations = [Computation("a", pid, float(pid)) for pid in (1, 2, 3)]
    facts.deaths = [Death(pid + 0.5, pid, "kill") for pid in (1, 2)]
    assert wrong(facts) == "a ended as failed max_attempts instead of succeeded abc"
    facts.deaths.append(Death(3.5, 3, "poison"))
    ledger = balance(facts)
    assert (ledger.wrong, ledger.given_up) == ([], 1)


def test_a_job_computed_twice_for_no_reason(facts: Facts) -> None:
    complaint = wrong(computed_again(facts))
    assert complaint.startswith("a was completed twice for no known reason: +1.00 delivered to 101;")
    assert balance(facts).duplicates == {"unexplained": 1}
    assert balance(facts).redelivered == 1


def test_a_lease_that_ran_out_is_a_reason(facts: Facts) -> None:
    computed_again(facts, started=9)
    facts.renewals[ONE] = seconds(1.5, 2.5, 7.5, 8.5)
    ledger = balance(facts)
    assert (ledger.wrong, ledger.duplicates) == ([], {"lease ran out": 1})


def test_a_renewal_counts_from_when_the_clock_was_read_until_the_next_one_was_written(facts: Facts) -> None:
    computed_again(facts, started=9)
    facts.renewals[ONE] = [(1.5, 1.5), (2.5, 5.0), (5.5, 6.6), (6.6, 6.7), (8.0, 8.0)]
    assert balance(facts).duplicates == {"lease ran out": 1}
    facts.renewals[ONE] = [(1.5, 1.5), (2.5, 4.0), (5.5, 5.6), (6.6, 6.7), (8.0, 8.0)]
    assert balance(facts).duplicates == {"unexplained": 1}


def test_a_worker_that_woke_up_with_a_lease_that_had_run_out_is_a_reason(facts: Facts) -> None:
    """TWO received the job first, was stopped, and computed it after ONE had."""
    computed_again(facts, started=8)
    facts.deliveries[1] = Delivery(0.5, TWO, ("a",))
    facts.renewals = {ONE: seconds(1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5), TWO: seconds(0.7)}
    facts.seen["a"] = End("succeeded", digest="abc", at=3.2)
    assert balance(facts).duplicates == {"lease ran out": 1}


def test_a_worker_that_died_before_the_result_was_stored_is_a_reason(facts: Facts) -> None:
    computed_again(facts)
    facts.deaths = [Death(3.1, ONE, "kill")]
    assert balance(facts).duplicates == {"worker died before the result was stored": 1}
    facts.seen["a"] = End(
        "succeeded", digest="abc", at=3.2
    )  # the result was stored, so the second worker must not compute
    assert balance(facts).duplicates == {"unexplained": 1}
    facts.seen["a"] = End("succeeded", digest="abc", at=6.2)
    facts.deaths = [Death(8.0, ONE, "kill")]  # long after
    assert balance(facts).duplicates == {"unexplained": 1}


def test_a_message_that_was_sent_twice_is_a_reason(facts: Facts) -> None:
    computed_again(facts)
    facts.jobs["a"].calls = [(0.0, 0.1), (0.6, 0.7)]
    assert balance(facts).duplicates == {"message sent twice": 1}
    facts.jobs["a"].calls = [(0.0, 0.1)]
    facts.faults = [Fault("cut", 0.05, 0.06)]
    assert balance(facts).duplicates == {"message sent twice": 1}
    facts.faults = [Fault("cut", 2.0, 2.0), Fault("cancel", 0.05, 0.05)]
    assert balance(facts).duplicates == {"unexplained": 1}


def test_a_computation_that_was_not_finished_is_none(facts: Facts) -> None:
    computed_again(facts)
    facts.computations[0].ended, facts.computations[0].how = None, ""
    ledger = balance(facts)
    assert (ledger.wrong, ledger.computed, ledger.duplicates) == ([], 1, {})


def test_a_worker_that_ended_by_itself(facts: Facts) -> None:
    facts.deaths = [Death(9, ONE, "own", "code 1"), Death(9, TWO, "poison"), Death(9, 3, "kill"), Death(9, 4, "end")]
    assert wrong(facts) == "worker 101 ended by itself: code 1"


def test_what_is_left_in_redis(facts: Facts) -> None:
    facts.unacked = (1, 0)
    facts.without_lifetime = ["headrace:job:a"]
    facts.before = Remains({"bindings": 2, "old": 1}, 1_000_000)
    facts.after = Remains({"bindings": 3, "new": 1}, 3_000_000)
    assert balance(facts).wrong == [
        "left in unacked and unacked_index: (1, 0)",
        "headrace:job:a has no lifetime",
        "bindings had 2 elements and has 3",
        "new had 0 elements and has 1",
        "old had 1 elements and has 0",
        "Redis holds 2000000 bytes more than before",
    ]
    facts.after = Remains(dict(facts.before.keys), 1_900_000)
    assert balance(facts).wrong == ["left in unacked and unacked_index: (1, 0)", "headrace:job:a has no lifetime"]


def test_the_figures(facts: Facts) -> None:
    facts.refusals = Counter({"RedisRefused": 2})
    facts.deliveries.append(Delivery(2.0, TWO, ("ghost",)))
    facts.faults = [
        Fault("kill_redis", 2.0, 2.8, seconds=1.0),
        Fault("stop_worker", 2.0, 2.9, TWO),
        Fault("stop_worker", 2.0, 3.0, ONE),
        Fault("cut", 1.5, 1.5),
        Fault("cancel", 2.5, 3.1),
    ]
    ledger = balance(facts)
    assert ledger.refusals == {"RedisRefused": 2}
    assert ledger.unclaimed == 1
    assert ledger.actions == {"kill_redis 1 s": 1, "stop_worker": 2, "cut": 1, "cancel": 1}
    assert ledger.longest_recovery_s == {"stop_worker": 0.2}, "only the last fault that ended before the job counts"
    del facts.faults[1:3]
    assert balance(facts).longest_recovery_s == {"kill_redis": 0.4}


def test_after_lost_writes_only_jobs_that_were_accepted_later_may_be_lost(facts: Facts) -> None:
    facts.final, facts.seen, facts.computations, facts.lost = {}, {}, [], {"a": 3.0}
    facts.faults = [Fault("lose_writes", 2.0, 2.5)]
    assert "was told lost, and Redis had lost nothing" in wrong(facts)
    facts.faults = [Fault("lose_writes", 0.05, 2.5)]
    assert balance(facts).wrong == []


def test_a_job_is_computed_again_after_lost_writes(facts: Facts) -> None:
    computed_again(facts)
    assert "completed twice" in wrong(facts)
    facts.faults = [Fault("lose_writes", 2.0, 4.0)]
    ledger = balance(facts)
    assert (ledger.wrong, ledger.duplicates) == ([], {"Redis lost writes": 1})


def test_other_weights_must_be_told_by_the_fingerprint(facts: Facts) -> None:
    facts.jobs["a"].expected = replace(GOOD, content={"fingerprint": "one", "text": "x"})
    facts.seen["a"] = facts.final["a"] = End("succeeded", digest="other", content={"fingerprint": "one", "text": "y"})
    facts.faults = [Fault("replace_weights", 0.0, 2.0)]
    assert "instead of" in wrong(facts)
    facts.seen["a"] = facts.final["a"] = End("succeeded", digest="other", content={"fingerprint": "two", "text": "y"})
    ledger = balance(facts)
    assert (ledger.wrong, ledger.other_weights) == ([], 1)

"""The short form of `python -m tests.chaos`: one fault of each kind that is cheap to recover from."""

from __future__ import annotations

from tests.chaos.ledger import balance, table
from tests.chaos.run import Plan, run
from tests.chaos.schedule import Action

FAULTS = (
    Action(0.3, "stop_worker", worker=1, seconds=3.6),
    Action(0.8, "cut", salt=2),
    Action(1.5, "cancel", salt=1),
    Action(1.8, "fill_redis", seconds=1.5),
    Action(4.2, "kill_worker", worker=0, seconds=0.0),
    Action(5.0, "kill_redis", seconds=0.5),
)


def test_every_job_ends_once_and_rightly_whatever_happens_to_its_worker_and_to_redis() -> None:
    ledger = balance(run(Plan(seed=1, jobs=80, span_s=6, requests=40, slots=4, lease_s=3, actions=FAULTS)))
    assert not ledger.wrong, table(ledger)
    assert ledger.submitted == 80
    assert ledger.ends["succeeded"] > 40
    assert ledger.deaths == {"kill": 1}
    assert sum(ledger.actions.values()) == len(FAULTS)

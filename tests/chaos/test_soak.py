"""The ledger of a soak: a run that balances, and the same run with one thing that is not back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.soak_ledger import MiB, ProcessSample, Sample, SoakFacts, balance, table

PROCESSES = {name: ProcessSample(100 * MiB, 20, 5) for name in ("worker", "serve", "redis", "client")}
BASELINE = Sample(495, "baseline", PROCESSES, {"workers": 1}, MiB, 10, 0, 0, {"store": 2, "redis": 4}, 1000)
END = replace(BASELINE, at=3600, phase="end", data_files={"store": 4, "redis": 4})
FACTS = SoakFacts([BASELINE, END], {"single": 9}, {"single succeeded": 9}, [], {}, [], batches=3)


def test_a_run_after_which_everything_is_back_balances() -> None:
    ledger = balance(FACTS)
    assert ledger.wrong == []
    assert table(ledger).endswith("\nbalanced")
    assert balance(replace(FACTS, samples=[])).wrong == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"processes": {**PROCESSES, "worker": ProcessSample(130 * MiB, 20, 5)}}, "resident bytes of worker"),
        ({"processes": {**PROCESSES, "serve": ProcessSample(100 * MiB, 30, 5)}}, "descriptors of serve"),
        ({"processes": {**PROCESSES, "client": ProcessSample(100 * MiB, 20, 12)}}, "threads of client"),
        ({"keys": {"workers": 1, "job:": 1}}, "keys job:"),
        ({"redis_bytes": 3 * MiB}, "bytes in Redis"),
        ({"connections": 20}, "connections"),
        ({"temporary_files": 1}, "temporary files"),
        ({"client_files": 1}, "files of the client"),
        ({"data_files": {"store": 5, "redis": 4}}, "files in store"),
        ({"log_bytes": 10 * MiB}, "bytes of logs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_back_is_named(change: dict[str, Any], said: str) -> None:
    wrong = balance(replace(FACTS, samples=[BASELINE, replace(END, **change)])).wrong
    assert [line.startswith(said) for line in wrong] == [True], wrong


@pytest.mark.parametrize(
    "change",
    [
        {"open": ["single job"]},
        {"surprises": ["single: TypeError"]},
        {"logged": {"worker Traceback": 1}},
        {"exited": {"worker": -9}},
    ],
    ids=["open", "surprise", "traceback", "exited"],
)
def test_what_must_not_happen_is_named(change: dict[str, Any]) -> None:
    assert len(balance(replace(FACTS, **change)).wrong) == 1

"""The ledger of a soak: a run that balances, and the same run with one thing that is not back."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.soak import measure
from tests.chaos.soak_ledger import InUse, MiB, ProcessSample, Sample, SoakFacts, balance, table
from tests.chaos.soak_memory import ask, environment, in_use
from tests.integration.processes import wait_until
from tests.patience import PATIENCE_S

MB = 1_000_000
PROCESSES = {name: ProcessSample(100 * MiB, 20, 5) for name in ("worker", "serve", "redis", "client")}
USED = InUse(resident=400 * MiB, malloc=180 * MiB, blocks=1_000_000)
IN_USE = dict.fromkeys(("worker", "serve", "client"), USED)
BASELINE = Sample(
    495, "baseline", PROCESSES, {"workers": 1}, MiB, 10, 0, 0, {"store": 2, "redis": 4}, 1000, 90 * MiB, 30_000, IN_USE
)
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
        ({"processes": {**PROCESSES, "redis": ProcessSample(140 * MiB, 20, 5)}}, "resident bytes of redis"),
        ({"processes": {**PROCESSES, "serve": ProcessSample(100 * MiB, 30, 5)}}, "descriptors of serve"),
        ({"processes": {**PROCESSES, "client": ProcessSample(100 * MiB, 20, 12)}}, "threads of client"),
        ({"keys": {"workers": 1, "job:": 1}}, "keys job:"),
        ({"redis_bytes": 3 * MiB}, "bytes in Redis"),
        ({"redis_scripts": 3 * MiB}, "bytes of Redis' scripts"),
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


@pytest.mark.parametrize("name", ["worker", "serve", "client"])
@pytest.mark.parametrize(
    ("each", "said"),
    [
        ({"malloc": 3000, "resident": 3000}, "malloc"),
        ({"blocks": 3000 // 64, "resident": 3000}, "blocks"),
        ({"resident": 3000}, "resident"),
    ],
    ids=["malloc", "python", "mapped"],
)
def test_a_leak_of_3_kb_for_each_job_is_found(name: str, each: dict[str, int], said: str) -> None:
    jobs = 28_000
    leaked = replace(USED, **{what: getattr(USED, what) + jobs * size for what, size in each.items()})
    end = replace(END, in_use={**IN_USE, name: leaked})
    wrong = balance(replace(FACTS, samples=[BASELINE, end])).wrong
    assert any(said in line and f" of {name}" in line for line in wrong), wrong


def test_what_an_allocator_keeps_of_a_peak_is_no_leak() -> None:
    """An hour's figures: the worker's resident memory moved between 623 and 812 MiB."""
    kept = replace(END, processes={**PROCESSES, "worker": ProcessSample(728 * MiB, 20, 5)})
    assert balance(replace(FACTS, samples=[BASELINE, kept])).wrong == []


def test_memory_that_was_freed_is_not_counted_and_memory_in_use_is() -> None:
    before = in_use(trim=True)
    blocks = [bytes(5000) for _ in range(20_000)]
    during = in_use(trim=True)
    del blocks
    after = in_use(trim=True)
    for what in ("malloc", "resident"):
        assert during[what] - before[what] > 90 * MB
        assert after[what] - before[what] < 10 * MB


def test_another_process_tells_its_memory(tmp_path: Path) -> None:
    directory = tmp_path / "memory"
    code = "import time\nprint(1, flush=True)\nwhile True: time.sleep(60)"
    variables = {**os.environ, **environment(directory)}
    with subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            told = ask(process.pid, directory, PATIENCE_S, trim=True)
        finally:
            process.kill()
    assert 0 < told["malloc"] < told["resident"] < 1000 * MB
    assert told["blocks"] > 1000


def test_a_child_that_has_ended_does_not_end_a_soak() -> None:
    code = "import os, time\nif os.fork() == 0: os._exit(0)\nprint(1, flush=True)\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            children = Path("/proc", str(process.pid), "task", str(process.pid), "children").read_text().split()
            wait_until(lambda: "Z (zombie)" in Path("/proc", children[0], "status").read_text())
            assert measure(process.pid).threads == 1
        finally:
            process.kill()

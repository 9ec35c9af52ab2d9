"""A contender's process: runs only during calls, and ends when it is closed or too slow."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.processes import Failed, Remote, TooSlow
from tests.patience import PATIENCE_S


class Worker:
    """The object whose methods the tests call in a process."""

    def add(self, left: int, right: int) -> int:
        return left + right

    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise ValueError("no such plan")

    def die(self) -> None:
        os._exit(3)

    def sleep(self) -> None:
        time.sleep(60)


class Unbuildable:
    def __init__(self) -> None:
        raise RuntimeError("no model")


@pytest.fixture
def remote() -> Iterator[Remote]:
    made = Remote(Worker)
    yield made
    made.close()


def state(pid: int) -> str:
    """The state of a process on Linux: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_calls_are_computed_in_another_process(remote: Remote) -> None:
    assert remote.call("add", 2, 3) == 5
    assert remote.call("pid") != os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_between_calls_the_process_is_stopped(remote: Remote) -> None:
    pid = remote.call("pid")
    deadline = time.monotonic() + PATIENCE_S
    while state(pid) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(pid) == "T"


def test_an_error_is_reported_and_the_process_continues(remote: Remote) -> None:
    with pytest.raises(Failed, match="ValueError: no such plan"):
        remote.call("fail")
    assert remote.call("add", 1, 1) == 2


def test_a_died_process_is_reported(remote: Remote) -> None:
    with pytest.raises(Failed, match="exit code 3"):
        remote.call("die")
    assert not remote.alive
    with pytest.raises(Failed, match="has ended"):
        remote.call("add", 1, 1)


def test_a_call_past_its_limit_ends_the_process(remote: Remote) -> None:
    with pytest.raises(TooSlow):
        remote.call("sleep", limit_s=0.2)
    assert not remote.alive


def test_an_object_that_cannot_be_built_is_reported() -> None:
    with pytest.raises(Failed, match="RuntimeError: no model"):
        Remote(Unbuildable)

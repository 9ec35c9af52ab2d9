"""What every fuzz target shares: a number of made-up cases, none of which may crash, hang, or take memory without end.

A case is checked inside an address space that may grow by `ROOM_BYTES` only and for `CASE_CPU_S` of processor time.
The first counts whatever allocates, Python, torch or a library in Rust; a case that asks for more meets a MemoryError,
which no target expects.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

#: Processor time of one case; the slowest honest one takes a twentieth of it.
CASE_CPU_S = 5.0
#: What one case may add to the address space, in bytes.
ROOM_BYTES = 2**30
#: The longest text of an error: nothing that a stranger wrote is quoted at length.
LONGEST_MESSAGE = 1_200


@dataclass(frozen=True)
class Target:
    """Something that reads what comes from outside.

    Attributes:
        cases: makes what it is given.
        check: reads one case; raises where a promise is broken.
        many: cases in `make fuzz`.
        few: cases in the test suite.
    """

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], None]
    many: int
    few: int = 25


class Hang(Exception):
    """Raised when a case takes longer than `CASE_CPU_S`."""


def run(target: Target, cases: int, *, seeded: bool) -> int:
    """Check a target on `cases` cases, the same ones each time if `seeded`. Returns how many were checked."""
    done = 0

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=seeded,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(target.cases)
    def one(case: Any) -> None:
        nonlocal done
        done += 1
        with _time_limit():
            target.check(case)

    with address_space_limit(ROOM_BYTES):
        one()
    return done


@contextlib.contextmanager
def address_space_limit(room: int) -> Iterator[None]:
    """Let the address space of this process grow by `room` bytes and no further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise `Hang` in a case that computes for too long. One that waits is ended by the time limit of the whole run."""

    def end(*_: object) -> None:
        raise Hang(f"the case takes more than {CASE_CPU_S} s")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, CASE_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def is_plain(text: str, *names: str) -> None:
    """An error's text can be written anywhere, is short, and names what it is about, one of `names`."""
    assert len(text) <= LONGEST_MESSAGE, f"{len(text)} characters: {text[:200]}..."
    text.encode()  # no unpaired surrogates: it goes to terminals and logs
    json.dumps(text)
    assert any(name in text for name in names), f"{text!r} names none of {names[:5]}"

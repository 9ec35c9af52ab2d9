"""The harness of all fuzz targets: generate cases, none of which may crash, hang, or use unbounded memory.

While a target runs, the address space may grow by `EXTRA_ADDRESS_SPACE_BYTES`, and each case has `CASE_CPU_S` of CPU
time. The limit covers allocations by Python, torch and Rust libraries alike; a case that needs more fails with a
MemoryError, which no target expects.
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

#: Limit of CPU time for one case, in seconds; the slowest valid case takes a twentieth of it.
CASE_CPU_S = 5.0
#: How much a run of a target may add to the address space, in bytes.
EXTRA_ADDRESS_SPACE_BYTES = 2**30
#: The maximum length of an error message, in characters: messages must not quote untrusted input at length.
LONGEST_MESSAGE = 1_200


@dataclass(frozen=True)
class Target:
    """Code that reads untrusted input.

    Attributes:
        cases: generates the input.
        check: passes one case to the code; raises if a promise is broken.
        full_cases: number of cases in `make fuzz`.
        test_cases: number of cases in the test suite.
    """

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], None]
    full_cases: int
    test_cases: int = 25


class Hang(Exception):
    """Raised when a case takes longer than `CASE_CPU_S`."""


def run(target: Target, cases: int, *, seeded: bool) -> int:
    """Check a target on `cases` cases, the same ones each time if `seeded`. Returns the number of checked cases."""
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

    with address_space_limit(EXTRA_ADDRESS_SPACE_BYTES):
        one()
    return done


@contextlib.contextmanager
def address_space_limit(room: int) -> Iterator[None]:
    """Limit the growth of this process's address space to `room` bytes."""
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
    """Raise `Hang` in a case that computes too long. The time limit of the whole run ends a case that waits."""

    def end(*_: object) -> None:
        raise Hang(f"the case takes more than {CASE_CPU_S} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, CASE_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check_message(text: str, *names: str) -> None:
    """Check an error message: it is printable and short, and contains one of `names`."""
    assert len(text) <= LONGEST_MESSAGE, f"{len(text)} characters: {text[:200]}..."
    text.encode()  # terminals and logs reject unpaired surrogates
    json.dumps(text)
    assert any(name in text for name in names), f"{text!r} contains none of {names[:5]}"

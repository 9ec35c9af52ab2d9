"""Run every fuzz target on a few fixed cases. `make fuzz` runs 100,000."""

from __future__ import annotations

import pytest

from tests.fuzz.harness import Target, run
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nothing_from_outside_crashes_hangs_or_fills_the_memory(target: Target) -> None:
    assert run(target, target.test_cases, seeded=True) > 0

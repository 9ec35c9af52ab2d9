"""Results have the bits of another machine: digests that were made on one CPU are compared on every one."""

from __future__ import annotations

import pytest

from headrace.model.kernels import isa
from tests.numerics.comparison import committed, compare
from tests.numerics.jobs import SUBJECTS

RUNGS = [each.name for each in isa.available()]


@pytest.mark.skipif(not RUNGS, reason="without compiled kernels nothing is promised")
def test_results_have_the_bits_of_the_machine_that_made_the_digests() -> None:
    assert compare(rungs=RUNGS[:1]) == []


@pytest.mark.parametrize("rung", RUNGS[1:])
def test_a_lower_instruction_set_has_the_same_bits(rung: str) -> None:
    assert compare([subject for subject in SUBJECTS if subject.name in ("bundled", "124M shape")], [rung]) == []


def test_the_digests_name_the_machine_that_made_them() -> None:
    assert committed()["machine"].keys() == {"cpu", "rung", "commit", "date"}

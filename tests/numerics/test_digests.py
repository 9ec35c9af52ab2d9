"""Results have the bits of another machine: digests that were made on one CPU are compared on every one."""

from __future__ import annotations

import pytest

from headrace.model.kernels import isa
from tests.numerics.comparison import committed, compare, rung
from tests.numerics.jobs import SUBJECTS, digests

RUNGS = [each.name for each in isa.available()]


@pytest.mark.skipif(not RUNGS, reason="without compiled kernels nothing is promised")
def test_results_have_the_bits_of_the_machine_that_made_the_digests() -> None:
    assert compare(rungs=RUNGS[:1]) == []


@pytest.mark.parametrize("name", RUNGS[1:])
def test_a_lower_instruction_set_has_the_same_bits(name: str) -> None:
    assert compare([subject for subject in SUBJECTS if subject.name in ("bundled", "124M shape")], [name]) == []


def test_the_digests_name_the_machine_that_made_them() -> None:
    for model in committed()["models"].values():
        assert model["machine"].keys() == {"cpu", "rung", "commit", "date"}


def test_bfloat16_without_instructions_for_it_has_the_same_bits_on_every_instruction_set() -> None:
    """The fingerprint does not tell these apart."""
    bundled = next(subject for subject in SUBJECTS if subject.name == "bundled")
    widened = [each.name for each in isa.available() if not (each.has("avx512bf16") or each.name == isa.AMX.name)]
    found = []
    for name in widened:
        with rung(name):
            assert bundled.make("bfloat16").gemm_backend == "bf16-fma"
            found.append(digests(bundled, "bfloat16"))
    assert all(each == found[0] for each in found)

"""tests/README.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from tests.chaos.schedule import KINDS

TESTS = Path(__file__).parents[1]


def test_every_test_and_fault_named_there_exists() -> None:
    text = (TESTS / "README.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 40
    sources = [path.read_text() for path in TESTS.rglob("test_*.py")]
    there = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}
    assert named <= there, sorted(named - there)
    faults = {fault for row in re.findall(r"`make chaos` \(([^)]*)\)", text) for fault in re.findall(r"\w+_\w+", row)}
    assert faults <= set(KINDS)
    assert {path.name for path in TESTS.iterdir() if (path / "__init__.py").exists()} == set(
        re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    )

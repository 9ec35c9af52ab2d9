"""A third of the zoo; `make zoo` runs all of it."""

from __future__ import annotations

import pytest

from tests.zoo.report import listed
from tests.zoo.running import Row, run
from tests.zoo.table import ZOO

QUICK = [entry for entry in ZOO if entry.quick]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """All at once: the jobs of all directories share one worker."""
    return {row.entry.name: row for row in run(QUICK, tmp_path_factory.mktemp("zoo"), every=20)}


@pytest.mark.parametrize("name", [entry.name for entry in QUICK])
def test_a_directory_equals_transformers_or_is_refused(name: str, rows: dict[str, Row]) -> None:
    row = rows[name]
    assert row.faults == []
    assert row.entry.refused or row.tokens >= 10


def test_the_docs_list_every_directory() -> None:
    assert listed() == [entry.name for entry in ZOO]

"""A short form of `python -m tests.chaos.tables`."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.tables import Tables, faults_of


def test_tables_and_shards_give_equal_texts_though_client_and_worker_are_killed(tmp_path: Path) -> None:
    tables = Tables(tmp_path, 48, ["parquet"])
    assert faults_of(tables.run(), 48) == []
    assert tables.killed["parquet"] == ["client", "worker"]

"""Memory limits of control groups, in a tree of files as Linux has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.worker.engine import cgroups as limits

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of the groups; this process is in a/b."""
    monkeypatch.setattr(limits, "CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "CGROUP_OF_PROCESS", tmp_path / "own")
    (tmp_path / "own").write_text("1:name=systemd:/elsewhere\n0::/a/b\n")
    (tmp_path / "cgroup" / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(limits.os, "sysconf", {"SC_AVPHYS_PAGES": 16 * GIB // 4096, "SC_PAGE_SIZE": 4096}.__getitem__)
    return tmp_path / "cgroup"


def limit(group: Path, most: int | str, used: int, cached: int = 0) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")


def test_without_limits_it_is_what_the_machine_has(groups: Path) -> None:
    assert limits.free_memory() == 16 * GIB
    limit(groups / "a" / "b", "max", GIB)
    assert limits.free_memory() == 16 * GIB


def test_the_narrowest_limit_counts_and_cached_files_are_free(groups: Path) -> None:
    limit(groups / "a" / "b", 4 * GIB, 2 * GIB, cached=GIB)
    assert limits.free_memory() == 3 * GIB
    limit(groups / "a", 5 * GIB, 4 * GIB)
    assert limits.free_memory() == GIB
    limit(groups, 20 * GIB, GIB)
    assert limits.free_memory() == GIB


def test_in_a_container_the_own_group_is_the_root(groups: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    limit(groups, 2 * GIB, 3 * GIB // 2)
    assert limits.free_memory() == GIB // 2


def test_more_than_the_limit_leaves_nothing(groups: Path) -> None:
    limit(groups / "a" / "b", GIB, GIB + 4096)
    assert limits.free_memory() == 0


@pytest.mark.parametrize("text", ["", "many", "12 13"])
def test_unreadable_limit_files_are_ignored(groups: Path, text: str) -> None:
    limit(groups / "a" / "b", GIB, 0)
    (groups / "a" / "b" / "memory.max").write_text(text)
    assert limits.free_memory() == 16 * GIB


def test_without_linux_there_are_no_control_groups(groups: Path, tmp_path: Path) -> None:
    limit(groups / "a" / "b", GIB, 0)
    (tmp_path / "own").unlink()
    assert limits.free_memory() == 16 * GIB

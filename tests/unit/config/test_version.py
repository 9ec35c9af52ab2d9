"""The version, with and without an installed distribution."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from headrace.config.version import DISTRIBUTION, project_version, version_of_clone
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[3]
STATED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_clone_states_it() -> None:
    assert version_of_clone(ROOT) == STATED
    assert project_version()


@pytest.mark.parametrize("text", [None, "not toml [", "[tool]", '[project]\nname = "another"\nversion = "9"'])
def test_without_a_project_file_of_ours_it_is_unknown(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    assert version_of_clone(tmp_path) == "unknown"


def test_the_command_tells_it_where_no_distribution_is_installed() -> None:
    hidden = (
        "import importlib.metadata as m, sys; real = m.version\n"
        "def version(name):\n"
        f"    if name == {DISTRIBUTION!r}: raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from headrace.worker.cli import run; sys.argv[1:] = ['--version']; run()"
    )
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{DISTRIBUTION}, version {STATED}\n"

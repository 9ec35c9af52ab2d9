"""The advice on how to install the project and its extras: always from a clone, never by a name of a registry."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from headrace.extras import Extra, how_to_install

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = "|".join({re.escape(PROJECT["name"]), "headrace"})
#: The name as an argument of an installer, alone or with an extra or a version, but not as part of a path.
INSTALLED_BY_NAME = re.compile(
    rf"\b(?:install|add|inject|run|download)\b[^\n]*?(?<![\w/.@-])(?:{NAMES})(?=[\[\s'\"=<>~!]|$)"
)
#: A command ends with its line, or with the backtick that closes it.
INSTALLER = re.compile(r"\b(?:pip3?|uv|pipx|poetry|pdm|conda|rye)\b[^\n`]*")
WITH_EXTRA = re.compile(rf"\b(?:{NAMES})\[[a-z]")


def texts() -> list[Path]:
    """The files of the project that a user or an operator reads or runs, tests aside."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    binary = {".png", ".safetensors"}
    return [ROOT / name for name in listed if not name.startswith("tests/") and Path(name).suffix not in binary]


def by_name(line: str) -> bool:
    """Whether a line tells somebody to install the project by a name."""
    commands = INSTALLER.findall(line)
    return any(INSTALLED_BY_NAME.search(command) for command in commands) or bool(WITH_EXTRA.search(line))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("pip install headrace", True),
        ("pip install 'headrace[http]'", True),
        ("uv add headrace==1.0", True),
        ("the extra `headrace[http]`", True),
        ("/opt/headrace/bin/pip install '.[http]' -c constraints.txt", False),
        ("pip install '.[http]' -c constraints.txt   # in a clone of the project", False),
    ],
)
def test_the_search_finds_names_and_no_paths(line: str, found: bool) -> None:
    assert by_name(line) is found


def test_nothing_is_installed_by_a_name_that_anybody_could_take() -> None:
    for path in texts():
        if path.is_file() and path.name != "pyproject.toml":  # in which an extra includes other extras of the project
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not by_name(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


@pytest.mark.parametrize("extra", get_args(Extra))
def test_every_extra_exists_and_the_advice_installs_from_a_clone(extra: Extra) -> None:
    assert extra in PROJECT["optional-dependencies"]
    assert how_to_install(extra) == f"run `pip install '.[{extra}]' -c constraints.txt` in a clone of the project"


def test_errors_take_their_advice_from_one_place() -> None:
    for package in ("client", "config", "model", "worker"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "extras.py":
                assert "pip install '." not in path.read_text(), path

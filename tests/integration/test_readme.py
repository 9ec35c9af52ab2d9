"""The blocks of README and docs run: Python at a real worker, shell commands as written, and the outputs shown."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.http_server import HttpServer
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
#: The blocks of the page of examples are files, run in test_examples.py; those of http need a server.
APART = ("examples", "http")
PAGES = [ROOT / "README.md", *(page for page in sorted(ROOT.glob("docs/*.md")) if page.stem not in APART)]
PATTERN = re.compile(r"```(\w*)\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """Each block of a language, and the output that stands under it."""
    return [(code, shown) for found, code, shown in PATTERN.findall(text) if found == language]


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page.read_text(), language)]


def name_of(page: Path) -> str:
    return page.stem


@pytest.fixture
def at_the_worker(worker: object, redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a user's shell has: the address of a Redis with a worker on it, and a directory to write to."""

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADRACE_REDIS_URL", redis_url)


def run_python(text: str) -> dict[str, Any]:
    """Run the Python blocks of a document one after another, and compare what they print. Returns their names."""
    scope: dict[str, Any] = {"__name__": "document"}
    for code, shown in blocks(text, "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "document", "exec"), scope)
        if shown:
            assert printed.getvalue() == shown
    return scope


@pytest.mark.usefixtures("at_the_worker")
@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python_blocks_run_and_print_what_is_shown(page: Path) -> None:
    scope = run_python(page.read_text())
    from headrace import client

    if "own" in scope:
        scope["own"].close()
    client.default_client().close()


@pytest.mark.usefixtures("at_the_worker")
@pytest.mark.parametrize("page", with_blocks("sh"), ids=name_of)
def test_shell_blocks_run(page: Path) -> None:
    bin_directory = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}"}
    commands = [line for code, _ in blocks(page.read_text(), "sh") for line in code.splitlines()]
    for command in commands:
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_python_blocks_of_http_run_against_a_server(worker: object, redis_url: str, tmp_path: Path) -> None:
    with HttpServer(tmp_path, redis_url) as server:
        text = (ROOT / "docs" / "http.md").read_text().replace("http://127.0.0.1:8000", server.url)
        assert len(blocks(text, "python")) >= 4
        scope = run_python(text)
        scope["api"].close()


def test_the_pages_have_blocks_to_run() -> None:
    assert {"README", "client", "bulk", "determinism", "fidelity", "index"} <= {p.stem for p in with_blocks("python")}
    assert {"README", "bulk"} <= {page.stem for page in with_blocks("sh")}


def test_the_table_of_checkpoints_has_their_tolerances() -> None:
    from headrace.client.wire.activations import CHECKPOINTS

    page = (ROOT / "docs" / "fidelity.md").read_text()
    table = {number: cell.strip() for number, cell in re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", page, re.MULTILINE)}
    assert set(table) == {str(number) for number in CHECKPOINTS}
    for number, (_, _, tolerance) in CHECKPOINTS.items():
        assert float(table[str(number)].replace("exact", "0") or 0) == tolerance


def test_the_settings_that_the_readme_names_exist() -> None:
    from headrace.config import Settings

    named = set(re.findall(r"`HEADRACE_([A-Z_]+)`", README))
    assert named <= {name.upper() for name in Settings.model_fields}


def test_the_files_it_names_exist() -> None:
    for name in re.findall(r"`((?:client|worker|model|config|docker)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name

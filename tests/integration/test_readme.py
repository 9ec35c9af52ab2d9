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

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = (ROOT / "docs" / "client.md").read_text()
PATTERN = re.compile(r"```(\w*)\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
BLOCKS = PATTERN.findall(README)


@pytest.fixture
def at_the_worker(worker: object, redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a user's shell has: the address of a Redis with a worker on it, and a directory to write to."""
    import client

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILLRACE_REDIS_URL", redis_url)
    client.default_client.cache_clear()


@pytest.mark.usefixtures("at_the_worker")
@pytest.mark.parametrize("text", [README, DOCS], ids=["README.md", "docs/client.md"])
def test_python_blocks_run_and_print_what_is_shown(text: str) -> None:
    scope: dict[str, Any] = {}
    blocks = [(code, shown) for language, code, shown in PATTERN.findall(text) if language == "python"]
    assert len(blocks) >= 5
    for code, shown in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "document", "exec"), scope)
        if shown:
            assert printed.getvalue() == shown
    import client

    if "own" in scope:
        scope["own"].close()
    client.default_client().close()
    client.default_client.cache_clear()


@pytest.mark.usefixtures("at_the_worker")
def test_shell_blocks_run() -> None:
    bin_directory = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}"}
    commands = [line for language, code, _ in BLOCKS if language == "sh" for line in code.splitlines()]
    assert len(commands) >= 3
    for command in commands:
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_settings_table_is_complete() -> None:
    from config import Settings

    for name in Settings.model_fields:
        assert f"`MILLRACE_{name.upper()}`" in README, name


def test_the_files_it_names_exist() -> None:
    for name in re.findall(r"`((?:client|worker|model|config|docker)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name

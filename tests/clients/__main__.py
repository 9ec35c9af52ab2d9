"""`python -m tests.clients [NAME ...]`: install other people's programs, drive server and worker, print a table.

Each program has an environment of its own below `.clients/`, which is kept for the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path

from headrace.worker.redis_server import EmbeddedRedis
from tests import conftest  # noqa: F401 - a developer's own settings must not reach the programs
from tests.chat_model import make_chat_model
from tests.clients.programs import PROGRAMS, Program
from tests.integration.http_server import HttpServer
from tests.integration.processes import worker_on

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".clients"
DRIVERS = Path(__file__).parent / "drivers"
#: Seconds for an installation, and for a driver.
INSTALL_S, DRIVE_S = 900, 900


def install(program: Program) -> Path | str:
    """The interpreter of the program's environment; or why it cannot be installed."""
    folder = CACHE / program.name
    python = folder / "bin" / "python"
    if (folder / "installed").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    if program.of_node:
        return install_node(program, folder)
    if program.sees_ours:
        (library,) = folder.glob("lib/python*/site-packages")
        (library / "ours.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ["--constraint", str(shared_versions(folder))] if program.sees_ours else []
    done = subprocess.run(
        [*command, *constraints, *program.packages], capture_output=True, text=True, timeout=INSTALL_S
    )
    if done.returncode:
        return f"does not install: {last_line(done.stderr)}"
    (folder / "installed").touch()
    return python


def shared_versions(folder: Path) -> Path:
    """Constraints on the large packages that a program shares with this environment; it may have others as it needs."""
    shared = ("torch==", "transformers==", "tokenizers==", "numpy==")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    path = folder / "constraints.txt"
    path.write_text("\n".join(line for line in lines if line.startswith(shared)) + "\n")
    return path


def install_node(program: Program, folder: Path) -> Path | str:
    """The same for a package of npm."""
    if shutil.which("npm") is None:
        return "does not install: npm is not on this machine"
    done = subprocess.run(
        ["npm", "install", "--prefix", str(folder), *program.packages],
        capture_output=True, text=True, timeout=INSTALL_S,
    )  # fmt: skip
    if done.returncode:
        return f"does not install: {last_line(done.stderr)}"
    (folder / "installed").touch()
    return folder / "bin" / "python"


def version(python: Path, program: Program) -> str:
    """The version of the program's package."""
    name = program.packages[0].partition("[")[0]
    if program.of_node:
        manifest = python.parents[1] / "node_modules" / name / "package.json"
        return str(json.loads(manifest.read_text())["version"])
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.strip()


def last_line(text: str) -> str:
    """What a program said last."""
    return (text.strip().splitlines() or ["nothing"])[-1][:200]


def drive(python: Path, program: Program, environment: dict[str, str]) -> tuple[bool, str]:
    """Run a driver. Returns whether it succeeded, and what it said last."""
    driver = DRIVERS / f"{program.name.replace('-', '_')}.py"
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                [str(python), "-P", str(driver)], env={**os.environ, **environment, "PATH": path}, cwd=scratch,
                capture_output=True, text=True, timeout=DRIVE_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False, f"not done after {DRIVE_S} s"
    for line in done.stdout.splitlines():
        if line.startswith("|"):
            print(line)  # of a table of figures
    said = last_line(done.stdout if done.returncode == 0 else done.stdout + done.stderr)
    return done.returncode == 0, said


def main() -> int:
    """Run the programs that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", help="programs to run; all by default")
    names = parser.parse_args().names
    if unknown := set(names) - {program.name for program in PROGRAMS}:
        parser.error(f"no such program: {', '.join(sorted(unknown))}")
    CACHE.mkdir(exist_ok=True)
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis.ephemeral() as redis:
        scratch = Path(folder)
        model = make_chat_model(scratch / "model")
        with worker_on(redis, scratch / "worker.log", HEADRACE_MODEL=f"demo={model}") as worker:
            worker.wait_ready()
            with HttpServer(scratch, redis.url) as server:
                environment = {"SERVER": server.url, "REDIS": redis.url, "MODEL": str(model), "OPENAI_API_KEY": "none"}
                for program in PROGRAMS:
                    if names and program.name not in names:
                        continue
                    python = install(program)
                    if isinstance(python, str):
                        rows.append((program.name, "-", program.does, python))
                        continue
                    ok, said = drive(python, program, environment)
                    failed |= not ok
                    rows.append(
                        (program.name, version(python, program), program.does, said if ok else f"FAILED: {said}")
                    )
                    print(*rows[-1], sep=" | ", flush=True)
    print("| program | version | what was done | result |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Reads the deployment files for their tests."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import yaml

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
FILES = [path for path in DOCKER.rglob("*") if path.is_file()]
KUBERNETES = DOCKER / "kubernetes"
#: Seconds between the end of HEADRACE_SOFT_SHUTDOWN_S and a kill: results are stored and messages returned in them.
MARGIN_S = 10


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), comments gone and continued lines joined."""
    text = "\n".join(line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def instruction(name: str) -> str:
    """The arguments of the last instruction of this name, the one that counts."""
    return [rest for found, rest in instructions() if found == name][-1]


def compose(file: str = "compose.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / file).read_text())
    return loaded


def seconds(duration: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(ms|s|m)", duration).groups()  # type: ignore[union-attr]
    return int(number) * {"ms": 0.001, "s": 1, "m": 60}[unit]


def is_console_script(command: str) -> bool:
    return bool(entry_points(group="console_scripts", name=command))


def check_celery_command(words: list[str]) -> None:
    """A worker is started, with options that Celery's worker has; outside the clone the package has its full name."""
    from celery.bin.worker import worker

    assert is_console_script(Path(words[0]).name)
    assert words[1:4] in (["-A", "worker", "worker"], ["-A", "headrace.worker", "worker"])
    known = {name for option in worker.params for name in option.opts}
    assert {word for word in words[4:] if word.startswith("-")} <= known


def check_headrace_command(words: list[str]) -> None:
    """The subcommand exists and takes these options, whatever they would do."""
    from headrace.worker.cli import main

    subcommand = main.commands[words[0]]
    subcommand.make_context(words[0], words[1:], parent=click.Context(main))

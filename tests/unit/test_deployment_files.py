"""Procfile, Dockerfile, compose files, the bundled model's card: what can be checked without a container engine."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from config.settings import PREFIX, Settings, load_settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


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


def check_millrace_command(words: list[str]) -> None:
    """The subcommand exists and takes these options, whatever they would do."""
    from worker.cli import main

    subcommand = main.commands[words[0]]
    subcommand.make_context(words[0], words[1:], parent=click.Context(main))


# Procfile


def test_the_procfile_starts_the_worker() -> None:
    processes = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
    assert processes == {"worker": "celery -A worker worker"}
    assert is_console_script(shlex.split(processes["worker"])[0])


# Dockerfile


def test_the_container_does_not_run_as_root() -> None:
    assert instruction("USER") not in ("root", "0")
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_the_container_runs_the_worker_without_a_shell_in_between() -> None:
    command = json.loads(instruction("ENTRYPOINT")) + json.loads(instruction("CMD"))
    assert shlex.join(command) == "celery -A worker worker"
    assert instruction("STOPSIGNAL") == "SIGTERM"


def test_the_health_check_is_a_command_of_ours() -> None:
    options, _, command = instruction("HEALTHCHECK").partition(" CMD ")
    words = json.loads(command)
    assert words == ["millrace", "status", "--here", "--json"]
    assert is_console_script(words[0])
    check_millrace_command(words[1:])
    assert "--start-period=" in options


def test_dependencies_come_before_the_code() -> None:
    steps = [f"{name} {rest}" for name, rest in instructions()]
    first_install = next(i for i, step in enumerate(steps) if step.startswith("RUN") and "pip install" in step)
    copied_before = [rest for name, rest in instructions()[:first_install] if name == "COPY"]
    assert copied_before == ["pyproject.toml constraints.txt ./"]


def test_the_dependencies_are_read_from_where_they_stand() -> None:
    listing = next(rest for name, rest in instructions() if name == "RUN" and "tomllib" in rest)
    assert "['project']['dependencies']" in listing
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def test_everything_copied_exists_and_gets_past_the_ignore_file() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    sources = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    assert {"client", "config", "model", "worker"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored


def test_environment_variables_are_settings() -> None:
    for text in ((DOCKER / file).read_text() for file in ("Dockerfile", "compose.yaml", "compose.gpu.yaml")):
        for name in re.findall(rf"\b{PREFIX}([A-Z_]+)\b", text):
            assert name.lower() in Settings.model_fields


def test_no_secret_is_written_down() -> None:
    for path in DOCKER.iterdir():
        assert not re.search(r"(?i)(password|token|secret)\s*[:=]\s*\S", path.read_text()), path


# Compose


def test_the_services() -> None:
    services = compose()["services"]
    assert set(services) == {"redis", "worker", "client"}
    assert services["worker"]["depends_on"]["redis"]["condition"] == "service_healthy"
    assert services["client"]["depends_on"]["worker"]["condition"] == "service_healthy"
    assert services["client"]["profiles"] == ["client"]
    assert "profiles" not in services["worker"]


def test_redis_keeps_what_it_is_given() -> None:
    redis = compose()["services"]["redis"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    assert options == {"--appendonly": "yes", "--appendfsync": "everysec", "--maxmemory-policy": "noeviction"}
    assert redis["volumes"] == ["redis:/data"]
    assert redis["healthcheck"]["test"][0] == "CMD"
    assert "ports" not in redis


def test_volumes_are_declared() -> None:
    loaded = compose()
    used = {volume.split(":")[0] for service in loaded["services"].values() for volume in service.get("volumes", [])}
    assert used == set(loaded["volumes"])


@pytest.mark.parametrize("service", ["worker", "client"])
def test_the_environment_is_accepted(monkeypatch: pytest.MonkeyPatch, service: str) -> None:
    environment = compose()["services"][service]["environment"]
    for name, value in environment.items():
        assert isinstance(value, str), f"{name} needs quotes"
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", r"\1", value))
    settings = load_settings()
    assert settings.redis_url == "redis://redis:6379/0"
    assert settings.model == "demo"


def test_a_worker_has_time_to_finish() -> None:
    worker = compose()["services"]["worker"]
    assert seconds(worker["stop_grace_period"]) >= float(worker["environment"]["MILLRACE_SOFT_SHUTDOWN_S"]) + 5


def test_the_client_runs_a_command_that_exists() -> None:
    client = compose()["services"]["client"]
    assert client["entrypoint"] == ["millrace"]
    assert is_console_script("millrace")
    check_millrace_command(client["command"])


def test_the_build_finds_its_files() -> None:
    build = compose()["services"]["worker"]["build"]
    context = (DOCKER / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    declared = {rest.split("=")[0] for name, rest in instructions() if name == "ARG"}
    assert set(build["args"]) <= declared


def test_the_gpu_file_only_adds_to_services_that_exist() -> None:
    added = compose("compose.gpu.yaml")["services"]
    assert set(added) <= set(compose()["services"])
    (device,) = added["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


# The card of the bundled model


def test_the_card_describes_the_model_that_is_there() -> None:
    demo = ROOT / "model" / "demo"
    card = (demo / "README.md").read_text()
    weights = (demo / "model.safetensors").read_bytes()
    shape = json.loads((demo / "config.json").read_text())
    assert hashlib.sha256(weights).hexdigest() in card
    assert f"{len(weights):,} bytes" in card
    for name in ("n_embd", "n_layer", "n_head"):
        assert f"`{name}` {shape[name]}" in card
    assert f"{shape['n_positions']:,}" in card
    assert f"{shape['vocab_size']:,}" in card
    assert len(re.findall(r"^\| .* \| .* \| \d{4} \|$", card, re.MULTILINE)) == 14

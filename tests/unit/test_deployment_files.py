"""Procfile, Dockerfile, compose and systemd files: linted, and in agreement with commands and settings."""

from __future__ import annotations

import configparser
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from headrace.config.settings import PREFIX, Settings, load_settings
from tests.deployment import (
    DOCKER,
    FILES,
    KUBERNETES,
    MARGIN_S,
    ROOT,
    check_celery_command,
    check_headrace_command,
    compose,
    instruction,
    instructions,
    is_console_script,
    seconds,
)
from tests.patience import PATIENCE_S

# Linters; the extra `dev` brings them.

YAML = sorted(DOCKER.rglob("*.yaml"))
YAML_RULES = (
    "{extends: default, rules: {braces: {max-spaces-inside: 1}, document-start: disable, line-length: {max: 120}}}"
)


def lint(module: str, *arguments: str | Path) -> None:
    """Run a linter; it must find nothing."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("hadolint has no wheel for this machine")
    assert hadolint is not None, "the extra `dev` brings hadolint"
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout


def test_yamllint_finds_nothing() -> None:
    lint("yamllint", "--strict", "-d", YAML_RULES, *YAML)


def test_compose_files_follow_the_compose_specification() -> None:
    lint("check_jsonschema", "--builtin-schema", "vendor.compose-spec", *DOCKER.glob("compose*.yaml"))


@pytest.mark.parametrize("name", ["redis.yaml", "secret.yaml", "serve.yaml", "worker.yaml"])
def test_manifests_follow_the_schemas_of_kubernetes(name: str) -> None:
    lint("kubernetes_validate", "--strict", KUBERNETES / name)


# Procfile


def test_the_procfile_starts_the_worker() -> None:
    processes = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
    assert processes == {"worker": "celery -A worker worker"}
    check_celery_command(shlex.split(processes["worker"]))


# Dockerfile


def test_the_container_does_not_run_as_root() -> None:
    assert instruction("USER") not in ("root", "0")
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_the_container_runs_the_worker_without_a_shell_in_between() -> None:
    command = json.loads(instruction("ENTRYPOINT")) + json.loads(instruction("CMD"))
    assert shlex.join(command) == "celery -A worker worker"
    assert instruction("WORKDIR") == "/app", "where the clone is"
    assert instruction("STOPSIGNAL") == "SIGTERM"


def test_the_health_check_is_a_command_of_ours() -> None:
    options, _, command = instruction("HEALTHCHECK").partition(" CMD ")
    words = json.loads(command)
    assert words == ["headrace", "status", "--here", "--json"]
    assert is_console_script(words[0])
    check_headrace_command(words[1:])
    assert "--start-period=" in options


def test_dependencies_come_before_the_code() -> None:
    steps = [f"{name} {rest}" for name, rest in instructions()]
    first_install = next(i for i, step in enumerate(steps) if step.startswith("RUN") and "pip install" in step)
    copied_before = [rest for name, rest in instructions()[:first_install] if name == "COPY"]
    assert copied_before == ["pyproject.toml constraints.txt ./"]


def test_everything_copied_exists_and_gets_past_the_ignore_file() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    sources = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    assert {"headrace", "client", "config", "model", "worker"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored


def test_the_image_has_what_its_commands_need() -> None:
    listing = next(rest for name, rest in instructions() if name == "RUN" and "tomllib" in rest)
    assert "*project['dependencies']" in listing
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = re.findall(r"\*extras\['(\w+)'\]", listing)
    assert sorted(listed) == ["http", "metrics", "otel", "structured", "worker"]
    assert all(extras[name] for name in listed)
    for name, rest in instructions():
        if name == "RUN" and "pip install" in rest:
            assert "--constraint constraints.txt" in rest


def test_environment_variables_are_settings() -> None:
    for path in FILES:
        for name in re.findall(rf"\b{PREFIX}([A-Z_]+)\b", path.read_text()):
            assert name.lower() in Settings.model_fields, f"{path}: {name}"


def test_no_secret_is_written_down() -> None:
    for path in FILES:
        assert not re.search(r"(?i)(password|token|secret)\s*[:=]\s*(?!CHANGE-ME\b|false\b)\S", path.read_text()), path
        assert not re.search(r"://[^/\s]*:(?!CHANGE-ME@)[^/\s@]+@", path.read_text()), path


# Compose


def test_the_services() -> None:
    services = compose()["services"]
    assert set(services) == {"redis", "worker", "client", "http", "prometheus"}
    assert services["worker"]["depends_on"]["redis"]["condition"] == "service_healthy"
    assert services["client"]["depends_on"]["worker"]["condition"] == "service_healthy"
    assert services["client"]["profiles"] == ["client"]
    assert services["prometheus"]["profiles"] == ["metrics"]
    assert services["http"]["profiles"] == ["http"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    assert "profiles" not in services["worker"]


def test_redis_keeps_what_it_is_given() -> None:
    redis = compose()["services"]["redis"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    assert options == {"--appendonly": "yes", "--appendfsync": "everysec", "--maxmemory-policy": "noeviction"}
    assert redis["volumes"] == ["redis:/data"]
    assert redis["healthcheck"]["test"][0] == "CMD"
    assert "ports" not in redis


@pytest.mark.parametrize("service", ["worker", "client", "http"])
def test_the_environment_is_accepted(monkeypatch: pytest.MonkeyPatch, service: str) -> None:
    environment = compose()["services"][service]["environment"]
    for name, value in environment.items():
        assert isinstance(value, str), f"{name} needs quotes"
        given = "0123456789abcdef" * 2 if "KEYS" in name else r"\1"
        monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(.*)\}", given, value))
    settings = load_settings()
    assert settings.redis_url == "redis://redis:6379/0"
    assert settings.model == "demo"


def test_a_worker_has_time_to_finish() -> None:
    worker = compose()["services"]["worker"]
    assert seconds(worker["stop_grace_period"]) >= float(worker["environment"]["HEADRACE_SOFT_SHUTDOWN_S"]) + MARGIN_S
    assert worker["stop_signal"] == "SIGQUIT", "SIGTERM has no such limit"


def test_the_client_runs_a_command_that_exists() -> None:
    client = compose()["services"]["client"]
    assert client["entrypoint"] == ["headrace"]
    assert is_console_script("headrace")
    check_headrace_command(client["command"])


def test_the_server_keeps_its_files_and_is_asked_where_it_listens() -> None:
    server = compose()["services"]["http"]
    assert server["entrypoint"] == ["headrace"]
    check_headrace_command(server["command"])
    port = server["command"][server["command"].index("--port") + 1]
    assert f":{port}/health" in server["healthcheck"]["test"][-1]
    assert server["ports"] == [f"127.0.0.1:{port}:{port}"]
    (volume,) = server["volumes"]
    assert volume.split(":")[1] == server["environment"]["HEADRACE_FILES_DIR"]
    made = next(rest for name, rest in instructions() if name == "RUN" and "useradd" in rest)
    assert volume.split(":")[1] in made.split(), "or the volume would belong to root"


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


# systemd


def unit(name: str = "headrace-worker@.service") -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string((DOCKER / "systemd" / name).read_text())
    return parser


def test_the_unit_runs_a_worker_with_a_name_and_settings_of_its_own() -> None:
    service = unit()["Service"]
    words = shlex.split(service["ExecStart"])
    check_celery_command(words)
    assert words[words.index("-n") + 1] == "%i@%%h", "systemd makes one % of two"
    assert service["EnvironmentFile"] == "/etc/headrace/%i.env"
    assert service["Restart"] == "always"


def test_the_unit_of_the_server_keeps_files_and_leaves_it_time_to_finish() -> None:
    service = unit("headrace-serve.service")["Service"]
    words = shlex.split(service["ExecStart"])
    assert Path(words[0]).name == "headrace"
    check_headrace_command(words[1:])
    assert service["Environment"] == f"HEADRACE_FILES_DIR=%S/{service['StateDirectory']}"
    assert float(service["TimeoutStopSec"]) >= Settings().soft_shutdown_s + MARGIN_S


def test_the_unit_leaves_a_worker_time_to_finish() -> None:
    service = unit()["Service"]
    example = (ROOT / "config" / "prod.env.example").read_text()
    (set_there,) = re.findall(r"^HEADRACE_SOFT_SHUTDOWN_S=(\d+)$", example, re.MULTILINE)
    longest = max(float(set_there), Settings().soft_shutdown_s)
    assert service["KillSignal"] == "SIGQUIT", "SIGTERM has no limit"
    assert float(service["TimeoutStopSec"]) >= longest + MARGIN_S


def test_the_unit_restricts_nothing_that_is_needed() -> None:
    """The worker needs a GPU's devices, and permission to execute compiled kernels."""
    service = unit()["Service"]
    assert not {"MemoryDenyWriteExecute", "PrivateDevices", "DeviceAllow", "PrivateNetwork"} & set(service)
    assert "XDG_CACHE_HOME=%C" in service["Environment"]
    assert service["CacheDirectory"] == "headrace"
    assert service["CacheDirectoryMode"] == "0700"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
@pytest.mark.parametrize("name", ["headrace-worker@.service", "headrace-serve.service"])
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path, name: str) -> None:
    text = (DOCKER / "systemd" / name).read_text()
    named = tmp_path / name.replace("@", "@gpu0")
    named.write_text(text.replace("/opt/headrace/bin", str(Path(sys.executable).parent)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", named], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert named.name not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr

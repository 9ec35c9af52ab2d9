"""Procfile, Dockerfile, compose, systemd and Kubernetes files, the bundled model's card: checked without any engine."""

from __future__ import annotations

import configparser
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from headrace.config.settings import PREFIX, Settings, load_settings
from headrace.worker.observability.probes import Probes
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
FILES = [path for path in DOCKER.rglob("*") if path.is_file()]
KUBERNETES = DOCKER / "kubernetes"
#: What is added to the time that rows have to finish: results are stored then, and messages handed back.
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
    """`celery -A worker worker`, with options that Celery's worker has."""
    from celery.bin.worker import worker

    assert is_console_script(Path(words[0]).name)
    assert words[1:4] == ["-A", "worker", "worker"]
    known = {name for option in worker.params for name in option.opts}
    assert {word for word in words[4:] if word.startswith("-")} <= known


def check_headrace_command(words: list[str]) -> None:
    """The subcommand exists and takes these options, whatever they would do."""
    from headrace.worker.cli import main

    subcommand = main.commands[words[0]]
    subcommand.make_context(words[0], words[1:], parent=click.Context(main))


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
    for path in FILES:
        for name in re.findall(rf"\b{PREFIX}([A-Z_]+)\b", path.read_text()):
            assert name.lower() in Settings.model_fields, f"{path}: {name}"


def test_no_secret_is_written_down() -> None:
    for path in FILES:
        assert not re.search(r"(?i)(password|token|secret)\s*[:=]\s*(?!CHANGE-ME\b|false\b)\S", path.read_text()), path
        assert not re.search(r"://[^/\s]*:(?!CHANGE-ME@)[^/\s@]+@", path.read_text()), path


def test_the_rules_of_hadolint_that_apply() -> None:
    """By their numbers at github.com/hadolint/hadolint."""
    lines = instructions()
    names, text = [name for name, _ in lines], (DOCKER / "Dockerfile").read_text()
    for name, rest in lines:
        if name == "WORKDIR":
            assert rest.startswith("/"), "DL3000"
        if name == "FROM":
            assert re.fullmatch(r"\S+:(?!latest)[\w.-]+", rest), "DL3006, DL3007"
        if name in ("CMD", "ENTRYPOINT"):
            assert json.loads(rest), "DL3025"
        if name == "RUN":
            assert not re.search(r"\b(sudo|apt|apt-get|ssh|cd)\b", rest), "DL3003, DL3004, DL3008, DL3027"
            assert "|" not in rest, "DL4006"
            for command in re.findall(r"pip install [^&]*", rest):
                assert "--constraint" in command or "--no-deps" in command, "DL3013"
    assert "ADD" not in names, "DL3020"
    assert "MAINTAINER" not in names, "DL4000"
    assert names.count("CMD") == names.count("ENTRYPOINT") == names.count("HEALTHCHECK") == 1, "DL3012, DL4003"
    assert "PIP_NO_CACHE_DIR=1" in text, "DL3042"
    assert instruction("USER") != "root", "DL3002"


@pytest.mark.parametrize("extra", ["http", "metrics", "otel"])
def test_what_http_metrics_and_traces_need_is_in_the_image(extra: str) -> None:
    listing = next(rest for name, rest in instructions() if name == "RUN" and "tomllib" in rest)
    assert "extras = project['project']['optional-dependencies']" in listing
    assert f"*extras['{extra}']" in listing
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][extra]


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


def test_volumes_are_declared() -> None:
    loaded = compose()
    used = {volume.split(":")[0] for service in loaded["services"].values() for volume in service.get("volumes", [])}
    files = {name for name in used if name.startswith("./")}
    assert used - files == set(loaded["volumes"])
    assert all((DOCKER / name).is_file() for name in files)


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
    made = next(rest for name, rest in instructions() if name == "RUN" and rest.startswith("mkdir"))
    assert volume.split("/")[-1] in made.split(), "or the volume would belong to root"


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


def test_the_unit_takes_away_nothing_that_is_needed() -> None:
    """A GPU's devices, and the right to run what was compiled a moment before."""
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


# Kubernetes


def manifests(*names: str) -> list[dict[str, Any]]:
    """The objects in these files, by default in all that the kustomization lists."""
    listed = names or tuple(yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"])
    return [found for name in listed for found in yaml.safe_load_all((KUBERNETES / name).read_text())]


def manifest(kind: str, *names: str) -> dict[str, Any]:
    (found,) = [each for each in manifests(*names) if each["kind"] == kind]
    return found


def container(kind: str) -> dict[str, Any]:
    (only,) = manifest(kind)["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def environment_of(kind: str) -> dict[str, str]:
    """A container's variables, with what stands in the Secret."""
    secret = manifest("Secret")
    values = {}
    for variable in container(kind)["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference:
            assert reference["name"] == secret["metadata"]["name"]
        values[variable["name"]] = secret["stringData"][reference["key"]] if reference else variable["value"]
    return values


def size(quantity: str) -> int:
    """Bytes of a quantity as Kubernetes and Redis write it."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"": 1, "gi": 2**30, "gb": 2**30, "mi": 2**20, "mb": 2**20}[unit.lower()]


def test_every_manifest_is_an_object_with_a_name() -> None:
    files = {path.name for path in KUBERNETES.iterdir()}
    listed = set(yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"])
    assert listed <= files
    assert files - listed == {"kustomization.yaml", "keda.yaml", "podmonitor.yaml", "serve.yaml"}, (
        "what not everybody has or wants"
    )
    for found in manifests(*(files - {"kustomization.yaml"})):
        assert found["apiVersion"]
        assert found["metadata"]["name"]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not here")
def test_kubectl_builds_them() -> None:
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert sorted(each["kind"] for each in built) == sorted(each["kind"] for each in manifests())
    (worker,) = [each for each in built if each["kind"] == "Deployment"]
    assert re.fullmatch(r"\S+:(?!latest)\S+", worker["spec"]["template"]["spec"]["containers"][0]["image"])


def test_the_workers_environment_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    values = environment_of("Deployment")
    assert {name for name in values if not name.startswith(PREFIX)} == {"REMAP_SIGTERM"}, "which is Celery's"
    for name, value in values.items():
        assert isinstance(value, str), f"{name} needs quotes"
        monkeypatch.setenv(name, value)
    settings, limits = load_settings(), container("Deployment")["resources"]["limits"]
    assert settings.metrics_host == "0.0.0.0", "the kubelet comes from outside the pod"
    assert settings.threads == int(limits["cpu"])
    assert settings.kv_cache_bytes is not None
    assert settings.kv_cache_bytes <= size(limits["memory"]) / 2


def test_the_probes_ask_what_the_worker_answers() -> None:
    worker = container("Deployment")
    ports = {port["name"]: port["containerPort"] for port in worker["ports"]}
    assert ports == {"metrics": int(environment_of("Deployment")["HEADRACE_METRICS_PORT"])}
    answers = Probes.answer
    stub: Any = type("Loading", (), {"_monitor": None})()
    paths = {name: worker[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {name: answers(stub, path, "")[0] for name, path in paths.items()} == {
        "startupProbe": 200,
        "livenessProbe": 200,
        "readinessProbe": 503,
    }
    assert all(worker[name]["httpGet"]["port"] in ports for name in paths)
    noted = manifest("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert int(noted["prometheus.io/port"]) == ports["metrics"]
    (read,) = manifest("PodMonitor", "podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    assert (read["port"], read["path"]) == ("metrics", "/metrics")


def test_the_server_has_its_keys_its_files_and_time_to_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = manifest("Deployment", "serve.yaml")["spec"]
    assert (spec["replicas"], spec["strategy"]["type"]) == (1, "Recreate"), "one process may use the directory"
    pod, labels = spec["template"]["spec"], spec["template"]["metadata"]["labels"]
    (server,) = pod["containers"]
    assert server["command"][0] == "headrace"
    check_headrace_command(server["command"][1:])
    (port,) = [port["containerPort"] for port in server["ports"]]
    assert str(port) in server["command"]
    variables = {variable["name"]: variable for variable in server["env"]}
    secret = manifest("Secret")["stringData"]
    assert {v["valueFrom"]["secretKeyRef"]["key"] for v in variables.values() if "valueFrom" in v} <= set(secret)
    mounts = {mount["mountPath"]: mount["name"] for mount in server["volumeMounts"]}
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "emptyDir" not in v}
    claim = manifest("PersistentVolumeClaim", "serve.yaml")["metadata"]["name"]
    assert claims[mounts[variables["HEADRACE_FILES_DIR"]["value"]]] == claim
    for name, variable in variables.items():
        monkeypatch.setenv(name, variable.get("value") or "0123456789abcdef" * 2)
    monkeypatch.setenv("HEADRACE_REDIS_URL", secret["redis-url"])
    assert pod["terminationGracePeriodSeconds"] >= load_settings().soft_shutdown_s + MARGIN_S
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert manifest("Service", "serve.yaml")["spec"]["selector"].items() <= labels.items()
    assert server["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsNonRoot"] is True


def test_a_pod_has_time_to_finish_and_its_signal_a_limit() -> None:
    from celery.apps import worker

    spec, values = manifest("Deployment")["spec"]["template"]["spec"], environment_of("Deployment")
    assert spec["terminationGracePeriodSeconds"] >= float(values["HEADRACE_SOFT_SHUTDOWN_S"]) + MARGIN_S
    assert values["REMAP_SIGTERM"] == "SIGQUIT"
    assert hasattr(worker, "REMAP_SIGTERM")
    assert instruction("STOPSIGNAL") == "SIGTERM"
    assert "lifecycle" not in container("Deployment")


def test_labels_names_and_volumes_fit() -> None:
    for kind in ("Deployment", "StatefulSet"):
        spec = manifest(kind)["spec"]
        labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
        assert spec["selector"]["matchLabels"].items() <= labels.items()
        volumes = {v["name"] for v in pod.get("volumes", [])}
        volumes |= {v["metadata"]["name"] for v in spec.get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in container(kind)["volumeMounts"]} == volumes
    worker = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    for kind, file in (("PodDisruptionBudget", "worker.yaml"), ("PodMonitor", "podmonitor.yaml")):
        assert manifest(kind, file)["spec"]["selector"]["matchLabels"].items() <= worker.items()
    service, redis = manifest("Service"), manifest("StatefulSet")
    assert service["spec"]["selector"].items() <= redis["spec"]["template"]["metadata"]["labels"].items()
    assert redis["spec"]["serviceName"] == service["metadata"]["name"]


def test_nobody_is_root_and_nothing_is_writable_but_volumes() -> None:
    for kind in ("Deployment", "StatefulSet"):
        pod = manifest(kind)["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        own = container(kind)["securityContext"]
        assert own["readOnlyRootFilesystem"] is True
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
    user = manifest("Deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    home = next(rest for name, rest in instructions() if name == "RUN" and "useradd" in rest)
    assert f"--uid {user} headrace" in home
    mounts = {mount["mountPath"] for mount in container("Deployment")["volumeMounts"]}
    assert mounts == {"/tmp", "/home/headrace/.cache"}


def test_kubernetes_redis_keeps_what_it_is_given_and_asks_for_the_password() -> None:
    redis, secret = container("StatefulSet"), manifest("Secret")["stringData"]
    options = dict(zip(redis["command"][1::2], redis["command"][2::2], strict=True))
    kept = {"--appendonly": "yes", "--appendfsync": "everysec", "--maxmemory-policy": "noeviction"}
    assert kept.items() <= options.items()
    assert size(options["--maxmemory"]) <= size(redis["resources"]["limits"]["memory"]) / 2
    assert options["--requirepass"] == "$(REDISCLI_AUTH)"
    (mount,) = redis["volumeMounts"]
    assert mount["mountPath"] == "/data"
    host = manifest("Service")["metadata"]["name"]
    assert secret["redis-url"] == f"redis://:{secret['redis-password']}@{host}:6379/0"


def test_keda_scales_the_worker_by_twice_its_slots() -> None:
    scaled = manifest("ScaledObject", "keda.yaml")["spec"]
    assert scaled["scaleTargetRef"]["name"] == manifest("Deployment")["metadata"]["name"]
    (trigger,) = scaled["triggers"]
    assert trigger["type"] == "prometheus"
    assert trigger["metadata"]["threshold"] == str(2 * Settings().slots)
    assert f'model_name="{environment_of("Deployment")["HEADRACE_MODEL"]}"' in trigger["metadata"]["query"]
    assert scaled["minReplicaCount"] >= 1


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

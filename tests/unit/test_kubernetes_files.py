"""The Kubernetes manifests agree with commands, settings, probes and with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from headrace.config.settings import PREFIX, Settings, load_settings
from headrace.worker.observability.probes import Probes
from tests.deployment import KUBERNETES, MARGIN_S, check_headrace_command, instruction, instructions
from tests.patience import PATIENCE_S


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
    """A container's variables, including those of the Secret."""
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
    stub: Any = type("Loading", (), {"_health": None})()
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

"""Checkpoint 0: a worker starts, becomes ready and healthy, and takes a job; its probes report when it is not."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.error
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families as parse

from headrace.client import Client
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import attempts, paced, wait_until, worker_on
from tests.integration.servers import free_port
from tests.patience import PATIENCE_S

#: The second step of one job waits until a file exists, like a GPU that hangs for a while.
STUCK = """
import pathlib, time
from headrace.worker.engine.model_runner import ModelRunner
go = ModelRunner.run
def stuck(self, step):
    if any(s.prompt == [15496, 11] and len(s.output) == 1 for s in step.decodes):
        while not pathlib.Path("{release}").exists():
            time.sleep(0.05)
    return go(self, step)
ModelRunner.run = stuck
"""


class Probed:
    """Reads the probes and metrics of a worker."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> tuple[int, str]:
        """Status and text; the status is 0 while the port is closed."""
        try:
            with urllib.request.urlopen(self.base + path, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def samples(self) -> dict[str, float]:
        """The metrics by name, summed over their labels."""
        sums: dict[str, float] = {}
        for family in parse(self.get("/metrics")[1]):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
        return sums


def test_checkpoint_0_a_worker_starts_takes_a_job_and_says_when_it_is_unwell(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    probed = Probed(port := free_port())
    settings = {"HEADRACE_METRICS_PORT": str(port), "HEADRACE_STALL_S": "2", "HEADRACE_DRAFT_TOKENS": "0"}
    release = tmp_path / "go on"
    patch = paced(0.05) + STUCK.format(release=release)
    with worker_on(own_server, tmp_path / "worker.log", patch=patch, **settings) as worker:
        wait_until(lambda: probed.get("/livez")[0])
        assert probed.get("/livez") == (200, "ok\n")
        wait_until(lambda: probed.get("/readyz")[0] == 200)
        assert (
            own_client.submit("Hello.", max_tokens=10, temperature=0).result(PATIENCE_S).usage.completion_tokens == 10
        )
        own_client.submit([60000]).wait(PATIENCE_S)
        wait_until(lambda: probed.samples()["headrace_request_failure_total"] == 1)
        numbers = probed.samples()
        assert numbers["headrace_request_success_total"] == 1
        assert numbers["headrace_prompt_tokens_total"] == 2
        assert numbers["headrace_generation_tokens_total"] == 10
        assert numbers["headrace_request_generation_tokens_sum"] == 10
        assert numbers["headrace_ready"] == numbers["headrace_engine_info"] == 1

        assert own_server.pid is not None
        os.kill(own_server.pid, signal.SIGKILL)
        wait_until(lambda: probed.get("/readyz") == (503, "Redis does not take the worker's heartbeat\n"))
        assert probed.get("/livez") == (200, "ok\n")
        own_server.start()
        wait_until(lambda: probed.get("/readyz")[0] == 200)

        stuck = own_client.submit([15496, 11], max_tokens=3, ignore_eos=True)
        wait_until(lambda: probed.get("/livez")[0] == 503)
        status, text = probed.get("/readyz")
        assert status == 503
        assert re.fullmatch(r"the engine has been at one step for \d+ s\n", text)
        assert probed.samples()["headrace_last_step_age_seconds"] > 2
        release.touch()
        assert stuck.result(PATIENCE_S).usage.completion_tokens == 3
        wait_until(lambda: probed.get("/readyz") == probed.get("/livez") == (200, "ok\n"))

        jobs = own_client.submit_many(["The river"] * 8, max_tokens=30, ignore_eos=True)
        wait_until(lambda: probed.samples()["headrace_num_requests_running"] == 4)
        assert probed.samples()["headrace_num_requests_waiting"] == 4
        assert probed.samples()["headrace_leases"] == 1
        worker.signal(signal.SIGTERM)
        wait_until(lambda: probed.get("/readyz") == (503, "the worker is stopping\n"))
        assert probed.get("/livez") == (200, "ok\n"), "what runs is to be finished"
        assert worker.wait() == 0
        assert probed.get("/livez") == (0, "")
    assert [job.status() for job in jobs].count("succeeded") == 4


def test_sigterm_remapped_to_sigquit_finishes_what_it_may_and_hands_back_the_rest(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    """As in the Kubernetes manifests; REMAP_SIGTERM is a variable of Celery."""
    settings = {"REMAP_SIGTERM": "SIGQUIT", "HEADRACE_SOFT_SHUTDOWN_S": "300", "HEADRACE_DRAFT_TOKENS": "0"}
    with worker_on(own_server, tmp_path / "worker.log", patch=paced(0.05), **settings) as worker:
        worker.wait_ready()
        short = own_client.submit("Hello.", max_tokens=40, ignore_eos=True)
        long = own_client.submit("Hello.", max_tokens=900, ignore_eos=True)  # 45 s and more
        wait_until(lambda: short.status() == long.status() == "running")
        worker.signal(signal.SIGTERM)
        wait_until(lambda: short.status() == "succeeded")
        worker.signal(signal.SIGTERM)  # enough was waited for
        assert worker.wait() == 0
        assert worker.events("worker.stopped")[0]["returned"] == 1
    assert long.status() == "queued"
    assert attempts(own_client, long.id) == 0
    (message,) = connect(own_server.url).lrange(keys.queue_lists("demo")[1], 0, -1)  # type: ignore[misc]
    assert json.loads(message)["properties"]["delivery_info"]["redelivered"] is True, "by which metrics know it"

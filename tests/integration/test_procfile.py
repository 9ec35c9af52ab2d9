"""honcho starts and stops the processes of the Procfile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from headrace.client import Client
from headrace.worker.child_processes import die_with_parent
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import wait_until
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


def test_honcho_starts_a_worker_that_computes_a_job(
    own_server: EmbeddedRedis, own_client: Client, tmp_path: Path
) -> None:
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "HEADRACE_REDIS_URL": own_server.url,
        "HEADRACE_LOG_FORMAT": "json",
    }
    command = [str(binaries / "honcho"), "start", "-f", str(ROOT / "Procfile"), "-d", str(ROOT)]
    with (tmp_path / "honcho.log").open("wb") as log:
        process = subprocess.Popen(die_with_parent(command), env=environment, stdout=log, stderr=log)
    try:
        job = own_client.submit("Hello.", max_tokens=10, temperature=0)
        assert job.result(PATIENCE_S).usage.completion_tokens == 10
        wait_until(lambda: own_client.status().serves("demo"))
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        wait_until(lambda: own_client.status().workers == [])
        assert "worker.stopped" in (tmp_path / "honcho.log").read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(PATIENCE_S)

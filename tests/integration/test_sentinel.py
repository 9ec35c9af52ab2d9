"""A primary dies, a real Sentinel promotes its replica, and a worker and clients reconnect to it."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from headrace.client import AsyncClient, Client
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.redis_binary import find_server
from tests.integration.processes import WorkerProcess, paced, wait_until
from tests.integration.servers import free_port, redis_on_a_port
from tests.patience import PATIENCE_S


@contextlib.contextmanager
def sentinel_on_a_port(directory: Path, primary: int) -> Iterator[int]:
    """A single Sentinel that decides quickly."""
    port, config = free_port(), directory / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {directory}\n"
        f"sentinel monitor jobs 127.0.0.1 {primary} 1\n"
        "sentinel down-after-milliseconds jobs 500\n"
        "sentinel failover-timeout jobs 5000\n"
    )
    with (directory / "sentinel.log").open("wb") as out:
        process = subprocess.Popen([str(find_server()[0]), str(config), "--sentinel"], stdout=out, stderr=out)
    try:
        with redis.Redis(port=port, decode_responses=True) as sentinel:
            wait_until(lambda: _knows_a_replica(sentinel))
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def _knows_a_replica(sentinel: redis.Redis) -> bool:
    with contextlib.suppress(redis.RedisError):
        return int(sentinel.sentinel_master("jobs")["num-slaves"]) == 1
    return False


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("primary", "replica", "sentinel")}
    for directory in found.values():
        directory.mkdir()
    return found


def test_no_accepted_job_is_lost_when_a_replica_becomes_the_primary(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    aof = ("--appendonly", "yes", "--repl-diskless-sync-delay", "0")
    with (
        redis_on_a_port(directories["primary"], *aof) as primary,
        redis_on_a_port(directories["replica"], *aof, "--replicaof", "127.0.0.1", str(primary)) as replica,
        sentinel_on_a_port(directories["sentinel"], primary) as sentinel,
    ):
        url = f"sentinel://127.0.0.1:1,127.0.0.1:{sentinel}/0?master=jobs"  # the first one does not answer
        environment = {"HEADRACE_REDIS_URL": url, "HEADRACE_SLOTS": "2", "HEADRACE_DRAFT_TOKENS": "0"}
        worker = WorkerProcess(tmp_path / "worker.log", patch=paced(0.05), **environment, HEADRACE_LEASE_S="10")
        with worker, Client(redis_url=url) as client, connect(f"redis://127.0.0.1:{primary}") as first:
            worker.wait_ready()
            jobs = client.submit_many(["Hello."] * 3, max_tokens=40, temperature=0, ignore_eos=True)
            jobs += [client.submit("Hello.", max_tokens=20, temperature=0, ignore_eos=True) for _ in range(3)]
            wait_until(lambda: any(job.status() == "running" for job in jobs))
            assert first.wait(1, 5000) == 1, "the replica has what was accepted"
            with contextlib.suppress(redis.ConnectionError):
                first.execute_command("SHUTDOWN", "NOSAVE")
            with (
                connect(f"redis://127.0.0.1:{sentinel}") as decides,
                connect(f"redis://127.0.0.1:{replica}") as second,
            ):
                wait_until(lambda: decides.sentinel_master("jobs")["port"] == replica)
                assert {job.result(PATIENCE_S).usage.completion_tokens for job in jobs} == {40, 20}
                assert client.submit("Hello.", max_tokens=2).result(PATIENCE_S)
                wait_until(lambda: second.hlen(keys.unacked()) == 0)
            assert worker.alive
            assert len(worker.events("worker.ready")) == 1

            async def ask() -> int:
                async with AsyncClient(redis_url=url) as own:
                    job = await own.submit("Hello.", max_tokens=3, ignore_eos=True)
                    return (await job.result(timeout=PATIENCE_S)).usage.completion_tokens

            assert asyncio.run(ask()) == 3

"""The worker's Celery app: the supported pools, and their consumers."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from celery import signals
from celery.concurrency import get_implementation

from headrace.config import load_settings
from headrace.worker.celery import ENGINE_POOL, make_app
from headrace.worker.jobs.pool import EnginePool
from headrace.worker.queue.consumer import SafeConsumer
from headrace.worker.queue.engine_consumer import EngineConsumer, make_consumer


def start_with(pool: Any) -> None:
    """Send the signal that Celery sends before a worker starts. It returns although Redis does not answer."""
    settings = load_settings(redis_url="redis://localhost:1/0")
    worker = SimpleNamespace(app=SimpleNamespace(headrace_settings=settings))
    signals.celeryd_init.send(sender="worker@here", instance=worker, conf=None, options={"pool": pool})


@pytest.mark.parametrize("pool", ["celery.concurrency.gevent:TaskPool", "celery.concurrency.eventlet:TaskPool"])
def test_pools_of_greenlets_are_refused_with_one_sentence(pool: str) -> None:
    name = pool.partition(":")[0].rpartition(".")[2]
    with pytest.raises(SystemExit, match=rf"headrace: the pool '{name}' cannot run these tasks; start .* -P threads$"):
        start_with(pool)
    with pytest.raises(SystemExit, match=f"'{name}'"):
        start_with(name)


def test_the_pool_of_processes_is_refused_by_class_too() -> None:
    with pytest.raises(SystemExit, match="the pool 'prefork' cannot run these tasks"):
        start_with(get_implementation("prefork"))


@pytest.mark.parametrize("pool", [None, ENGINE_POOL, EnginePool, "solo", "threads"])
def test_other_pools_are_accepted(pool: Any) -> None:
    start_with(pool)  # it would raise SystemExit


def test_prefork_on_the_command_line_is_told_apart_from_celerys_default() -> None:
    command = [sys.executable, "-m", "celery", "-A", "headrace.worker", "worker", "-P", "prefork"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "the pool 'prefork' cannot run these tasks" in ended.stderr.splitlines()[-1]


def test_the_consumer_fits_the_pool() -> None:
    app = make_app(load_settings(redis_url="redis://localhost:1/0"))
    given: dict[str, Any] = {"app": app, "controller": SimpleNamespace(use_eventloop=False)}
    engine_pool, solo = EnginePool(limit=6, app=app), get_implementation("solo")(limit=1, app=app)
    assert type(make_consumer(lambda _: None, pool=engine_pool, **given)) is EngineConsumer
    assert type(make_consumer(lambda _: None, pool=solo, **given)) is SafeConsumer
    app.close()

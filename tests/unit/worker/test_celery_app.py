"""The worker's Celery app: the supported pools, and their consumers."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import structlog
from celery import Celery, signals
from celery.bin.worker import worker as worker_command
from celery.concurrency import get_implementation
from celery.concurrency.base import BasePool
from celery.exceptions import ImproperlyConfigured
from click.core import ParameterSource
from kombu import Queue

from headrace.client.wire.errors import JobFailed
from headrace.config import load_settings
from headrace.config.logging import setup_logging
from headrace.worker import celery, tasks
from headrace.worker.celery import make_app
from headrace.worker.jobs.pool import EnginePool
from headrace.worker.queue.consumer import SafeConsumer
from headrace.worker.queue.engine_consumer import EngineConsumer, make_consumer
from headrace.worker.queue.start_options import ENGINE_POOL


@pytest.fixture
def app() -> Iterator[Celery]:
    made = make_app(load_settings(redis_url="redis://localhost:1/0", model="demo,other=demo"))
    yield made
    made.close()


@pytest.fixture
def restored_logging() -> Iterator[None]:
    yield
    setup_logging(load_settings())


def start_with(app: Celery, pool: Any = None, **options: Any) -> None:
    """Send the signal that Celery sends before a worker starts. It returns although Redis does not answer."""
    worker = SimpleNamespace(app=app)
    options = {"pool": pool, **options}
    signals.celeryd_init.send(sender="worker@here", instance=worker, conf=app.conf, options=options)


@pytest.mark.parametrize("pool", ["celery.concurrency.gevent:TaskPool", "celery.concurrency.eventlet:TaskPool"])
def test_pools_of_greenlets_are_refused_with_one_sentence(app: Celery, pool: str) -> None:
    name = pool.partition(":")[0].rpartition(".")[2]
    with pytest.raises(SystemExit, match=rf"headrace: the pool '{name}' cannot run these tasks; start .* -P threads$"):
        start_with(app, pool)
    with pytest.raises(SystemExit, match=f"'{name}'"):
        start_with(app, name)


def test_the_pool_of_processes_is_refused_by_class_too(app: Celery) -> None:
    with pytest.raises(SystemExit, match="the pool 'prefork' cannot run these tasks"):
        start_with(app, get_implementation("prefork"))


@pytest.mark.parametrize("pool", ["processes", "my.pools:Pool", type("Pool", (BasePool,), {})])
def test_any_pool_that_is_not_known_to_work_is_refused(app: Celery, pool: Any) -> None:
    with pytest.raises(SystemExit, match="cannot run these tasks"):
        start_with(app, pool)


@pytest.mark.parametrize("pool", [None, ENGINE_POOL, EnginePool, "solo", "threads"])
def test_other_pools_are_accepted(app: Celery, pool: Any) -> None:
    start_with(app, pool)  # it would raise SystemExit


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"autoscale": (3, 1)}, ["--autoscale", "HEADRACE_SLOTS"]),
        ({"max_tasks_per_child": 10}, ["--max-tasks-per-child", "no child processes"]),
        ({"max_memory_per_child": 10}, ["--max-memory-per-child", "HEADRACE_KV_CACHE_BYTES"]),
        ({"pool_start_method": "spawn"}, ["--pool-start-method"]),
        ({"time_limit": 5.0}, ["--time-limit", "timeout_s"]),
        ({"soft_time_limit": 5.0}, ["--soft-time-limit", "timeout_s"]),
        ({"beat": True}, ["-B", "celery beat"]),
        ({"scheduler": "x:Y"}, ["--scheduler", "celery beat"]),
        ({"schedule_filename": "mine"}, ["--schedule", "celery beat"]),
        ({"purge": True}, ["--purge", "cancel"]),
        ({"concurrency": "auto"}, ["-c auto", "HEADRACE_SLOTS"]),
        ({"prefetch_multiplier": 4}, ["--prefetch-multiplier", "-c"]),
        ({"queues": ["headrace.demo", "headrace.third"]}, ["-Q", "'headrace.third'", "HEADRACE_MODEL"]),
        ({"queues": "headrace.demo,celery"}, ["-Q", "'celery'", "headrace.demo, headrace.other", "your own"]),
        ({"queues": ["other"]}, ["-Q", "did you mean 'headrace.other'"]),
        ({"queues": ["headrace:headrace.demo"]}, ["-Q", "without 'headrace:'"]),
        ({"queues": [""]}, ["-Q", "''"]),
        ({"queues": ["headrace."]}, ["-Q", "'headrace.'"]),
        ({"queues": ["headrace.demo\x06\x163"]}, ["-Q"]),
        ({"exclude_queues": ["headrace.third"]}, ["-X", "'headrace.third'"]),
        ({"exclude_queues": ["headrace.demo", "headrace.other"]}, ["-X", "no queue is left"]),
        ({"queues": ["headrace.demo"], "exclude_queues": ["headrace.demo"]}, ["-X", "no queue is left"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("pool", [None, "threads", "solo"])
def test_an_option_that_a_worker_cannot_honour_is_refused_by_name(
    app: Celery, pool: str | None, options: dict[str, Any], words: list[str]
) -> None:
    if pool and set(options) & {"concurrency", "prefetch_multiplier"}:
        options = {"purge": True}  # Celery's own pools honour these
        words = ["--purge"]
    with pytest.raises(SystemExit) as refused:
        start_with(app, **{"pool": pool, **options})
    assert str(refused.value).startswith("headrace: ")
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    "options",
    [
        {"autoscale": None, "time_limit": None, "beat": False, "purge": False, "max_tasks_per_child": 0},
        {"concurrency": 4, "prefetch_multiplier": 1, "optimization": "fair", "without_gossip": True},
        {"queues": ["headrace.demo"]},
        {"queues": "headrace.other, headrace.demo"},
        {"queues": None, "exclude_queues": ["headrace.demo"]},
        {"pool": "solo", "concurrency": 4},
        {"pool": "threads", "concurrency": "auto", "prefetch_multiplier": 4},
    ],
    ids=str,
)
def test_options_that_are_honoured_or_ask_for_nothing_are_accepted(app: Celery, options: dict[str, Any]) -> None:
    start_with(app, **options)


def test_a_worker_of_another_app_in_this_process_is_left_alone() -> None:
    mine = Celery("mine", set_as_current=False)
    celery._check_start(instance=SimpleNamespace(app=mine), options={"pool": "prefork", "purge": True})


def test_no_way_leads_the_app_to_consume_a_queue_of_another_model(app: Celery) -> None:
    queues = app.amqp.queues
    for consume in (queues.select, queues.select_add):
        for name in ("headrace.third", "celery", "demo"):
            with pytest.raises(ImproperlyConfigured, match="is not a queue of this worker"):
                consume(name)
    assert sorted(queues.consume_from) == ["headrace.demo", "headrace.other"]
    assert queues["mine"].name == "mine", "the callback of a chord may be sent anywhere"
    assert sorted(queues.consume_from) == ["headrace.demo", "headrace.other"]
    app.conf.task_queues = [Queue("headrace.third")]
    with pytest.raises(ImproperlyConfigured, match=r"headrace\.third"):
        app.amqp.Queues(app.conf.task_queues)


def test_the_level_and_file_of_the_log_can_be_given_as_celery_takes_them(
    app: Celery, tmp_path: Path, restored_logging: None
) -> None:
    with click.Context(worker_command) as context:
        context.params["loglevel"] = logging.DEBUG
        context.set_parameter_source("loglevel", ParameterSource.COMMANDLINE)
        start_with(app, logfile=str(tmp_path / "%n.log"))
        structlog.get_logger("headrace.worker").debug("first.line")
        context.set_parameter_source("loglevel", ParameterSource.DEFAULT)
        start_with(app, logfile=str(tmp_path / "%n.log"))
        structlog.get_logger("headrace.worker").debug("second.line")
    text = (tmp_path / "worker.log").read_text()
    assert "first.line" in text
    assert "second.line" not in text


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


@pytest.mark.parametrize("queue", ["headrace.third", "mine", Queue("headrace.third")], ids=str)
def test_a_task_that_runs_eagerly_is_not_computed_for_a_model_that_is_not_here(app: Celery, queue: Any) -> None:
    app.conf.update(task_always_eager=True, task_eager_propagates=True)
    with pytest.raises(JobFailed, match=r"expected one that this worker serves: 'demo', 'other'"):
        app.tasks["headrace.generate"].apply_async([{"prompt": "x"}], queue=queue)


def test_a_task_is_computed_by_the_model_of_its_queue_whoever_calls_it(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`celery.map` calls the task directly, and an eager task has no message."""
    service = SimpleNamespace(generate=lambda _, request, model: {"prompt": request, "model": model})
    monkeypatch.setattr(tasks, "service_for", lambda _: service)
    generate = app.tasks["headrace.generate"]
    for options in ({"queue": "headrace.other"}, {"routing_key": "headrace.other"}):
        assert generate.apply(["x"], **options).get() == {"prompt": "x", "model": "other"}
        calls = app.tasks["celery.map"].apply([app.signature("headrace.generate"), ["x"]], **options)
        assert calls.get()[0]["model"] == ("other" if "routing_key" in options else None)
    assert generate.apply(["x"]).get()["model"] is None

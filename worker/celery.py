"""The Celery app: `celery -A worker worker` finds `app` here."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import time
from typing import Any

import click
import redis
import structlog
from celery import Celery, signals
from celery.platforms import EX_FAILURE
from celery.utils.log import mlevel
from celery.utils.nodenames import node_format

from headrace.client.wire import keys
from headrace.client.wire.celery import broker_settings, celery_url, queue, sentinel_options
from headrace.client.wire.embedded_redis import SCHEME as EMBEDDED
from headrace.client.wire.embedded_redis import current_url
from headrace.client.wire.errors import RedisUnreachable, RedisUnsuitable
from headrace.client.wire.redis import answers, check_access, connect, has_keepalive, resolve_url
from headrace.config import Settings, SettingsError, load_settings
from headrace.config.logging import setup_logging
from headrace.config.settings import redact_url
from headrace.worker.queue.permissions import MissingPermissions, check_permissions
from headrace.worker.queue.server_check import check_server
from headrace.worker.queue.start_options import ENGINE_POOL, check_options, is_explicit
from headrace.worker.redis_server import AlreadyRunning, EmbeddedRedis, EmbeddedRedisError
from headrace.worker.tasks import add_tasks

log = structlog.get_logger("headrace.worker")

#: Seconds to wait for the embedded Redis server that another process is starting.
OTHERS_START_S = 60.0


def make_app(settings: Settings) -> Celery:
    """Create a Celery app whose worker serves the models of the settings. Nothing is connected or loaded yet."""
    app = Celery(
        "headrace",
        set_as_current=False,
        amqp="headrace.worker.queue.served:AMQP",
        control="headrace.worker.queue.remote_control:Control",
    )
    app.headrace_settings = settings  # the queues, the pool and the command line read it from here
    app.loader.override_backends = dict.fromkeys(("redis", "rediss"), "headrace.worker.queue.backend:ResultBackend")
    app.loader.override_backends["sentinel"] = "headrace.worker.queue.backend:SentinelResultBackend"
    app.loader.override_backends[EMBEDDED] = "headrace.worker.queue.backend:EmbeddedResultBackend"
    app.conf.update(worker_settings(settings))
    url = resolve_url(settings)
    app.conf.update(broker_settings(settings, url))
    app.conf.update(
        result_backend=celery_url(url),
        redis_socket_keepalive=has_keepalive(url),
        redis_backend_use_ssl=app.conf.broker_use_ssl,
        task_queues=[queue(name) for name in settings.models],
        task_default_queue=keys.queue(settings.model_name),
    )
    add_tasks(app, settings)
    return app


def worker_settings(settings: Settings) -> dict[str, Any]:
    """Celery's settings for the worker, beside those of the broker."""
    return {
        "worker_pool": ENGINE_POOL,
        "worker_consumer": "headrace.worker.queue.engine_consumer:make_consumer",
        # The number of jobs that a worker holds: for each model enough to refill a slot at once, and few enough that
        # other workers get some.
        "worker_concurrency": (settings.slots + max(2, settings.slots // 4)) * len(settings.models),
        "worker_prefetch_multiplier": 1,
        "task_acks_late": True,
        "task_acks_on_failure": True,
        "task_acks_on_timeout": True,
        "task_track_started": False,  # the job's record has the state
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_channel_error_retry": True,  # a full Redis is treated like an unreachable one
        "result_backend_transport_options": {
            "global_keyprefix": keys.PREFIX,
            **sentinel_options(resolve_url(settings)),
            "visibility_timeout": settings.lease_s,
            "retry_policy": {"max_retries": 3, "interval_start": 0.1, "interval_step": 0.2, "interval_max": 1},
        },
        # A computed result must not be dropped because Redis is unreachable: retry for ever.
        "result_backend_always_retry": True,
        "result_backend_max_sleep_between_retries_ms": 2000,
        "result_backend_thread_safe": True,
        "redis_socket_timeout": 30,
        "redis_socket_connect_timeout": 5,
        "redis_backend_health_check_interval": 25,
        "result_expires": settings.result_ttl_s,
        "result_extended": False,  # it would store the arguments, which are prompts
        "worker_soft_shutdown_timeout": settings.soft_shutdown_s,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
    }


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _check_start(instance: Any, options: Any, **_: Any) -> None:
    """Refuse options that a worker cannot honour, before Redis is looked for and a model is loaded."""
    if getattr(instance.app, "headrace_settings", None) is None:
        return  # a worker of another app in this process
    try:
        check_options(options, instance.app)
    except ValueError as error:
        raise SystemExit(f"headrace: {error}") from None
    if options.get("no_color"):
        os.environ["NO_COLOR"] = "1"
    # Nothing that a start creates is garbage, and looking for it takes a fifth of the time until the worker is ready.
    gc.disable()


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _find_redis(sender: str, instance: Any, options: Any, **_: Any) -> None:
    """Start an embedded Redis server if none is configured and none runs here, so that the worker needs no flags."""
    settings: Settings = getattr(instance.app, "headrace_settings", None) or load_settings()
    # Celery does this later; until then structlog would write to standard output.
    logfile = options.get("logfile")
    _configure_logging(logfile=node_format(logfile, sender) if logfile else None)
    try:
        if settings.redis_url is None:
            start_redis_if_none(settings)
        else:
            check_access(settings.redis_url)  # Celery would retry a wrong password or certificate for ever
            with contextlib.suppress(redis.RedisError), connect(settings.redis_url) as connection:
                check_permissions(connection, settings.models)
        check_server(settings)
    except (RedisUnreachable, RedisUnsuitable, MissingPermissions) as error:
        raise SystemExit(f"headrace: {error}") from None


def start_redis_if_none(settings: Settings) -> None:
    """Start an embedded server that ends with this process, unless a Redis answers where the settings look for one."""
    url = resolve_url(settings)
    tried = current_url(url)
    try:
        server = _start_embedded(url)
    except EmbeddedRedisError as error:
        raise SystemExit(f"headrace: no Redis at {tried}, and no embedded one can run: {error}") from None
    if server is not None:
        atexit.register(server.stop)
        hint = "set HEADRACE_REDIS_URL to use your own Redis"
        log.warning("redis.embedded", tried=tried, url=server.url, hint=hint)


def _start_embedded(url: str) -> EmbeddedRedis | None:
    """Return the server that was started, or None if a Redis answers, possibly one that another process has started."""
    deadline = time.monotonic() + OTHERS_START_S
    while not answers(url):
        try:
            return EmbeddedRedis().start()
        except AlreadyRunning:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    return None


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _set_exit_code(sender: Any, **_: Any) -> None:
    """If the engine died, end with an exit code other than 0, so that a supervisor restarts the worker."""
    if getattr(sender.pool, "failed", False):
        sender.exitcode = EX_FAILURE


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _log_ready(sender: Any, **_: Any) -> None:
    """The models are loaded and the queues are being read: a job would be served now."""
    gc.freeze()  # no later collection has to look at the objects of the libraries, which stay
    gc.enable()
    queues = [queue.name for queue in sender.app.amqp.queues.consume_from.values()]
    settings: Settings | None = getattr(sender.app, "headrace_settings", None)
    url = redact_url(current_url(resolve_url(settings))) if settings else ""
    log.info("worker.ready", queues=queues, url=url)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _configure_logging(logfile: str | None = None, loglevel: int | None = None, **_: Any) -> None:
    """Set up logging with HEADRACE_LOG_LEVEL, or with `-l` if the user gave it, to standard error or `--logfile`."""
    settings = load_settings()
    if is_explicit("loglevel"):
        given = loglevel or click.get_current_context().params["loglevel"]
        level = logging.getLevelName(min(mlevel(given), logging.ERROR)).lower()
        settings = settings.model_copy(update={"log_level": level})
    setup_logging(settings, logfile)


try:
    app = make_app(load_settings())
except SettingsError as error:
    raise SystemExit(f"headrace: {error}") from None

"""The Celery side of the wire: task names, headers, and the settings that client and worker must share."""

from __future__ import annotations

import contextlib
import functools
import ssl
import time
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import redis
from celery import Celery
from kombu.entity import Queue
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.client.wire import keys
from headrace.client.wire.embedded_redis import SCHEME as EMBEDDED
from headrace.client.wire.embedded_redis import kombu_url
from headrace.client.wire.job_index import JobIndex
from headrace.client.wire.redis import CONNECT_TIMEOUT_S, SENTINEL_OPTIONS, SOCKET_TIMEOUT_S, connect, has_keepalive
from headrace.config import Settings
from headrace.config.sentinel import is_sentinel, parse_sentinel

TASK_NAME = "headrace.generate"
#: The task for several jobs. Its argument is a list of {"id": job id, "request": the argument of TASK_NAME}.
GROUP_TASK_NAME = "headrace.generate_many"
#: Header of a message with several jobs: how many.
JOBS_HEADER = "jobs"


def celery_url(url: str) -> str:
    """The URL in the form of kombu and Celery."""
    if is_sentinel(url):
        return parse_sentinel(url).for_celery()
    return kombu_url(url)  # `embedded://` as it is: EmbeddedTransport and EmbeddedBackend understand it


def sentinel_options(url: str) -> dict[str, Any]:
    """The options that Celery's transports need beside the URL of a Redis with Sentinels; empty for any other."""
    if not is_sentinel(url):
        return {}
    options = {**SENTINEL_OPTIONS, "retry": Retry(NoBackoff(), 0)}
    return {"master_name": parse_sentinel(url).master, "sentinel_kwargs": options}


def broker_settings(settings: Settings, url: str) -> dict[str, Any]:
    """Celery's settings for the broker. kombu applies the shortest lease of all processes, so they must agree."""
    return {
        "broker_url": celery_url(url),
        # Without this, kombu does not check certificates. The query of the URL (ssl_ca_certs and so on) means the same
        # to kombu, Celery's result backend and redis-py; without it, the system's authorities are trusted.
        "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED} if urlsplit(url).scheme == "rediss" else None,
        "broker_transport_options": {
            "global_keyprefix": keys.PREFIX,
            "visibility_timeout": settings.lease_s,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_keepalive": has_keepalive(url),
            "health_check_interval": 25,
            **sentinel_options(url),
        },
        "visibility_timeout": settings.lease_s,
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "accept_content": ["json"],  # remote control uses this and task_serializer
        "result_accept_content": ["json"],
        "broker_connection_timeout": CONNECT_TIMEOUT_S,
    }


def queue(model_name: str) -> Queue:
    """The Celery queue of a model."""
    name = keys.queue(model_name)
    return Queue(name, routing_key=name)  # type: ignore[no-untyped-call]


def results_app(settings: Settings, url: str) -> Celery:
    """A Celery app that publishes tasks and reads results: for canvases, and for a user's own tasks and worker."""
    app = ResultsApp("headrace-results", set_as_current=False)
    app.redis_url = url
    app.loader.override_backends = {EMBEDDED: "headrace.client.wire.embedded_redis:EmbeddedBackend"}
    app.conf.update(
        **broker_settings(settings, url),
        result_backend=celery_url(url),
        result_backend_transport_options={"global_keyprefix": keys.PREFIX, **sentinel_options(url)},
        redis_backend_use_ssl=app.conf.broker_use_ssl,
        redis_socket_keepalive=has_keepalive(url),
        result_expires=settings.result_ttl_s,
    )
    return app


class ResultsApp(Celery):  # type: ignore[misc]
    """A Celery app that writes the record of each job that it sends, so that a client finds the job before a worker.

    The record says until when the job waits, if it was sent with an ETA or a countdown.
    """

    redis_url: str

    def send_task(self, name: str, *args: Any, **options: Any) -> Any:
        """Called by signatures, groups, chords and chains; see `celery.Celery.send_task`."""
        job_id, queue_name = options.get("task_id"), options.get("queue")
        if name == TASK_NAME and isinstance(job_id, str) and isinstance(queue_name, str):
            with contextlib.suppress(redis.RedisError):  # sending the message reports the error
                self._write_record(job_id, keys.model_of(queue_name), options.get("countdown"), options.get("eta"))
        return super().send_task(name, *args, **options)

    @functools.cached_property
    def _redis(self) -> redis.Redis:
        return connect(self.redis_url)

    @functools.cached_property
    def _index(self) -> JobIndex:
        return JobIndex()

    def close(self) -> None:
        """Close the connections."""
        if "_redis" in vars(self):
            self._redis.close()
        super().close()

    def _write_record(self, job_id: str, model: str, countdown: Any, eta: Any) -> None:
        if self._redis.exists(keys.result(job_id)):
            return  # it was sent before and has ended: its record must not outlive its result
        now = time.time()
        until = now + countdown if isinstance(countdown, (int, float)) else None
        if until is None and isinstance(eta, datetime):
            until = (eta if eta.tzinfo is not None else eta.replace(tzinfo=self.timezone)).timestamp()
        pipe = self._redis.pipeline()
        pipe.hsetnx(keys.job(job_id), "state", "queued")
        pipe.hsetnx(keys.job(job_id), "model", model)
        pipe.hsetnx(keys.job(job_id), "submitted_at", f"{now:.6f}")
        pipe.hset(keys.job(job_id), keys.CANVAS, "1")
        if until is not None:
            pipe.hset(keys.job(job_id), keys.WAITS_UNTIL, f"{until:.6f}")
        pipe.expire(keys.job(job_id), keys.UNFINISHED_TTL_S)
        pipe.execute()
        self._index.add(pipe, model, [job_id], now)
        pipe.execute()


def producer_app(settings: Settings, url: str) -> Celery:
    """A Celery app that only publishes. It has no result backend, which would open a pub/sub channel for each job."""
    app = Celery("headrace-client", set_as_current=False)
    app.conf.update(
        **broker_settings(settings, url),
        result_backend="disabled",
        task_queues=[queue(settings.model_name)],
        task_default_queue=keys.queue(settings.model_name),
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0.1, "interval_step": 0.2, "interval_max": 0.5},
    )
    return app

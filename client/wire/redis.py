"""How Redis is reached: which URL, and the settings that client and worker must share to understand each other."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.sentinel
from celery import Celery
from kombu.entity import Queue
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.client.wire import keys
from headrace.client.wire.embedded_redis import SCHEME as EMBEDDED
from headrace.client.wire.embedded_redis import (
    AsyncEmbeddedConnection,
    EmbeddedConnection,
    current_url,
    directory_of,
    embedded_url,
    is_embedded,
)
from headrace.client.wire.errors import NO_TLS, TLS, RedisUnreachable, connection_advice
from headrace.config.directories import redis_dir
from headrace.config.sentinel import is_sentinel, parse_sentinel
from headrace.config.settings import Settings, redact_url

#: Seconds after which a silent connection is given up; None would wait on a dead one for ever. It must exceed the one
#: second for which kombu's BRPOP waits.
SOCKET_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 5
#: How long a server is asked whether it speaks TLS.
PROBE_S = 2
_WAYS: dict[str, Any] = {
    # Bytes that are no UTF-8, in records of a stranger's, come as lone surrogates: whoever reads them refuses those.
    "encoding_errors": "surrogateescape",
    "socket_timeout": SOCKET_TIMEOUT_S,
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "health_check_interval": 25,
}
_SENTINEL_WAYS: dict[str, Any] = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}


def resolve_url(settings: Settings) -> str:
    """The Redis that the settings mean, for `connect` and the like.

    Without `redis_url` this is an internal URL that stays the same while the embedded server starts, stops and moves;
    `current_url` tells where it is now.
    """
    return settings.redis_url or embedded_url(redis_dir())


def celery_url(url: str) -> str:
    """The same Redis as kombu writes it: unix sockets are `redis+socket://` with the database as `virtual_host`."""
    if is_sentinel(url):
        return parse_sentinel(url).for_celery()
    parts = urlsplit(url)
    if parts.scheme != "unix":  # `embedded://` too, which our transport and backend understand
        return url
    database = parse_qs(parts.query).get("db", ["0"])[0]
    return f"redis+socket://{parts.path}?virtual_host={database}"


def connect(url: str, *, text: bool = True) -> redis.Redis:
    """A redis-py client that gives up on a silent server; it answers in `text` or bytes. Nothing is sent yet."""
    if is_sentinel(url):
        return cast("redis.Redis", _primary(url, redis.sentinel.Sentinel, redis.Redis, text, Retry(NoBackoff(), 0)))
    if is_embedded(url):
        pool = redis.ConnectionPool(
            connection_class=EmbeddedConnection, directory=directory_of(url), decode_responses=text, **_WAYS
        )
        return redis.Redis.from_pool(pool)
    connection: redis.Redis = redis.Redis.from_url(url, decode_responses=text, **_WAYS)
    return connection


def connect_async(url: str) -> redis.asyncio.Redis:
    """The same for asyncio, answering in text."""
    if is_sentinel(url):
        once = redis.asyncio.retry.Retry(NoBackoff(), 0)
        found = _primary(url, redis.asyncio.sentinel.Sentinel, _ByAsyncSentinel, True, once)
        return cast("redis.asyncio.Redis", found)
    if is_embedded(url):
        pool = redis.asyncio.ConnectionPool(
            connection_class=AsyncEmbeddedConnection, directory=directory_of(url), decode_responses=True, **_WAYS
        )
        return redis.asyncio.Redis.from_pool(pool)
    connection: redis.asyncio.Redis = redis.asyncio.Redis.from_url(url, decode_responses=True, **_WAYS)
    return connection


def _primary(url: str, sentinel: Any, client: Any, text: bool, once: Any) -> Any:
    """A client of the Redis that Sentinels name. One that is away is asked `once`: the next one knows as much."""
    address = parse_sentinel(url)
    asked = sentinel(list(address.hosts), sentinel_kwargs={**_SENTINEL_WAYS, "retry": once})
    login = {**address.login, "db": address.database}
    return asked.master_for(address.master, redis_class=client, decode_responses=text, **login, **_WAYS)


class _ByAsyncSentinel(redis.asyncio.Redis):
    """redis-py leaves the connections to the Sentinels open."""

    async def aclose(self, *args: Any, **kwargs: Any) -> None:
        await super().aclose(*args, **kwargs)
        pool: Any = self.connection_pool
        for asked in pool.sentinel_manager.sentinels:
            await asked.aclose()


def has_keepalive(url: str) -> bool:
    """Whether TCP may carry the connection. redis-py's class for unix sockets knows no such option."""
    return urlsplit(url).scheme != "unix"


def sentinel_options(url: str) -> dict[str, Any]:
    """What Celery's transports must know beside the URL; nothing unless Sentinels stand in it."""
    if not is_sentinel(url):
        return {}
    ways = {**_SENTINEL_WAYS, "retry": Retry(NoBackoff(), 0)}
    return {"master_name": parse_sentinel(url).master, "sentinel_kwargs": ways}


def explain(url: str, error: BaseException) -> str:
    """What a failed connection says, and whether the server speaks TLS where the URL has none, or the other way round.

    Each then waits for the other, or hangs up, and the error alone does not tell why. It takes `PROBE_S` at most.
    """
    reason, parts = str(error) or type(error).__name__, urlsplit(current_url(url))
    signs = {"rediss": ("timeout",), "redis": ("reset", "closed", "protocol error")}.get(parts.scheme, ())
    if not any(sign in reason.lower() for sign in signs):
        return reason
    with contextlib.suppress(OSError):
        address = (parts.hostname or "localhost", parts.port or 6379)
        with socket.create_connection(address, timeout=PROBE_S) as probe:
            if parts.scheme == "rediss" and _answers_in_plain(probe):
                return f"{reason}: {NO_TLS}"
            if parts.scheme == "redis" and _answers_in_tls(probe):
                return f"{reason}: {TLS}"
    return reason


def _answers_in_plain(probe: socket.socket) -> bool:
    probe.sendall(b"PING\r\n")
    return probe.recv(1) in (b"+", b"-")


def _answers_in_tls(probe: socket.socket) -> bool:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent over it
    try:
        context.wrap_socket(probe).close()
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    return True


def check_access(url: str) -> None:
    """Connect once, and see whether certificates, user and password are right. Whether Redis runs does not matter.

    Raises:
        RedisUnreachable: they are not, and trying again will not help.
    """
    try:
        with connect(url) if is_sentinel(url) else _impatient(url) as connection:
            connection.ping()
    except (redis.ConnectionError, redis.TimeoutError) as error:
        reason = explain(url, error)
        if connection_advice(reason) is not None:
            raise RedisUnreachable(redact_url(url), reason) from error
    except redis.RedisError:
        pass  # it answers; a server that is loading, say


def answers(url: str) -> bool:
    """Ask once whether a Redis answers. One that is reading back its data does, one that wants a login does not."""
    try:
        with _impatient(url) as connection:
            connection.ping()
    except redis.BusyLoadingError:
        return True
    except (redis.ConnectionError, redis.TimeoutError):
        return False
    except redis.RedisError:
        return True
    return True


def _impatient(url: str) -> redis.Redis:
    ways: dict[str, Any] = {"socket_timeout": CONNECT_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
    ways["retry"] = Retry(NoBackoff(), 0)
    if is_embedded(url):
        pool = redis.ConnectionPool(connection_class=EmbeddedConnection, directory=directory_of(url), **ways)
        return redis.Redis.from_pool(pool)
    connection: redis.Redis = redis.Redis.from_url(url, **ways)
    return connection


def broker_settings(settings: Settings, url: str) -> dict[str, Any]:
    """Celery's settings for the broker, the same in client and worker: the shortest lease among them wins."""
    return {
        "broker_url": celery_url(url),
        "broker_transport": "headrace.client.wire.embedded_redis:EmbeddedTransport" if is_embedded(url) else None,
        # kombu checks no certificate unless this is said. What the URL's query says (ssl_ca_certs and so on) means the
        # same to kombu, Celery's result backend and redis-py; without it the system's authorities are trusted.
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
        "accept_content": ["json"],  # remote control goes by this and by task_serializer
        "result_accept_content": ["json"],
        "broker_connection_timeout": CONNECT_TIMEOUT_S,
    }


def queue(model_name: str) -> Queue:
    """The Celery queue of a model."""
    name = keys.queue(model_name)
    return Queue(name, routing_key=name)  # type: ignore[no-untyped-call]


def results_app(settings: Settings, url: str) -> Celery:
    """A Celery app that publishes and reads results: for canvases, and for a user's own tasks and worker."""
    app = Celery("headrace-results", set_as_current=False)
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


def producer_app(settings: Settings, url: str) -> Celery:
    """A Celery app that only publishes. Without a result backend it opens no pub/sub channel for every job."""
    app = Celery("headrace-client", set_as_current=False)
    app.conf.update(
        **broker_settings(settings, url),
        result_backend="disabled",
        task_queues=[queue(settings.model_name)],
        task_default_queue=keys.queue(settings.model_name),
        task_publish_retry_policy={"max_retries": 3, "interval_start": 0.1, "interval_step": 0.2, "interval_max": 0.5},
    )
    return app

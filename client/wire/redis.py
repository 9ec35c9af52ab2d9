"""Connections to Redis: which URL, with which timeouts, and what a failed connection means.

`client.wire.celery` has the settings of Celery's own connections.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import urlsplit

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.sentinel
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.client.wire.connection_advice import NO_DESCRIPTORS, NO_TLS, TLS, connection_advice
from headrace.client.wire.embedded_redis import (
    AsyncEmbeddedConnection,
    EmbeddedConnection,
    current_url,
    directory_of,
    embedded_url,
    is_embedded,
)
from headrace.client.wire.errors import RedisRefused, RedisUnreachable
from headrace.client.wire.start_advice import start_redis, start_redis_here
from headrace.config.directories import redis_dir
from headrace.config.sentinel import is_sentinel, parse_sentinel
from headrace.config.settings import Settings, redact_url

#: Seconds after which a connection without an answer fails. It must be more than the one second for which kombu's BRPOP
#: waits; None would wait without limit on a dead connection.
SOCKET_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 5
#: Timeout in seconds of the check whether a server uses TLS.
PROBE_S = 2
_OPTIONS: dict[str, Any] = {
    # Other programs may write bytes that are not UTF-8. They become lone surrogates, which readers reject.
    "encoding_errors": "surrogateescape",
    "socket_timeout": SOCKET_TIMEOUT_S,
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "health_check_interval": 25,
}
SENTINEL_OPTIONS: dict[str, Any] = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}


def resolve_url(settings: Settings) -> str:
    """The URL of the configured Redis, for `connect` and the other functions of this module.

    Without `redis_url` this is an internal URL, which stays the same while the embedded server starts, stops and moves.
    `current_url` returns where the server is now.
    """
    return settings.redis_url or embedded_url(redis_dir())


def connect(url: str, *, text: bool = True) -> redis.Redis:
    """A redis-py client with timeouts; it returns `text` or else bytes. Sends nothing yet."""
    if is_sentinel(url):
        return cast("redis.Redis", _primary(url, redis.sentinel.Sentinel, redis.Redis, text, Retry(NoBackoff(), 0)))
    if is_embedded(url):
        pool = redis.ConnectionPool(
            connection_class=EmbeddedConnection, directory=directory_of(url), decode_responses=text, **_OPTIONS
        )
        return redis.Redis.from_pool(pool)
    connection: redis.Redis = redis.Redis.from_url(url, decode_responses=text, **_OPTIONS)
    return connection


def connect_async(url: str) -> redis.asyncio.Redis:
    """A redis-py client for asyncio with timeouts; it returns text. Sends nothing yet."""
    if is_sentinel(url):
        once = redis.asyncio.retry.Retry(NoBackoff(), 0)
        found = _primary(url, redis.asyncio.sentinel.Sentinel, _AsyncSentinelRedis, True, once)
        return cast("redis.asyncio.Redis", found)
    if is_embedded(url):
        pool = redis.asyncio.ConnectionPool(
            connection_class=AsyncEmbeddedConnection, directory=directory_of(url), decode_responses=True, **_OPTIONS
        )
        return redis.asyncio.Redis.from_pool(pool)
    connection: redis.asyncio.Redis = redis.asyncio.Redis.from_url(url, decode_responses=True, **_OPTIONS)
    return connection


def _primary(url: str, sentinel: Any, client: Any, text: bool, once: Any) -> Any:
    """A client of the primary that the Sentinels name. No Sentinel is retried: all have the same data."""
    address = parse_sentinel(url)
    sentinels = sentinel(list(address.hosts), sentinel_kwargs={**SENTINEL_OPTIONS, "retry": once})
    login = {**address.login, "db": address.database}
    return sentinels.master_for(address.master, redis_class=client, decode_responses=text, **login, **_OPTIONS)


class _AsyncSentinelRedis(redis.asyncio.Redis):
    """Closes the connections to the Sentinels too, which redis-py leaves open."""

    async def aclose(self, *args: Any, **kwargs: Any) -> None:
        await super().aclose(*args, **kwargs)
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def has_keepalive(url: str) -> bool:
    """Whether the connection may use TCP. redis-py's class for unix sockets has no option for TCP keepalive."""
    return urlsplit(url).scheme != "unix"


def explain(url: str, error: BaseException) -> str:
    """The reason of a failed connection, including a mismatch of TLS between the server and the URL.

    With such a mismatch both sides wait for each other, or one closes the connection, and the error does not name the
    cause. Takes at most PROBE_S seconds.
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
    context.verify_mode = ssl.CERT_NONE  # no data is sent
    try:
        context.wrap_socket(probe).close()
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    return True


@contextlib.contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Raise errors of Redis connections, whichever library they come from, as RedisUnreachable or RedisRefused."""
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError, OperationalError, ConnectionError) as error:
        if isinstance(error, RedisUnreachable):
            raise
        shown = redact_url(current_url(url))
        if isinstance(error.__cause__, redis.ResponseError):  # kombu's error for a message that Redis refused
            raise RedisRefused(shown, str(error)) from error
        raise RedisUnreachable(shown, explain(url, error), start_redis(url), start_redis_here(url)) from error
    except redis.RedisError as error:
        raise RedisRefused(redact_url(current_url(url)), str(error)) from error
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise RedisUnreachable(redact_url(url), NO_DESCRIPTORS) from error


def check_access(url: str) -> None:
    """Connect once to check certificates, user and password. Redis need not be running.

    Raises:
        RedisUnreachable: they are wrong, so that trying again does not help.
    """
    try:
        with connect(url) if is_sentinel(url) else _connect_once(url) as connection:
            connection.ping()
    except (redis.ConnectionError, redis.TimeoutError) as error:
        reason = explain(url, error)
        if connection_advice(reason) is not None:
            raise RedisUnreachable(redact_url(url), reason) from error
    except redis.RedisError:
        pass  # Redis answers, for example that it is loading its data


def answers(url: str) -> bool:
    """Whether a Redis answers one PING. True while it loads its data; False if it requires a login."""
    try:
        with _connect_once(url) as connection:
            connection.ping()
    except redis.BusyLoadingError:
        return True
    except (redis.ConnectionError, redis.TimeoutError):
        return False
    except redis.RedisError:
        return True
    return True


def _connect_once(url: str) -> redis.Redis:
    timeouts: dict[str, Any] = {"socket_timeout": CONNECT_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
    options: dict[str, Any] = {**timeouts, "retry": Retry(NoBackoff(), 0)}
    if is_embedded(url):
        pool = redis.ConnectionPool(connection_class=EmbeddedConnection, directory=directory_of(url), **options)
        return redis.Redis.from_pool(pool)
    connection: redis.Redis = redis.Redis.from_url(url, **options)
    return connection

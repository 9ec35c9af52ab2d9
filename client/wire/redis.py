"""Connections to Redis: which URL, with which timeouts, and what a failed connection means.

`client.wire.celery` has the settings of Celery's own connections.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import quote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.sentinel
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.client.wire.errors import NO_TLS, TLS, RedisRefused, RedisUnreachable, connection_advice
from headrace.config.sentinel import is_sentinel, parse_sentinel
from headrace.config.settings import DEFAULT_REDIS_URL, Settings, embedded_socket, redact_url

#: Seconds after which a connection without an answer fails. It must be more than the one second for which kombu's BRPOP
#: waits; None would wait for ever on a dead connection.
SOCKET_TIMEOUT_S = 30
CONNECT_TIMEOUT_S = 5
#: Timeout in seconds of the check whether a server uses TLS.
PROBE_S = 2
_OPTIONS: dict[str, Any] = {
    # Records written by others may contain bytes that are not UTF-8. They become lone surrogates, which readers reject.
    "encoding_errors": "surrogateescape",
    "socket_timeout": SOCKET_TIMEOUT_S,
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "health_check_interval": 25,
}
SENTINEL_OPTIONS: dict[str, Any] = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}


def resolve_url(settings: Settings) -> str:
    """The URL of the Redis to use: the one in the settings, else a running embedded server, else the default port."""
    if settings.redis_url is not None:
        return settings.redis_url
    path = embedded_socket()
    return unix_url(str(path)) if listening(str(path)) else DEFAULT_REDIS_URL


def unix_url(path: str) -> str:
    """The URL of a unix socket in redis-py's form."""
    return f"unix://{quote(path)}?db=0"


def listening(path: str) -> bool:
    """Whether a server of this user accepts connections on this unix socket.

    A server that was killed leaves a socket file behind. A socket in another user's directory is not used: it could be
    there to collect prompts.
    """
    with contextlib.suppress(OSError):
        if os.stat(os.path.dirname(path)).st_uid != os.getuid():
            return False
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def connect(url: str, *, text: bool = True) -> redis.Redis:
    """A redis-py client with timeouts; it returns `text` or else bytes. Sends nothing yet."""
    if is_sentinel(url):
        return cast("redis.Redis", _primary(url, redis.sentinel.Sentinel, redis.Redis, text, Retry(NoBackoff(), 0)))
    connection: redis.Redis = redis.Redis.from_url(url, decode_responses=text, **_OPTIONS)
    return connection


def connect_async(url: str) -> redis.asyncio.Redis:
    """A redis-py client for asyncio with timeouts; it returns text. Sends nothing yet."""
    if is_sentinel(url):
        once = redis.asyncio.retry.Retry(NoBackoff(), 0)
        found = _primary(url, redis.asyncio.sentinel.Sentinel, _AsyncSentinelRedis, True, once)
        return cast("redis.asyncio.Redis", found)
    connection: redis.asyncio.Redis = redis.asyncio.Redis.from_url(url, decode_responses=True, **_OPTIONS)
    return connection


def _primary(url: str, sentinel: Any, client: Any, text: bool, once: Any) -> Any:
    """A client of the primary that the Sentinels name. Each Sentinel is asked `once`: another one knows as much."""
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


def explain(url: str, error: BaseException) -> str:
    """The reason of a failed connection, including a mismatch of TLS between the server and the URL.

    With such a mismatch both sides wait for each other, or one hangs up, and the error alone does not tell why. Takes
    at most PROBE_S seconds.
    """
    reason, parts = str(error) or type(error).__name__, urlsplit(url)
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
        if isinstance(error.__cause__, redis.ResponseError):  # kombu's error for a message that Redis refused
            raise RedisRefused(redact_url(url), str(error)) from error
        raise RedisUnreachable(redact_url(url), explain(url, error)) from error
    except redis.RedisError as error:
        raise RedisRefused(redact_url(url), str(error)) from error


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
        pass  # it answers, perhaps that it is loading its data


def _connect_once(url: str) -> redis.Redis:
    timeouts: dict[str, Any] = {"socket_timeout": CONNECT_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
    connection: redis.Redis = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **timeouts)
    return connection

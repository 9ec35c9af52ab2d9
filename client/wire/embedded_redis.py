"""How a process finds the embedded Redis server, which may start, stop and move while the process runs.

Without HEADRACE_REDIS_URL the address is looked up for every new connection, not once for each process: the embedded
server of this user's data directory if one runs, else the default port of this host. So a client, a producer and a
worker that start before `headrace up` connect as soon as it runs.

`embedded:///DIRECTORY` is the internal URL for this. It is the same string wherever the server is at the moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import redis
import redis.asyncio
from celery.backends.redis import RedisBackend
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis

from headrace.config.directories import UnsafeDirectory, check_private, read_address
from headrace.config.settings import DEFAULT_REDIS_URL

SCHEME = "embedded"
#: Errors of connecting to the socket of a server that is not running. A running server causes other errors.
NOT_RUNNING = (FileNotFoundError, ConnectionRefusedError)

#: Process id, user id and group id of the process at the other end of a unix socket: `struct ucred` of Linux.
PEER_CREDENTIALS = struct.Struct("=iII")

#: The last socket at which this process has reached the server of a data directory. A process that has used an embedded
#: server waits for it to return: another Redis would not have its jobs.
_reached: dict[str, str] = {}


def embedded_url(directory: Path) -> str:
    """The internal URL of the embedded server of a data directory."""
    return f"{SCHEME}://{quote(str(directory))}"


def is_embedded(url: str) -> bool:
    """Whether this is an internal URL of an embedded server."""
    return url.startswith(f"{SCHEME}://")


def directory_of(url: str) -> str:
    """The data directory in an internal URL."""
    return unquote(urlsplit(url).path)


def unix_url(path: str) -> str:
    """The URL of a unix socket, as redis-py writes it."""
    return f"unix://{quote(path)}?db=0"


def kombu_url(url: str) -> str:
    """A URL in the form of kombu and Celery.

    A unix socket is `redis+socket://`, with the database as `virtual_host`. In other URLs the database is the path,
    which redis-py also reads, but prefers `?db=`.
    """
    parts = urlsplit(url)
    database = parse_qs(parts.query).get("db")
    if parts.scheme == "unix":
        return f"redis+socket://{parts.path}?virtual_host={database[0] if database else 0}"
    if not database:
        return url
    query = "&".join(part for part in parts.query.split("&") if not part.startswith("db="))
    return parts._replace(path=f"/{database[0]}", query=query).geturl()


def current_url(url: str) -> str:
    """The Redis that a new connection to `url` would try now, in redis-py's form."""
    if not is_embedded(url):
        return url
    directory = directory_of(url)
    path = _socket_of(directory)
    if directory in _reached:
        return unix_url(path or _reached[directory])
    return unix_url(path) if path is not None and is_listening(path) else DEFAULT_REDIS_URL


def is_listening(path: str) -> bool:
    """Whether a server of this user accepts connections on this unix socket. A killed one leaves a dead socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        probe.connect(path)
        return _is_ours(path)
    return False


def _is_ours(path: str) -> bool:
    """Whether the socket is in a directory of this user: another user could collect our prompts there."""
    try:
        check_private(Path(path).parent)
    except OSError:
        return False
    return True


def _check_peer(connection: socket.socket, path: str) -> None:
    """Check that the process at the other end is one of this user or root, before anything is sent.

    Raises:
        UnsafeDirectory: the process belongs to another user.
    """
    if sys.platform == "linux":
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        if PEER_CREDENTIALS.unpack(credentials)[1] not in (0, os.getuid()):
            raise UnsafeDirectory(Path(path), "is the socket of another user")


def _socket_of(directory: str) -> str | None:
    address = read_address(Path(directory))
    return address.socket if address is not None and _is_ours(address.socket) else None


def _socket_to_use(directory: str) -> str | None:
    """The socket to connect to; None if no server has published its address.

    Raises:
        UnsafeDirectory: our data directory, or that of the socket, is one that another user made or can change.
    """
    place = Path(directory)
    with contextlib.suppress(FileNotFoundError):
        if place.lstat().st_uid in (0, os.getuid()):  # the directory of another user has nothing for us
            check_private(place, group_may_write=True)
    address = read_address(place)
    if address is None:
        return None
    with contextlib.suppress(FileNotFoundError):  # the server was killed, and its directory is gone
        check_private(Path(address.socket).parent)
    return address.socket


def _check_fallback(directory: str) -> None:
    """Check that the default port may be tried.

    Raises:
        ConnectionRefusedError: this process has used the embedded server, so it must wait for that one.
    """
    if directory in _reached:
        raise ConnectionRefusedError("the embedded Redis server is not running")


class EmbeddedConnection(redis.Connection):
    """A connection of redis-py that looks for the embedded server whenever it connects."""

    def __init__(self, *, directory: str, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.directory = directory

    def _connect(self) -> Any:
        if (path := _socket_to_use(self.directory)) is not None:
            with contextlib.suppress(*NOT_RUNNING):
                return self._connect_to(path)
        _check_fallback(self.directory)
        return super()._connect()  # type: ignore[no-untyped-call]

    def _connect_to(self, path: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(self.socket_connect_timeout)
            connection.connect(path)
            _check_peer(connection, path)
            connection.settimeout(self.socket_timeout)
        except BaseException:
            connection.close()
            raise
        _reached[self.directory] = path
        return connection

    def _host_error(self) -> str:
        return _reached.get(self.directory) or f"{self.host}:{self.port}"


class AsyncEmbeddedConnection(redis.asyncio.Connection):
    """`EmbeddedConnection` for asyncio."""

    def __init__(self, *, directory: str, **options: Any) -> None:
        super().__init__(**options)
        self.directory = directory

    async def _connect(self) -> None:
        if (path := _socket_to_use(self.directory)) is not None:
            with contextlib.suppress(*NOT_RUNNING):
                async with asyncio.timeout(self.socket_connect_timeout):
                    self._reader, self._writer = await asyncio.open_unix_connection(path)
                _check_peer(self._writer.get_extra_info("socket"), path)
                _reached[self.directory] = path
                return
        _check_fallback(self.directory)
        await super()._connect()  # type: ignore[no-untyped-call]

    def _host_error(self) -> str:
        return _reached.get(self.directory) or f"{self.host}:{self.port}"


class EmbeddedChannel(kombu_redis.Channel):
    """A channel of kombu whose connections look for the embedded server."""

    connection_class: type[redis.Connection] | None = EmbeddedConnection

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        options: dict[str, Any] = super()._connparams(asynchronous)  # type: ignore[no-untyped-call]
        return {**options, "directory": directory_of(self.connection.client.hostname)}


class EmbeddedTransport(kombu_redis.Transport):
    """kombu's transport for the embedded server: that of all URLs that begin with `embedded://`."""

    Channel = EmbeddedChannel
    #: kombu then keeps the whole URL in `hostname`, from which the channel reads the directory.
    can_parse_url = True

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:  # noqa: ARG002
        """Called by kombu, Celery and Flower, which show where the broker is, or connect to it."""
        return kombu_url(current_url(uri))


# kombu looks the scheme up wherever it has only the URL, as in `celery report` and `inspect conf`.
TRANSPORT_ALIASES[SCHEME] = f"{__name__}:{EmbeddedTransport.__name__}"


class EmbeddedBackend(RedisBackend):
    """Celery's result backend, with connections that look for the embedded server."""

    def _params_from_url(self, url: str, defaults: dict[str, Any]) -> dict[str, Any]:
        return {**defaults, "connection_class": EmbeddedConnection, "directory": directory_of(url)}

    def as_uri(self, include_password: bool = False) -> str:  # noqa: ARG002
        """Called by Celery to show where results are."""
        return kombu_url(current_url(self.url))

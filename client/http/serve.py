"""Start the server: check the options, open the socket, run uvicorn."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from headrace.client.http.app import TIMEOUT_S, make_app
from headrace.client.http.auth import MAX_BODY_BYTES, MAX_FILE_BYTES, MAX_REQUESTS, Limits, is_loopback
from headrace.client.http.file_store import MAX_TOTAL_BYTES, FileStore
from headrace.client.http.sockets import (
    ACCEPT_AT_ONCE,
    Connection,
    ConnectionLimits,
    Server,
    make_room,
    quiet_uvicorn,
)
from headrace.client.jobs.server_check import check_redis
from headrace.client.wire.errors import InvalidRequest
from headrace.config import Settings
from headrace.config.directories import data_dir
from headrace.config.logging import setup_logging
from headrace.config.settings import MIN_API_KEY_LENGTH, is_valid_key
from headrace.config.tracing import setup_tracing

#: Upper limit of `timeout`, that of the `timeout_s` of a job.
MAX_TIMEOUT_S = 1e9
#: Seconds until the event loop gets the interpreter back from a thread that is parsing or submitting. The loop loses it
#: at each call to the system, so an answer waits for it several times; Python's default is 5 ms.
SWITCH_INTERVAL_S = 0.0005


def serve(
    settings: Settings,
    *,
    host: str,
    port: int,
    announce: Callable[[str], None],
    api_keys: Sequence[str] = (),
    insecure: bool = False,
    cors: Sequence[str] = (),
    files: str | None = None,
    timeout: float = TIMEOUT_S,
    requests_per_minute: int | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_file_bytes: int = MAX_FILE_BYTES,
    max_files_bytes: int = MAX_TOTAL_BYTES,
) -> None:
    """Serve until SIGTERM or SIGINT; running requests then have HEADRACE_SOFT_SHUTDOWN_S to finish.

    Args:
        announce: called once with a line that names the address of the server.
        api_keys: keys in addition to those of the settings.
        insecure: allow an address that other machines can reach although no key is configured.
        cors: origins whose pages may send requests from a browser.
        files: directory for files and batches; the settings' if None.
        timeout: upper limit for the duration of a job, in seconds.

    Raises:
        InvalidRequest: `timeout` is not a possible number; the address is not available, or would be open to the
            network without a key; or the process may open too few files.
        RedisUnsuitable: Redis loses jobs, for example because it evicts keys.
        DirectoryInUse: another server uses the directory for files.
        SettingsError: HEADRACE_OTEL is set but OpenTelemetry is not installed.
    """
    if not 0 < timeout < MAX_TIMEOUT_S:
        raise InvalidRequest("timeout", str(timeout), f"a number of seconds above 0, below {MAX_TIMEOUT_S:.0f}")
    keys = _keys(settings, api_keys, host, insecure=insecure)
    check_redis(settings)
    connections = ConnectionLimits(connections=make_room())
    limits = Limits(
        keys=keys,
        origins=tuple(cors),
        any_host=insecure,
        requests_per_minute=requests_per_minute,
        max_body_bytes=max_body_bytes,
        max_file_bytes=max_file_bytes,
    )
    directory = Path(files or settings.files_dir or data_dir())
    flush_traces = setup_tracing(settings, "headrace-serve")
    listener = _listen(host, port)
    with contextlib.closing(listener):
        store = FileStore(directory, max_files_bytes)
        setup_logging(settings)
        # python_multipart logs a warning for every invalid byte of an upload; the client gets an error response anyway.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        app = make_app(settings, limits, store, directory, timeout_s=timeout)
        quiet_uvicorn()
        server = Server(_config(app, settings, connections))
        announce(
            f"headrace serves {_url(listener)}/v1 ({_describe_access(keys, insecure=insecure)}); files in {directory}"
        )
        try:
            _run(server, listener)
        finally:
            flush_traces()


def _keys(settings: Settings, more: Sequence[str], host: str, *, insecure: bool) -> tuple[str, ...]:
    """All accepted API keys. Raises InvalidRequest if one is too short, or if none protects a public address."""
    keys = (*settings.api_key_list, *more)
    if not all(is_valid_key(key, MIN_API_KEY_LENGTH) for key in keys):
        raise InvalidRequest("api-key", "a short one", f"at least {MIN_API_KEY_LENGTH} characters without spaces")
    if not keys and not insecure and not is_loopback(host):
        expected = "HEADRACE_API_KEYS to be set, or --insecure if everybody on the network may use the server"
        raise InvalidRequest("host", f"{host} without keys", expected)
    return keys


def _config(app: ASGIApp, settings: Settings, connections: ConnectionLimits) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=type("Connection", (Connection,), {"limits": connections}),
        ws="none",
        backlog=ACCEPT_AT_ONCE,
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(settings.soft_shutdown_s)),
    )


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Run uvicorn. After a graceful shutdown it raises the signal again, which is ignored here."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        server.run(sockets=[listener])
    except (KeyboardInterrupt, SystemExit):
        if not (server.started and server.should_exit):
            raise
    finally:
        sys.setswitchinterval(before)


def _listen(host: str, port: int) -> socket.socket:
    # asyncio sets TCP_NODELAY only if the socket names its protocol; without it small events are delayed by 40 ms.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MAX_REQUESTS)
    except OSError as error:
        listener.close()
        expected = f"an address of this machine that is free ({error.strerror})"
        raise InvalidRequest("host", f"{host}, port {port}", expected) from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _describe_access(keys: Sequence[str], *, insecure: bool) -> str:
    if keys:
        return "with a key"
    return "everybody, without a key" if insecure else "this machine only, without a key"

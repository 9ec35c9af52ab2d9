"""The embedded Redis: a real server as a child process, for machines on which no Redis is set up."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket as sockets
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import redis
from filelock import FileLock, Timeout

from headrace.client.wire.embedded_redis import unix_url
from headrace.config.directories import (
    MAX_SOCKET_PATH,
    ServerAddress,
    UnsafeDirectory,
    make_private,
    read_address,
    redis_dir,
    remove_address,
    runtime_dir,
    socket_for,
    write_address,
)
from headrace.worker.append_only_file import find_damage, set_aside
from headrace.worker.child_processes import die_with_parent, end, make_run_directory, runs, watch
from headrace.worker.redis_binary import WAYS_OUT, ServerMissing, dotted, find_server

#: Seconds to wait for the lock of a process that was killed: its server ends shortly after it.
LOCK_TIMEOUT_S = 10.0


class EmbeddedRedisError(RuntimeError):
    """Raised when no embedded server can run; the message says why and what to do."""


class AlreadyRunning(EmbeddedRedisError):
    """Raised when a live process already runs a server on the directory. Clients find that server."""


class EmbeddedRedis:
    """A Redis server that runs during this object's `with` block, and never outlives this process.

    It listens on a unix socket that only this user can open, and on no port. Every write is on disk within a second,
    and keys are never evicted.

    Args:
        directory: where the server keeps its data and its address, which clients read; by default
            `config.directories.redis_dir()`. One server at a time may use it.
        socket: where it listens; by default `config.directories.socket_for(directory)`.
        start_timeout_s: seconds within which the server must answer, not counting the time it spends loading its data.
    """

    def __init__(
        self,
        *,
        directory: Path | str | None = None,
        socket: Path | str | None = None,
        start_timeout_s: float = 30.0,
    ) -> None:
        self.directory = Path(directory or redis_dir()).expanduser().absolute()
        self.socket = Path(socket or socket_for(self.directory)).expanduser().absolute()
        self.log_file = self.directory / "redis.log"
        self._placeholder = self.socket.with_suffix(".open")
        self._start_timeout_s = start_timeout_s
        self._delete_on_stop = False
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._lock_descriptors: list[int] = []
        self._lock = FileLock(
            self.directory / "lock",
            mode=0o600,
            thread_local=False,  # any thread may stop what another has started
            fallback_to_soft=False,  # the server must be able to hold the lock as well
            on_acquired=self._lock_descriptors.append,
        )

    @classmethod
    def ephemeral(cls, *, start_timeout_s: float = 30.0) -> EmbeddedRedis:
        """Create a private server in a new temporary directory, for one command or one test.

        `stop` deletes the directory. If this process is killed, its watcher does, or the next command.
        """
        directory = make_run_directory()
        socket = directory / "redis.sock"
        fits = len(os.fsencode(socket)) <= MAX_SOCKET_PATH
        server = cls(directory=directory, socket=socket if fits else None, start_timeout_s=start_timeout_s)
        server._delete_on_stop = True
        return server

    @property
    def url(self) -> str:
        """The server's URL in redis-py's form, `unix:///path?db=0`."""
        return unix_url(str(self.socket))

    @property
    def pid(self) -> int | None:
        """The server's process id; None if it is not started."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> EmbeddedRedis:
        """Start the server and wait until it answers. Does nothing if it runs; restarts it if it was killed.

        Raises:
            AlreadyRunning: a live process runs a server on the directory.
            EmbeddedRedisError: there is no server program, or it is too old; the directory or socket cannot be used;
                the server does not start, in which case the message quotes its last log lines.
        """
        if self.alive:
            return self
        self._end_process()
        try:
            binary, version = find_server()
            self._claim(version)
            self._spawn(binary)
            self._wait_until_ready()
        except BaseException as error:
            self.stop()
            if isinstance(error, UnsafeDirectory | ServerMissing):
                raise EmbeddedRedisError(str(error)) from None
            if isinstance(error, OSError):
                raise EmbeddedRedisError(
                    f"no Redis server can run in {self.directory} ({error}): {WAYS_OUT}"
                ) from error
            raise
        return self

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End the server with SIGTERM, on which it saves its data, and after `timeout_s` with SIGKILL.

        Does nothing when called again.
        """
        self._end_process(timeout_s)
        if self._lock.is_locked:
            remove_address(self.directory)
            self._lock_descriptors.clear()
            self._lock.release()
            self._leave_socket_directory()
        if self._delete_on_stop:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> EmbeddedRedis:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<EmbeddedRedis {self.url} {f'pid {self.pid}' if self.alive else 'stopped'}>"

    def _claim(self, version: tuple[int, int]) -> None:
        """Lock the directory, and check that no other process or user uses it or the socket."""
        size = len(os.fsencode(self.socket))
        if size > MAX_SOCKET_PATH:
            raise EmbeddedRedisError(
                f"the path {self.socket} has {size} bytes and that of a unix socket may have {MAX_SOCKET_PATH}; "
                "set XDG_RUNTIME_DIR to a directory with a shorter name"
            )
        make_private(self.directory, group_may_write=True)
        self._keep_socket_directory()
        if not self._lock.is_locked:
            _acquire(self._lock, self.directory)
            write_address(self.directory, ServerAddress(os.getpid(), str(self.socket)))
        if is_alive(self.socket):
            raise EmbeddedRedisError(
                f"another server already answers at {self.socket}; use it (HEADRACE_REDIS_URL={self.url}) or stop it"
            )
        if version < (7, 0) and (self.directory / "appendonlydir").exists():
            raise EmbeddedRedisError(
                f"{self.directory} was written by Redis 7 or later; {dotted(version)}, the server found here, would "
                "not see what is in it: put the newer server on PATH, or move the directory away"
            )

    def _keep_socket_directory(self) -> None:
        """Create the directory of the socket, and a file in it: other servers that end remove it if it is empty."""
        for left in reversed(range(5)):
            make_private(self.socket.parent)
            try:
                self._placeholder.touch(mode=0o600)
                return
            except FileNotFoundError:  # removed in between
                if not left:
                    raise

    def _leave_socket_directory(self) -> None:
        self._placeholder.unlink(missing_ok=True)
        if self.socket.parent in (runtime_dir(), socket_for(self.directory).parent):
            with contextlib.suppress(OSError):  # it is not empty: another server uses it
                self.socket.parent.rmdir()

    def _spawn(self, binary: Path) -> None:
        command = [str(binary), *_options(self.directory, self.socket)]
        # Linux sends the signal when the *thread* that started the server ends; only the main thread lasts long enough.
        by_kernel = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
        if by_kernel:
            command = die_with_parent(command)
        if self.log_file.exists():  # the last two runs are kept, so that logs do not grow for ever
            self.log_file.replace(f"{self.log_file}.1")
        self.log_file.touch(mode=0o600)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Redis 7 refuses to start under a locale that is set but not installed.
                env={**os.environ, "LC_ALL": "C"},
                # The server holds the lock too: no other server may write its files if it ends after this process.
                pass_fds=self._lock_descriptors,
                # Ctrl-C in the terminal must not reach the server, which this process needs while it shuts down.
                start_new_session=True,
                umask=0o077,  # what it writes holds prompts
            )
        if not by_kernel or self._delete_on_stop:
            self._watcher = watch(self._process.pid, self.directory if self._delete_on_stop else None)

    def _end_process(self, timeout_s: float = 10.0) -> None:
        watcher, self._watcher = self._watcher, None
        process, self._process = self._process, None
        if watcher:  # before the server: its process id may be reused, and the watcher would signal it
            end(watcher, signal.SIGKILL, timeout_s)
        if process:
            end(process, signal.SIGTERM, timeout_s)
            self.socket.unlink(missing_ok=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not (reply := _ping(self.socket)).startswith(b"+PONG"):
            if reply.startswith(b"-LOADING"):  # it is loading its data, which may take long
                deadline = time.monotonic() + self._start_timeout_s
            if not self.alive:
                raise EmbeddedRedisError(self._why_it_ended())
            if time.monotonic() > deadline:
                silence = f"{self._start_timeout_s:g} s"
                raise EmbeddedRedisError(f"the Redis server did not answer for {silence}{self._last_words()}")
            time.sleep(0.01)

    def _why_it_ended(self) -> str:
        said = self._last_words()
        if not self._delete_on_stop and (damage := find_damage(self.directory, known_commands(), said)):
            return (
                f"{damage}. To start with what can be read, run `headrace up --repair-redis` once; it keeps the "
                f"damaged file in {self.directory}"
            )
        return f"the Redis server ended while it started{said}"

    def repair(self) -> str:
        """Set damaged append-only files aside and keep their intact part. Returns what was done, in one sentence.

        Raises:
            AlreadyRunning: a server runs on the directory.
            EmbeddedRedisError: there is no server program, or the directory cannot be used.
        """
        arities = known_commands()
        try:
            make_private(self.directory, group_may_write=True)
            _acquire(self._lock, self.directory)
            said = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
            damage = find_damage(self.directory, arities, said)
            if damage is None:
                return f"nothing in {self.directory} is damaged"
            return f"{damage}; the damaged file is kept in {set_aside(self.directory, damage)}"
        except OSError as error:
            raise EmbeddedRedisError(f"{self.directory} cannot be repaired: {error}") from error
        finally:
            self._lock_descriptors.clear()
            self._lock.release()

    def _last_words(self, lines: int = 8) -> str:
        text = self.log_file.read_text(errors="replace").strip()
        return "; it logged last:\n" + ("\n".join(text.splitlines()[-lines:]) or "(nothing)")


def known_commands() -> dict[bytes, int]:
    """The commands of the server program found here, in lower case, and their numbers of words (see COMMAND)."""
    with EmbeddedRedis.ephemeral() as server, redis.Redis.from_url(server.url) as connection:
        commands: dict[str, dict[str, Any]] = connection.command()
        return {name.lower().encode(): int(about["arity"]) for name, about in commands.items()}


def is_alive(socket: Path) -> bool:
    """Whether a server answers on this unix socket, ready or still loading its data."""
    return _ping(socket) != b""


def _options(directory: Path, socket: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _acquire(lock: FileLock, directory: Path) -> None:
    """Acquire the lock of a data directory.

    If its holder was killed, the server still holds the lock until it has ended, so this waits.

    Raises:
        AlreadyRunning: the process that holds the lock runs, or its server did not end in time.
    """

    def holder_runs() -> bool:
        holder = read_address(directory)
        return holder is not None and runs(holder.pid)

    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S, poll_interval=0.05, cancel_check=holder_runs)
    except Timeout:
        holder = read_address(directory) or ServerAddress(0, "unknown")
        raise AlreadyRunning(
            f"process {holder.pid or 'unknown'} is already running a Redis server of headrace on {directory}, socket "
            f"{holder.socket}: use it (HEADRACE_REDIS_URL={unix_url(holder.socket)}), or stop it"
        ) from None


def _ping(socket: Path) -> bytes:
    """Return the server's answer to PING, or b"" without one. Not by redis-py, which would retry."""
    with contextlib.suppress(OSError), sockets.socket(sockets.AF_UNIX) as connection:
        connection.settimeout(1.0)
        connection.connect(str(socket))
        connection.sendall(b"PING\r\n")
        return connection.recv(128)
    return b""

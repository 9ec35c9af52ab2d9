"""The embedded Redis: a real server as a child process, for machines on which no Redis is set up."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket as sockets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

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
    socket_for,
    write_address,
)
from headrace.worker.redis_binary import WAYS_OUT, ServerMissing, dotted, find_server

#: Seconds to wait for the lock of a process that was killed: its server ends shortly after it.
LOCK_TIMEOUT_S = 10.0

# Requests a signal for the parent's end (1 is PR_SET_PDEATHSIG), then executes the server. Without it, the server would
# survive a `kill -9` of the parent. This is a separate program because `preexec_fn` may deadlock in a process with
# threads. The parent may have ended before the request, so the program checks its parent's process id afterwards.
_DIE_WITH_PARENT = (
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)}); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


def die_with_parent(command: list[str]) -> list[str]:
    """Wrap a command so that Linux ends it with this process; unchanged elsewhere. Start it in the main thread."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


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
        """Create a private server in a new temporary directory, which `stop` deletes: for one command or one test."""
        directory = tempfile.mkdtemp(prefix="headrace-run-")
        server = cls(directory=directory, start_timeout_s=start_timeout_s)
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
        make_private(self.socket.parent)
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
        if not by_kernel:
            self._watcher = _watch(self._process.pid)

    def _end_process(self, timeout_s: float = 10.0) -> None:
        watcher, self._watcher = self._watcher, None
        process, self._process = self._process, None
        if watcher:  # before the server: its process id may be reused, and the watcher would signal it
            _end(watcher, signal.SIGKILL, timeout_s)
        if process:
            _end(process, signal.SIGTERM, timeout_s)
            self.socket.unlink(missing_ok=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not (reply := _ping(self.socket)).startswith(b"+PONG"):
            if reply.startswith(b"-LOADING"):  # it is loading its data, which may take long
                deadline = time.monotonic() + self._start_timeout_s
            if not self.alive:
                raise EmbeddedRedisError(f"the Redis server ended while it started{self._last_words()}")
            if time.monotonic() > deadline:
                silence = f"{self._start_timeout_s:g} s"
                raise EmbeddedRedisError(f"the Redis server did not answer for {silence}{self._last_words()}")
            time.sleep(0.01)

    def _last_words(self, lines: int = 8) -> str:
        text = self.log_file.read_text(errors="replace").strip()
        return "; it logged last:\n" + ("\n".join(text.splitlines()[-lines:]) or "(nothing)")


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
        return holder is not None and _runs(holder.pid)

    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S, poll_interval=0.05, cancel_check=holder_runs)
    except Timeout:
        holder = read_address(directory) or ServerAddress(0, "unknown")
        raise AlreadyRunning(
            f"process {holder.pid or 'unknown'} is already running a Redis server of headrace on {directory}, socket "
            f"{holder.socket}: use it (HEADRACE_REDIS_URL={unix_url(holder.socket)}), or stop it"
        ) from None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return True


def _watch(pid: int) -> subprocess.Popen[bytes]:
    """Start a shell that ends process `pid` when this process ends, which closes the shell's standard input."""
    command = ["/bin/sh", "-c", 'read _; kill -TERM "$0"', str(pid)]
    return subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _end(process: subprocess.Popen[bytes], with_signal: signal.Signals, timeout_s: float) -> None:
    process.send_signal(with_signal)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin:
        process.stdin.close()


def _ping(socket: Path) -> bytes:
    """Return the server's answer to PING, or b"" without one. Not by redis-py, which would retry."""
    with contextlib.suppress(OSError), sockets.socket(sockets.AF_UNIX) as connection:
        connection.settimeout(1.0)
        connection.connect(str(socket))
        connection.sendall(b"PING\r\n")
        return connection.recv(128)
    return b""

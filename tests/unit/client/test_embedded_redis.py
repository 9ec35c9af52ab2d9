"""Clients and producers that start before the embedded Redis server, and follow it when it moves."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
from pathlib import Path
from typing import Any

import kombu
import pytest
import redis

from headrace import client as module
from headrace.client import AsyncClient, Client, RedisUnreachable
from headrace.client.wire import embedded_redis
from headrace.client.wire.celery import results_app
from headrace.client.wire.embedded_redis import current_url, embedded_url, is_listening, unix_url
from headrace.client.wire.redis import answers, connect, resolve_url
from headrace.config import load_settings
from headrace.config.directories import ServerAddress, redis_dir, write_address
from headrace.config.settings import DEFAULT_REDIS_URL
from headrace.worker.celery import make_app
from headrace.worker.redis_server import EmbeddedRedis


class NothingThere(OSError):
    """The error of the default port in these tests, whatever runs on the machine."""


@pytest.fixture(autouse=True)
def _own_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(embedded_redis, "_reached", {})

    def refuse(*_: Any) -> None:
        raise NothingThere("nothing on the default port")

    async def refuse_later(*_: Any) -> None:
        refuse()

    monkeypatch.setattr(redis.Connection, "_connect", refuse)
    monkeypatch.setattr(redis.asyncio.Connection, "_connect", refuse_later)


def queued(client: Client | module.AsyncClient) -> int:
    """How many jobs wait on the server that runs now."""
    with connect(resolve_url(load_settings())) as connection:
        return sum(connection.llen(name) for name in module.client.keys.queue_lists(client.model_name))  # type: ignore[misc]


def test_the_url_is_one_string_and_the_address_is_looked_up() -> None:
    url = resolve_url(load_settings())
    assert url == embedded_url(redis_dir())
    assert resolve_url(load_settings(redis_url="redis://elsewhere/0")) == "redis://elsewhere/0"
    assert current_url("redis://elsewhere/0") == "redis://elsewhere/0"
    assert current_url(url) == DEFAULT_REDIS_URL
    with EmbeddedRedis() as server:
        assert resolve_url(load_settings()) == url
        assert current_url(url) == server.url
    assert current_url(url) == DEFAULT_REDIS_URL


def test_a_client_that_starts_before_the_server_finds_it() -> None:
    with Client() as client:
        with pytest.raises(RedisUnreachable, match=DEFAULT_REDIS_URL):
            client.submit("Hello.")
        with EmbeddedRedis():
            job = client.submit("Hello.")
            assert job.status() == "queued"
            assert queued(client) == 1
            assert [each.id for each in client.submit_many(["Hello."])]


def test_an_asyncio_client_that_starts_before_the_server_finds_it() -> None:
    async def use() -> None:
        async with AsyncClient() as client:
            job = client.job("later")
            with pytest.raises(RedisUnreachable, match=DEFAULT_REDIS_URL):
                await job.wait(timeout=10)
            server = EmbeddedRedis().start()
            try:
                job = await client.submit("Hello.", id="later")
                assert await job.status() == "queued"
                with pytest.raises(TimeoutError):
                    await job.result(timeout=0.1)  # over the connection that all waiting calls share
            finally:
                server.stop()

    asyncio.run(use())


def test_a_celery_producer_that_starts_before_the_server_finds_it() -> None:
    with Client() as client:
        server = EmbeddedRedis()
        later = threading.Timer(0.5, server.start)
        later.start()
        try:
            result = client.signature("Hello.").apply_async()  # Celery connects to the result backend first, and waits
            assert result.state == "PENDING"
            del result  # this unsubscribes, for which Redis must be available
            assert queued(client) == 1
        finally:
            later.join()
            server.stop()


def test_celery_knows_the_scheme_of_the_embedded_server_wherever_it_has_only_the_url() -> None:
    """As `celery report`, `inspect conf` and Flower have it."""
    for app in (make_app(load_settings()), results_app(load_settings(), resolve_url(load_settings()))):
        assert app.conf.table(with_defaults=True)["broker_url"] == DEFAULT_REDIS_URL
        with EmbeddedRedis() as server:
            shown = f"redis+socket://{server.socket}?virtual_host=0"
            assert kombu.Connection(app.conf.broker_url).as_uri() == app.backend.as_uri() == shown
            assert shown in app.bugreport()
            with app.connection() as connection, kombu.Connection(connection.as_uri(include_password=True)) as plain:
                assert plain.default_channel.client.client_id() > 0
        app.close()


def test_clients_follow_a_server_that_moves(tmp_path: Path) -> None:
    async def use(client: Client, own: AsyncClient) -> None:
        with EmbeddedRedis(socket=tmp_path / "one"):
            kept = client.submit("Hello.", id="kept")
            assert await own.job("kept").status() == "queued"
            with pytest.raises(TimeoutError):
                await own.job("kept").result(timeout=0.1)
            client.signature("Hello.").apply_async()
        with EmbeddedRedis(socket=tmp_path / "two"):
            assert kept.status() == "queued"
            client.submit("Hello.", id="new")
            client.signature("Hello.").apply_async()
            assert await own.job("new").status() == "queued"
            with pytest.raises(TimeoutError):
                await own.job("new").result(timeout=0.1)
            assert queued(client) == 4

    async def both() -> None:
        async with AsyncClient() as own:
            with Client() as client:
                await use(client, own)

    asyncio.run(both())


def test_a_client_of_the_embedded_server_never_switches_to_another_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis on the default port does not have the jobs."""
    url = resolve_url(load_settings())
    with EmbeddedRedis.ephemeral() as stranger, Client() as client:
        with EmbeddedRedis() as server:
            client.submit("Hello.")

        def to_the_stranger(self: Any) -> Any:
            self.path = str(stranger.socket)
            return redis.UnixDomainSocketConnection._connect(self)

        monkeypatch.setattr(redis.Connection, "_connect", to_the_stranger)
        with pytest.raises(RedisUnreachable, match="is not running") as error:
            client.status()
        assert error.value.url == current_url(url) == server.url
        assert not answers(url)
        monkeypatch.setattr(embedded_redis, "_reached", {})
        assert answers(url)


def test_a_socket_in_the_directory_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "theirs"
    with EmbeddedRedis(directory=theirs / "data", socket=theirs / "run" / "s") as trap:
        redis_dir().mkdir(parents=True)
        write_address(redis_dir(), ServerAddress(1, str(trap.socket)))
        assert answers(resolve_url(load_settings()))
        assert is_listening(str(trap.socket))
        if os.getuid() == 0:
            os.chown(trap.socket.parent, 12345, -1)
        else:
            monkeypatch.setattr(os, "getuid", lambda: 12345)
        monkeypatch.setattr(embedded_redis, "_reached", {})
        assert not answers(resolve_url(load_settings()))
        assert not is_listening(str(trap.socket))


@pytest.mark.parametrize("how", ["link", "owner", "mode", "peer", "data"])
def test_nothing_is_sent_to_a_socket_that_another_user_may_have_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The error names the directory and the way out, in both clients."""
    real, run = tmp_path / "real", tmp_path / "run"
    with EmbeddedRedis(socket=real / "s") as server:
        write_address(redis_dir(), ServerAddress(1, str(run / "s")))
        if how == "link":
            run.symlink_to(real)
        else:
            real.rename(run)
        if how in ("mode", "data"):
            (run if how == "mode" else redis_dir()).chmod(0o777)
        if how == "owner":
            if os.getuid() == 0:
                os.chown(run, 12345, -1)
            else:
                monkeypatch.setattr(os, "getuid", lambda: 12345)
        if how == "peer":
            monkeypatch.setattr(embedded_redis, "PEER_CREDENTIALS", OtherUser("=iII"))
        reasons = "is a symbolic link|belongs to another user|can be written by|is the socket of another user"
        said = rf"{redis_dir() if how == 'data' else run}.* ({reasons})"

        async def ask() -> None:
            async with AsyncClient() as client:
                await client.submit("a secret")

        for use in (lambda: asyncio.run(ask()), lambda: module.submit("a secret")):
            with pytest.raises(RedisUnreachable, match=said) as caught:
                use()
            assert "XDG_RUNTIME_DIR" in str(caught.value)
        run.unlink() if how == "link" else run.rename(real)
        if how == "owner" and os.getuid() == 0:
            os.chown(real, 0, -1)
        monkeypatch.undo()
        with redis.Redis.from_url(server.url) as connection:
            assert connection.dbsize() == 0


class OtherUser(struct.Struct):
    """Reads the credentials of another user from those of any process."""

    def unpack(self, data: Any) -> tuple[Any, ...]:
        pid, _, group = super().unpack(data)
        return pid, 12345, group


def test_two_data_directories_of_one_user_are_two_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with EmbeddedRedis():
        module.submit("Hello.", id="here")
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
        with pytest.raises(RedisUnreachable):
            module.submit("Hello.")
        with EmbeddedRedis(), pytest.raises(module.UnknownJob):
            module.job("here").status()
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
        assert module.job("here").status() == "queued"


def test_the_functions_of_the_module_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    first = module.default_client()
    assert module.default_client() is first
    with EmbeddedRedis.ephemeral() as server:
        monkeypatch.setenv("HEADRACE_REDIS_URL", server.url)
        assert module.default_client() is not first
        assert module.submit("Hello.").status() == "queued"
        assert module.default_client().url == server.url
        module.default_client().close()


def test_a_socket_is_written_as_redis_py_writes_it() -> None:
    assert unix_url("/a b/100%") == "unix:///a%20b/100%25?db=0"

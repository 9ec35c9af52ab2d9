"""rediss://: client, broker and result backend over TLS, which cannot skip certificate checks by mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.client import Client, RedisUnreachable
from headrace.client.wire import redis as transport
from headrace.client.wire.redis import check_access
from tests.integration.processes import WorkerProcess
from tests.integration.servers import Authority, TlsProxy, free_port, redis_on_a_port
from tests.patience import PATIENCE_S

PASSWORD = "tls-p%40ssword-5519"
ADVICE = r"certificate.*ssl_ca_certs=/path/to/ca\.pem"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def port(directory: Path) -> Iterator[int]:
    with redis_on_a_port(directory, "--requirepass", "tls-p@ssword-5519") as number:
        yield number


@pytest.fixture(scope="module")
def ours(directory: Path) -> Authority:
    return Authority(directory / "our authority")


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Authority:
    return Authority(directory / "theirs")


@pytest.fixture
def proxy(port: int, ours: Authority) -> Iterator[TlsProxy]:
    with TlsProxy(port, ours) as made:
        yield made


def url(proxy: TlsProxy, query: str, host: str = "localhost") -> str:
    return f"rediss://:{PASSWORD}@{host}:{proxy.port}/0{query}"


def quoted(path: Path) -> str:
    return str(path).replace(" ", "%20")


def test_all_connections_use_tls_with_a_certificate_on_each_side(port: int, ours: Authority, tmp_path: Path) -> None:
    with TlsProxy(port, ours, client_ca=ours.ca) as proxy:
        files = f"&ssl_certfile={quoted(ours.cert)}&ssl_keyfile={quoted(ours.key)}"
        place = url(proxy, f"?ssl_ca_certs={quoted(ours.ca)}{files}")
        log = tmp_path / "worker.log"
        with WorkerProcess(log, HEADRACE_REDIS_URL=place) as worker, Client(redis_url=place) as client:
            worker.wait_ready()
            before = proxy.connections
            assert client.submit("Hello.", max_tokens=5, temperature=0).result(PATIENCE_S).text == '\n\n"I am'
            jobs = client.submit_many(["Hello."] * 3, max_tokens=5, temperature=0, checkpoints=[9])
            assert {job.result(PATIENCE_S).text for job in jobs} == {'\n\n"I am'}
            assert set(jobs[0].checkpoints()) == {"last_logits"}
            assert proxy.connections > before > 2
            assert "ssword-5519" not in worker.text()
        without = url(proxy, f"?ssl_ca_certs={quoted(ours.ca)}")
        with Client(redis_url=without) as client, pytest.raises(RedisUnreachable):
            client.submit("Hello.")


@pytest.mark.parametrize(
    ("query", "host"),
    [("?ssl_ca_certs={theirs}", "localhost"), ("", "localhost"), ("?ssl_ca_certs={ours}", "127.0.0.1")],
    ids=["another authority", "no authority named", "another host"],
)
def test_a_wrong_certificate_is_refused_with_what_to_do(
    proxy: TlsProxy, ours: Authority, theirs: Authority, query: str, host: str
) -> None:
    place = url(proxy, query.format(ours=quoted(ours.ca), theirs=quoted(theirs.ca)), host)
    with Client(redis_url=place) as client:
        with pytest.raises(RedisUnreachable, match=ADVICE) as caught:
            client.submit("Hello.")
        with pytest.raises(RedisUnreachable, match=ADVICE):
            client.status()
    assert "ssword-5519" not in str(caught.value)
    assert proxy.connections == 0


def test_a_worker_that_gets_a_wrong_certificate_ends_with_an_error(
    proxy: TlsProxy, theirs: Authority, tmp_path: Path
) -> None:
    place = url(proxy, f"?ssl_ca_certs={quoted(theirs.ca)}")
    with WorkerProcess(tmp_path / "worker.log", HEADRACE_REDIS_URL=place) as worker:
        assert worker.wait() != 0
        assert re.search(ADVICE, worker.text())
        assert "Traceback" not in worker.text()
        assert "ssword-5519" not in worker.text()
    assert proxy.connections == 0


def test_a_missing_certificate_file_is_named(proxy: TlsProxy, tmp_path: Path) -> None:
    place = url(proxy, "?ssl_ca_certs=/nowhere/ca.pem")
    with Client(redis_url=place) as client, pytest.raises(RedisUnreachable, match=r"No such file.*ssl_ca_certs"):
        client.submit("Hello.")


def test_who_speaks_no_tls_to_a_server_that_does_is_told(proxy: TlsProxy) -> None:
    plain = f"redis://:{PASSWORD}@localhost:{proxy.port}/0"
    with Client(redis_url=plain) as client, pytest.raises(RedisUnreachable, match=r"speaks TLS.*write rediss://"):
        client.submit("Hello.")
    with pytest.raises(RedisUnreachable, match=r"speaks TLS.*write rediss://"):
        check_access(plain)


def test_who_speaks_tls_to_a_server_that_does_not_is_told(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client and server wait for each other until a timeout, which is shorter here."""
    monkeypatch.setitem(transport._OPTIONS, "socket_timeout", 0.5)
    monkeypatch.setattr(transport, "SOCKET_TIMEOUT_S", 0.5)
    monkeypatch.setattr(transport, "CONNECT_TIMEOUT_S", 0.5)
    place = f"rediss://:{PASSWORD}@localhost:{port}/0"
    with Client(redis_url=place) as client, pytest.raises(RedisUnreachable, match=r"no TLS.*write redis://"):
        client.submit("Hello.")
    with pytest.raises(RedisUnreachable, match=r"no TLS.*write redis://") as caught:
        check_access(place)
    assert "ssword-5519" not in str(caught.value)


def test_an_unreachable_or_silent_server_is_reported_as_such(port: int) -> None:
    """The error does not mention TLS without evidence for it."""
    for place in (f"rediss://localhost:{free_port()}/0", f"redis://localhost:{free_port()}/0"):
        with Client(redis_url=place) as client, pytest.raises(RedisUnreachable, match="start it") as caught:
            client.status()
        assert "TLS" not in str(caught.value)
        check_access(place)

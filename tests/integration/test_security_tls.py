"""rediss://: client, broker and result backend over TLS, and no way around its certificates by mistake."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import Client, RedisUnreachable
from tests.integration.processes import WorkerProcess
from tests.integration.servers import Authority, TlsProxy, redis_on_a_port

PASSWORD = "tls-p%40ssword-5519"


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


@pytest.mark.parametrize("more", ["", "&ssl_cert_reqs=required"], ids=["default", "required"])
def test_the_whole_way_goes_over_tls(proxy: TlsProxy, ours: Authority, tmp_path: Path, more: str) -> None:
    place = url(proxy, f"?ssl_ca_certs={quoted(ours.ca)}{more}")
    with WorkerProcess(tmp_path / "worker.log", MILLRACE_REDIS_URL=place) as worker, Client(redis_url=place) as client:
        worker.wait_ready()
        before = proxy.connections
        assert client.submit("Hello.", max_tokens=5, temperature=0).result(60).text == '\n\n"I am'
        jobs = client.submit_many(["Hello."] * 3, max_tokens=5, temperature=0, checkpoints=[9])
        assert {job.result(60).text for job in jobs} == {'\n\n"I am'}
        assert set(jobs[0].checkpoints()) == {"last_logits"}
        assert proxy.connections > before > 2
        assert "ssword-5519" not in worker.text()


def test_a_client_with_a_certificate_of_its_own(port: int, ours: Authority, tmp_path: Path) -> None:
    with TlsProxy(port, ours, client_ca=ours.ca) as proxy:
        files = f"&ssl_certfile={quoted(ours.cert)}&ssl_keyfile={quoted(ours.key)}"
        place = url(proxy, f"?ssl_ca_certs={quoted(ours.ca)}{files}")
        with (
            WorkerProcess(tmp_path / "worker.log", MILLRACE_REDIS_URL=place) as worker,
            Client(redis_url=place) as client,
        ):
            worker.wait_ready()
            assert client.submit("Hello.", max_tokens=5, temperature=0).result(60).text == '\n\n"I am'
        without = url(proxy, f"?ssl_ca_certs={quoted(ours.ca)}")
        with Client(redis_url=without) as client, pytest.raises(RedisUnreachable):
            client.submit("Hello.")


@pytest.mark.parametrize(
    ("query", "host"),
    [("?ssl_ca_certs={theirs}", "localhost"), ("", "localhost"), ("?ssl_ca_certs={ours}", "127.0.0.1")],
    ids=["another authority", "no authority named", "another host"],
)
def test_a_certificate_that_does_not_fit_is_refused_with_what_to_do(
    proxy: TlsProxy, ours: Authority, theirs: Authority, tmp_path: Path, query: str, host: str
) -> None:
    place = url(proxy, query.format(ours=quoted(ours.ca), theirs=quoted(theirs.ca)), host)
    advice = r"certificate.*ssl_ca_certs=/path/to/ca\.pem"
    with Client(redis_url=place) as client:
        with pytest.raises(RedisUnreachable, match=advice) as caught:
            client.submit("Hello.")
        with pytest.raises(RedisUnreachable, match=advice):
            client.status()
    assert "ssword-5519" not in str(caught.value)
    with WorkerProcess(tmp_path / "worker.log", MILLRACE_REDIS_URL=place) as worker:
        assert worker.wait(60) != 0
        assert re.search(advice, worker.text())
        assert "Traceback" not in worker.text()
        assert "ssword-5519" not in worker.text()
    assert proxy.connections == 0


def test_a_file_of_certificates_that_is_not_there_is_named(proxy: TlsProxy, tmp_path: Path) -> None:
    place = url(proxy, "?ssl_ca_certs=/nowhere/ca.pem")
    with Client(redis_url=place) as client, pytest.raises(RedisUnreachable, match=r"No such file.*ssl_ca_certs"):
        client.submit("Hello.")


def test_who_speaks_tls_and_who_does_not_find_out(proxy: TlsProxy, port: int, ours: Authority) -> None:
    plain = f"redis://:{PASSWORD}@localhost:{proxy.port}/0"
    with Client(redis_url=plain) as client, pytest.raises(RedisUnreachable):
        client.submit("Hello.")
    secure = f"rediss://:{PASSWORD}@localhost:{port}/0?ssl_ca_certs={quoted(ours.ca)}"
    with Client(redis_url=secure) as client, pytest.raises(RedisUnreachable, match="it does not speak TLS"):
        client.submit("Hello.")

"""The worker's answers to probes, asked over HTTP."""

from __future__ import annotations

import http.client
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.config import load_settings
from headrace.worker.observability.metrics import Metrics
from headrace.worker.observability.probes import LOADING, Probes, ProbesError, open_probes
from tests.patience import PATIENCE_S


@pytest.fixture
def probes() -> Iterator[Probes]:
    opened = Probes("127.0.0.1", 0, Metrics("demo"))
    yield opened
    opened.stop()


def get(probes: Probes, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{probes.port}{path}", timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def health(alive: str = "", ready: str = "") -> Any:
    return SimpleNamespace(why_not_alive=lambda: alive, why_not_ready=lambda: ready)


def test_a_worker_that_loads_is_alive_and_not_ready(probes: Probes) -> None:
    assert get(probes, "/livez") == (200, "ok\n")
    assert get(probes, "/readyz") == (503, LOADING + "\n")
    assert get(probes, "/metrics")[0] == 200


def test_a_running_worker_reports_its_health(probes: Probes) -> None:
    probes.watch(health())
    assert get(probes, "/livez") == get(probes, "/readyz") == get(probes, "/readyz?verbose") == (200, "ok\n")
    probes.watch(health(ready="Redis is away"))
    assert get(probes, "/livez") == (200, "ok\n")
    assert get(probes, "/readyz") == (503, "Redis is away\n")
    probes.watch(health(alive="stuck"))
    assert get(probes, "/livez") == (503, "stuck\n")


def test_other_paths_and_methods_are_refused(probes: Probes) -> None:
    status, text = get(probes, "/../etc/passwd")
    assert status == 404
    assert "/livez" in text
    connection = http.client.HTTPConnection("127.0.0.1", probes.port, timeout=PATIENCE_S)
    connection.request("HEAD", "/livez")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (200, b"")
    connection.close()
    connection.request("POST", "/livez", b"x")
    assert connection.getresponse().status == 501
    connection.close()


def test_a_slow_client_delays_no_other(probes: Probes) -> None:
    with socket.create_connection(("127.0.0.1", probes.port)) as slow:
        slow.sendall(b"GET /livez HT")
        assert get(probes, "/livez") == (200, "ok\n")


def test_the_error_for_a_taken_port_names_it_and_says_what_to_do(probes: Probes) -> None:
    settings = load_settings(metrics_port=probes.port)
    with pytest.raises(ProbesError, match=rf"port {probes.port} \(Address already in use\).*HEADRACE_METRICS_PORT"):
        open_probes(settings)


def test_the_error_for_a_foreign_address_names_it() -> None:
    with pytest.raises(ProbesError, match=r"192\.0\.2\.1.*HEADRACE_METRICS_HOST"):
        Probes("192.0.2.1", 0, Metrics("demo"))


def test_it_listens_at_ipv6_too() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        opened = Probes("::1", 0, Metrics("demo"))
    except ProbesError:
        pytest.skip("no IPv6 here")
    with socket.create_connection(("::1", opened.port)) as connection:
        connection.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.0 200")
    opened.stop()


def test_nothing_listens_unless_a_port_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "headrace.worker.observability.metrics", None
    )  # as where prometheus_client is not installed
    assert open_probes(load_settings()) is None
    with pytest.raises(ProbesError, match=r"pip install '\.\[metrics\]' -c constraints.txt` in a clone"):
        open_probes(load_settings(metrics_port=1))

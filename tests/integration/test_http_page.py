"""The page of `millrace serve`: what it is made of, and what it shows."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import Client, keys
from tests.integration.http_server import HttpServer
from tests.patience import PATIENCE_S

KEY = "a-key-of-more-than-16"


@pytest.fixture(scope="module")
def http(worker: object, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with HttpServer(tmp_path_factory.mktemp("http"), redis_url, "--api-key", KEY) as server:
        yield server


def test_the_page_needs_no_key_fetches_nothing_from_elsewhere_and_runs_no_other_script(http: HttpServer) -> None:
    with http.http() as plain:
        answer = plain.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert set(re.findall(r"https?://[^\"' )]+", answer.text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"""\s(?:src|href|style|on\w+)=["']""", answer.text)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_status_needs_a_key(http: HttpServer) -> None:
    with http.http() as plain:
        assert plain.get("/status.json").status_code == 401


def test_the_status_shows_slots_queues_rates_and_failures(http: HttpServer, client: Client) -> None:
    failing = client.submit([60_000], max_tokens=1)
    assert failing.wait(timeout=PATIENCE_S) == "failed"
    jobs = client.submit_many(["The river"] * 90, max_tokens=900, ignore_eos=True)
    tags = {keys.tag(job.id) for job in jobs}
    deadline, rows = time.monotonic() + PATIENCE_S, []
    with http.http(authorization=f"Bearer {KEY}") as plain:
        while not rows and time.monotonic() < deadline:
            status = plain.get("/status.json").json()
            rows = [row for row in status["workers"][0]["rows"] if row["job"] in tags]
            time.sleep(0.1)
        client.cancel(jobs)
        assert rows
        assert set(rows[0]) == {"job", "age_s", "prompt", "read", "written", "most"}
        assert {"now", "workers", "queues", "rates", "delivered"} <= set(status)
        assert status["rates"]
        assert all(0 <= status["now"] - when < 700 for when, _ in status["rates"])
        failures = {(each["job"], each["code"]) for each in status["workers"][0]["failures"]}
        assert (keys.tag(failing.id), "invalid_token_id") in failures
        assert not any(job.id in plain.get("/status.json").text for job in (failing, *jobs))
    for job in jobs:
        job.wait(timeout=PATIENCE_S)


def test_without_redis_the_status_says_so(tmp_path: Path) -> None:
    with HttpServer(tmp_path, "redis://127.0.0.1:1/0") as server, server.http() as plain:
        answer = plain.get("/status.json")
        assert answer.status_code == 503
        assert "cannot be reached" in answer.json()["error"]["message"]

"""The page of `headrace serve`: what it is made of, and what it shows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from headrace.client import Client, InvalidRequest, Job
from headrace.client.wire import keys
from tests.integration.http_server import HttpServer
from tests.integration.processes import wait_until
from tests.patience import PATIENCE_S

KEY, OTHER_KEY = "a-key-of-more-than-16", "another-key-of-more-than-16"


@pytest.fixture(scope="module")
def http(worker: object, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with HttpServer(tmp_path_factory.mktemp("http"), redis_url, "--api-key", KEY, "--api-key", OTHER_KEY) as server:
        yield server


def test_the_jobs_of_a_key_are_listed_to_it_alone_and_can_be_cancelled(http: HttpServer) -> None:
    with http.http(authorization=f"Bearer {KEY}") as mine, http.http(authorization=f"Bearer {OTHER_KEY}") as other:
        done = mine.post("/v1/completions", json={"prompt": "A secret of mine", "max_tokens": 2})
        job_id = done.headers["x-request-id"]
        listed = mine.get("/jobs.json").json()["data"]
        assert [job["state"] for job in listed if job["id"] == job_id] == ["succeeded"]
        assert "secret" not in mine.get("/jobs.json").text
        assert other.get("/jobs.json").json()["data"] == []
        assert other.post(f"/jobs/{job_id}/cancel").status_code == 404
        asked: dict[str, object] = {"prompt": "Hello.", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with mine.stream("POST", "/v1/completions", json=asked) as answer:
            running = answer.headers["x-request-id"]
            assert mine.post(f"/jobs/{running}/cancel").status_code == 200
            assert "cancelled" in answer.read().decode()
        found = mine.get("/jobs.json", params={"state": "cancelled"}).json()
        assert running in [job["id"] for job in found["data"]]


def test_the_rows_of_a_batch_are_listed_to_its_key(http: HttpServer, client: Client) -> None:
    """The key without jobs before is the owner; a program's job without a key is nobody's here."""
    client.submit("Hello.", max_tokens=1).result(PATIENCE_S)
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "demo", "prompt": "Hello."}}
    with http.openai(OTHER_KEY) as api, http.http(authorization=f"Bearer {OTHER_KEY}") as other:
        file = api.files.create(file=("a.jsonl", json.dumps(row).encode()), purpose="batch")
        batch = api.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        wait_until(lambda: api.batches.retrieve(batch.id).status == "completed")
        found = other.get("/jobs.json").json()
        assert [(job["state"], job["model"]) for job in found["data"]] == [("succeeded", "demo")]
        assert (found["has_more"], found["after"]) == (False, "")


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
        worker = status["workers"][0]
        assert worker["ended"]["failed"] >= 1
        assert worker["description"]["dtype"]
        failures = {(each["job"], each["code"]) for each in status["workers"][0]["failures"]}
        assert (keys.tag(failing.id), "invalid_token_id") in failures
        assert not any(job.id in plain.get("/status.json").text for job in (failing, *jobs))
    for job in jobs:
        job.wait(timeout=PATIENCE_S)


def asked(http: HttpServer, job: str, reference: str) -> httpx.Response:
    with http.http(authorization=f"Bearer {KEY}") as plain:
        return plain.get("/checkpoints.json", params={"job": job, "reference": reference})


@pytest.fixture(scope="module")
def traced(worker: object, redis_url: str) -> dict[str, Job]:
    """Jobs with stored tensors: two with one prompt, one with another of equal length, one longer, one with few."""
    prompts = {"one": "Hello.", "same": "Hello.", "other": "Help!", "longer": "Hello there.", "few": "Hello."}
    with Client(redis_url=redis_url) as client:
        jobs = {
            name: client.submit(prompt, max_tokens=3, temperature=0, checkpoints=[1, 2] if name == "few" else "all")
            for name, prompt in prompts.items()
        }
        for job in jobs.values():
            job.result(timeout=PATIENCE_S)
    return jobs


def test_two_jobs_of_one_prompt_have_the_same_tensors(http: HttpServer, traced: dict[str, Job]) -> None:
    answer = asked(http, traced["one"].id, traced["same"].id)
    assert answer.status_code == 200
    found = answer.json()
    assert found["ok"] is True
    assert [row["number"] for row in found["rows"]] == list(range(1, 13))
    assert {row["max_abs"] for row in found["rows"]} == {0.0}, "the same bits in any company"


def test_the_rows_are_the_differences_of_the_tensors(http: HttpServer, client: Client, traced: dict[str, Job]) -> None:
    ours, theirs = (client.job(traced[name].id).checkpoints() for name in ("one", "other"))
    found = asked(http, traced["one"].id, traced["other"].id).json()
    rows = {row["number"]: row for row in found["rows"]}
    assert found["ok"] is False
    for number, name in {4: "scores", 6: "mlp", 8: "logits", 11: "probs"}.items():
        assert rows[number]["max_abs"] == pytest.approx(float(np.abs(ours[name] - theirs[name]).max()), rel=1e-5)
        assert rows[number]["ok"] is False
    assert rows[8]["tolerance"] == 1e-3
    assert rows[3]["ok"] is True, "each cache holds what its own job wrote"


def test_different_shapes_and_missing_tensors_are_reported(http: HttpServer, traced: dict[str, Job]) -> None:
    longer = asked(http, traced["one"].id, traced["longer"].id).json()["rows"][7]
    assert (longer["number"], longer["ok"], longer["max_abs"]) == (8, False, None)
    assert "the reference has shape [3, " in longer["note"]
    few = {row["number"]: row["ok"] for row in asked(http, traced["few"].id, traced["one"].id).json()["rows"]}
    assert [number for number, ok in few.items() if ok] == [1, 2]
    assert few[8] is None


def test_jobs_that_cannot_be_compared_say_why(http: HttpServer, client: Client, traced: dict[str, Job]) -> None:
    plain = client.submit("Hello.", max_tokens=1)
    plain.result(timeout=PATIENCE_S)
    one = traced["one"].id
    for job, reference, status, code, param in [
        ("nobody-knows-it", one, 404, "not_found", "job"),
        (one, plain.id, 404, "no_checkpoints", "reference"),
        ("", one, 400, "invalid_request", "job"),
        (one, "a b", 400, "invalid_request", "reference"),
    ]:
        answer = asked(http, job, reference)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    with http.http() as stranger:
        assert stranger.get("/checkpoints.json").status_code == 401
    with pytest.raises(InvalidRequest, match="over 1000 bytes of tensors"):
        client.job(one).checkpoints(max_bytes=1000)
    assert len(client.job(one).checkpoints(max_bytes=2**24)) == len(client.job(one).checkpoints())


def test_without_redis_the_status_says_so(tmp_path: Path) -> None:
    with HttpServer(tmp_path, "redis://127.0.0.1:1/0") as server, server.http() as plain:
        answer = plain.get("/status.json")
        assert answer.status_code == 503
        assert "cannot be reached" in answer.json()["error"]["message"]

"""Files, batches, and connections that end early, with `headrace serve` and a slow worker."""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from headrace.client import Client
from headrace.client.wire.redis import connect
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.http_server import HttpServer, events_of
from tests.integration.processes import WorkerProcess, paced, wait_until, worker_on
from tests.patience import PATIENCE_S

SLOWLY = {"patch": paced(0.005), "HEADRACE_DRAFT_TOKENS": "0", "HEADRACE_LEASE_S": "30"}
ENDLESS: dict[str, Any] = {"model": "demo", "prompt": "Hello.", "max_tokens": 900, "extra_body": {"ignore_eos": True}}
ENDED = ("completed", "failed", "cancelled", "expired")
ROWS = 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("http")


@pytest.fixture(scope="module")
def worker(server: EmbeddedRedis, directory: Path) -> Iterator[WorkerProcess]:
    with worker_on(server, directory / "worker.log", **SLOWLY) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def http(worker: WorkerProcess, server: EmbeddedRedis, directory: Path) -> Iterator[HttpServer]:
    with HttpServer(directory, server.url) as process:
        yield process


@pytest.fixture
def api(http: HttpServer) -> Iterator[openai.OpenAI]:
    with http.openai() as made:
        yield made


@pytest.fixture
def client(server: EmbeddedRedis) -> Iterator[Client]:
    with Client(redis_url=server.url) as made:
        yield made


def rows(count: int, **body: Any) -> bytes:
    """An input file. The prompt of each row contains its number."""
    lines = [
        {
            "custom_id": f"row {number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "demo", "prompt": f"The river {number}", "max_tokens": 3, **body},
        }
        for number in range(count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def begin(api: openai.OpenAI, content: bytes, **options: Any) -> Any:
    file = api.files.create(file=("rows.jsonl", content), purpose="batch")
    return api.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h", **options)


def wait_ended(api: openai.OpenAI, batch_id: str, condition: Callable[[Any], bool] | None = None) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        batch = api.batches.retrieve(batch_id)
        if batch.status in ENDED or (condition is not None and condition(batch)):
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)


def lines_of(api: openai.OpenAI, file_id: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in api.files.content(file_id).text.splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines)
    return {line["custom_id"]: line for line in lines}


def test_a_file_is_kept_listed_read_and_deleted(api: openai.OpenAI) -> None:
    made = [api.files.create(file=(f"{n}.jsonl", io.BytesIO(b"x" * n)), purpose="batch") for n in (1, 2, 3)]
    assert [(file.bytes, file.filename, file.purpose) for file in made][2] == (3, "3.jsonl", "batch")
    oldest = [file.id for file in api.files.list(order="asc", limit=1)]  # page by page
    assert oldest == [file.id for file in api.files.list()][::-1]
    assert {file.id for file in made} <= set(oldest)
    assert api.files.retrieve(made[1].id) == made[1]
    assert api.files.content(made[1].id).read() == b"xx"
    assert api.files.delete(made[1].id).deleted
    with pytest.raises(openai.NotFoundError):
        api.files.content(made[1].id)
    with pytest.raises(openai.BadRequestError, match="batch"):
        api.files.create(file=("a", b"a"), purpose="vision")
    short = api.files.create(file=("a", b"a"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600})
    assert short.expires_at == short.created_at + 3600
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        api.files.create(file=("a", b"a"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 5})


def test_a_batch_gives_the_results_of_its_rows_one_by_one(api: openai.OpenAI, client: Client) -> None:
    content = rows(20) + rows(22, max_tokens=5000).splitlines(keepends=True)[20] + b"\n"
    several = {"model": "demo", "prompt": ["The river", "The sea"], "max_tokens": 3, "n": 2, "seed": 5}
    content += json.dumps(
        {"custom_id": "several", "method": "POST", "url": "/v1/completions", "body": several}
    ).encode()
    expires_after = {"anchor": "created_at", "seconds": 7_200}
    begun = begin(api, content, metadata={"for": "a test"}, output_expires_after=expires_after)
    assert begun.status in ("validating", "in_progress")
    batch = wait_ended(api, begun.id)
    assert (batch.status, batch.metadata, batch.errors) == ("completed", {"for": "a test"}, None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (22, 21, 1)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times)
    found = lines_of(api, batch.output_file_id)
    assert found.keys() == {"several", *(f"row {n}" for n in range(20))}
    bodies = [line["response"]["body"] for line in found.values()]
    assert batch.usage.output_tokens == sum(body["usage"]["completion_tokens"] for body in bodies)
    one = found["row 7"]["response"]["body"]
    alone = client.submit("The river 7", max_tokens=3, seed=one["seed"]).result(PATIENCE_S)
    assert one["choices"][0]["text"] == alone.text
    (failure,) = lines_of(api, batch.error_file_id).values()
    assert (failure["custom_id"], failure["error"], failure["response"]["status_code"]) == ("row 20", None, 400)
    assert failure["response"]["body"]["error"]["code"] == "context_length_exceeded"
    several = found["several"]["response"]["body"]
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
    pair = [client.submit(p, max_tokens=3, n=2, seed=5).result(PATIENCE_S) for p in ("The river", "The sea")]
    assert [choice["text"] for choice in several["choices"]] == [c.text for result in pair for c in result.choices]
    output = api.files.retrieve(batch.output_file_id)
    assert output.expires_at == output.created_at + 7_200
    assert batch.id in [each.id for each in api.batches.list(limit=1)]
    assert api.files.retrieve(batch.output_file_id).purpose == "batch_output"
    with pytest.raises(openai.ConflictError, match="completed"):
        api.batches.cancel(batch.id)


def test_a_batch_with_invalid_rows_fails_with_their_lines(api: openai.OpenAI) -> None:
    batch = wait_ended(api, begin(api, rows(2) + rows(1, n=0) + b"no json\n" + rows(3, model="gpt-5")).id)
    assert batch.status == "failed"
    assert batch.output_file_id is None
    errors = [(error.line, error.param) for error in batch.errors.data]
    assert errors == [(3, "custom_id"), (4, "line"), (5, "model"), (6, "model"), (7, "model")]


def test_a_row_with_a_wrong_parameter_is_answered_by_the_error_and_the_others_are_computed(api: openai.OpenAI) -> None:
    wrong = {"a": {"n": 0}, "b": {"suffix": "x"}, "c": {"prompt": ["x", 3]}, "d": {"max_completion_tokens": "many"}}
    lines = [json.loads(rows(1, **body)) | {"custom_id": name} for name, body in wrong.items()]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    batch = wait_ended(api, begin(api, content + rows(2)).id)
    assert (batch.status, batch.errors) == ("completed", None)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 4)
    assert len(lines_of(api, batch.output_file_id)) == 2
    failed = lines_of(api, batch.error_file_id)
    assert {line["error"] for line in failed.values()} == {None}
    assert {line["response"]["status_code"] for line in failed.values()} == {400}
    params = {name: line["response"]["body"]["error"]["param"] for name, line in failed.items()}
    assert params == {"a": "n", "b": "suffix", "c": "prompt", "d": "max_completion_tokens"}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": "b" * 513}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"extra_body": {"more": 1}}, "more"),
    ],
)
def test_an_invalid_batch_is_refused(api: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    file = api.files.create(file=("rows.jsonl", rows(1)), purpose="batch")
    asked: dict[str, Any] = {"endpoint": "/v1/completions", "completion_window": "24h", **change}
    with pytest.raises(openai.BadRequestError) as caught:
        api.batches.create(input_file_id=file.id, **asked)
    assert caught.value.param == param
    with pytest.raises(openai.NotFoundError):
        api.batches.create(input_file_id="file-none", endpoint="/v1/completions", completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="gzip"):
        begin(api, b"\x1f\x8b rest")


def test_a_cancelled_batch_keeps_what_is_done_and_ends_its_jobs(api: openai.OpenAI, client: Client) -> None:
    begun = begin(api, rows(400, max_tokens=20, ignore_eos=True))
    with pytest.raises(openai.ConflictError, match="not complete"):
        api.files.delete(begun.input_file_id)
    wait_ended(api, begun.id, lambda batch: batch.request_counts.completed >= 4)
    assert api.batches.cancel(begun.id).status in ("cancelling", "cancelled")
    batch = wait_ended(api, begun.id)
    assert (batch.status, batch.request_counts.total) == ("cancelled", 400)
    assert 4 <= batch.request_counts.completed < 400
    assert len(lines_of(api, batch.output_file_id)) == batch.request_counts.completed
    wait_until(lambda: client.status().delivered == 0 and client.status().queues[0].total == 0)
    api.files.delete(begun.input_file_id)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_ends_in_the_middle_of_a_batch_goes_on_with_it(
    number: signal.Signals, worker: WorkerProcess, server: EmbeddedRedis, tmp_path: Path, client: Client
) -> None:
    with HttpServer(tmp_path, server.url) as own:
        with own.openai() as api:
            begun = begin(api, rows(ROWS, max_tokens=12, ignore_eos=True))
            waiting = begin(api, rows(2))
            wait_ended(api, begun.id, lambda batch: batch.request_counts.completed >= 4)
        code = own.end(number)
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
        own.start()
        with own.openai() as api:
            batch = wait_ended(api, begun.id)
            assert (batch.status, batch.request_counts.completed) == ("completed", ROWS)
            found = lines_of(api, batch.output_file_id)
            assert found.keys() == {f"row {n}" for n in range(ROWS)}
            assert wait_ended(api, waiting.id).request_counts.completed == 2
    for name in ("row 0", f"row {ROWS - 1}"):
        body = found[name]["response"]["body"]
        prompt = f"The river {name.removeprefix('row ')}"
        alone = client.submit(prompt, max_tokens=12, ignore_eos=True, seed=body["seed"]).result(PATIENCE_S)
        assert alone.text == body["choices"][0]["text"]
    assert batch.usage.output_tokens == 12 * ROWS


def test_two_servers_do_not_share_a_directory(http: HttpServer, server: EmbeddedRedis, directory: Path) -> None:
    with pytest.raises(AssertionError, match="another server uses"):
        HttpServer(directory, server.url).start()


# --- connections -----------------------------------------------------------------------------------------------------


def job_ids(server: EmbeddedRedis) -> set[str]:
    """The ids of all jobs that have a record."""
    with connect(server.url) as connection:
        return {key.removeprefix("headrace:job:") for key in connection.scan_iter("headrace:job:*")}


def test_a_closed_stream_cancels_its_jobs(api: openai.OpenAI, server: EmbeddedRedis, client: Client) -> None:
    before = job_ids(server)
    stream = api.completions.create(**{**ENDLESS, "prompt": ["Hello.", "Good morning"]}, stream=True)
    first = next(iter(stream))
    jobs = job_ids(server) - before
    assert first.id.removeprefix("cmpl-") in jobs
    assert len(jobs) == 2
    stream.close()
    assert {client.job(job_id).wait(PATIENCE_S) for job_id in jobs} == {"cancelled"}


def test_a_closed_connection_cancels_what_waits_for_a_whole_completion(
    http: HttpServer, server: EmbeddedRedis, client: Client
) -> None:
    body = {"prompt": "Hello.", "max_tokens": 900, "ignore_eos": True, "n": 4}
    before = job_ids(server)
    with http.http() as plain, pytest.raises(httpx.ReadTimeout):
        plain.post("/v1/completions", json=body, timeout=1.5)
    wait_until(lambda: job_ids(server) - before)
    (whole,) = job_ids(server) - before
    assert client.job(whole).wait(PATIENCE_S) == "cancelled"
    with http.http() as plain, plain.stream("POST", "/execute", json=body) as response:
        name, data = next(events_of(response))
    assert name == "started"
    assert client.job(json.loads(data)["id"]).wait(PATIENCE_S) == "cancelled"


def test_a_stopping_server_cancels_requests_that_do_not_end_in_time(
    worker: WorkerProcess, server: EmbeddedRedis, tmp_path: Path, client: Client
) -> None:
    with HttpServer(tmp_path, server.url, HEADRACE_SOFT_SHUTDOWN_S="1") as own, own.openai() as api:
        stream = api.completions.create(**ENDLESS, stream=True)
        job = client.job(next(iter(stream)).id.removeprefix("cmpl-"))
        assert own.end(signal.SIGTERM) == 0
        assert job.wait(PATIENCE_S) == "cancelled"
        stream.close()


def test_a_job_cancelled_by_another_client_is_an_error(api: openai.OpenAI, client: Client) -> None:
    stream = api.completions.create(**ENDLESS, stream=True)
    job = client.job(next(iter(stream)).id.removeprefix("cmpl-"))
    assert job.cancel()
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "cancelled"


def test_without_keys_the_jobs_of_other_programs_are_listed_and_can_be_cancelled(
    http: HttpServer, client: Client
) -> None:
    job = client.submit("Hello.", max_tokens=900, ignore_eos=True, priority="bulk")
    with http.http() as plain:
        assert job.id in [each["id"] for each in plain.get("/jobs.json?limit=100").json()["data"]]
        assert plain.get("/jobs.json", params={"search": job.id}).json()["data"][0]["state"] in ("queued", "running")
        assert plain.post(f"/jobs/{job.id}/cancel").status_code == 200
        assert job.wait(PATIENCE_S) == "cancelled"
        assert plain.get("/jobs.json", params={"search": job.id}).json()["data"][0]["state"] == "cancelled"


def test_a_request_that_times_out_is_a_504_and_not_retried(http: HttpServer) -> None:
    with http.openai(max_retries=2) as patient:
        with pytest.raises(openai.APIStatusError) as caught:
            patient.completions.create(**{**ENDLESS, "extra_body": {"ignore_eos": True, "timeout_s": 0.5}})
        assert (caught.value.status_code, caught.value.code) == (504, "expired")
        assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_full_queue_and_a_silent_worker(
    worker: WorkerProcess, server: EmbeddedRedis, tmp_path: Path, client: Client
) -> None:
    """The worker is stopped, so requests wait in the queue, which holds one job."""
    with HttpServer(tmp_path, server.url, "--timeout", "0.5", HEADRACE_MAX_QUEUE="1") as own, own.openai() as api:
        worker.signal(signal.SIGSTOP)
        try:
            answers: list[Any] = []
            body: dict[str, Any] = {"model": "demo", "prompt": "Hello."}

            def ask() -> None:
                try:
                    api.completions.create(**body)
                except openai.APIStatusError as error:
                    answers.append(error)

            asking = threading.Thread(target=ask)
            asking.start()
            wait_until(lambda: client.status().queues[0].total >= 1)
            with pytest.raises(openai.RateLimitError) as full:
                api.completions.create(**body)
            assert full.value.code == "queue_full"
            assert full.value.response.headers["retry-after"] == "5"
            asking.join()
        finally:
            worker.signal(signal.SIGCONT)
        assert [error.status_code for error in answers] == [504]
        assert answers[0].response.headers["x-should-retry"] == "false"

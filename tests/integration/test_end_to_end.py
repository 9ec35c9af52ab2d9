"""From the client through Redis and a real worker process and back."""

from __future__ import annotations

import random
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.result import AsyncResult

from headrace.client import (
    Client,
    InvalidRequest,
    Job,
    JobCancelled,
    JobExpired,
    JobFailed,
    NoCheckpoints,
    NoWorker,
    ResultTimeout,
    UnknownJob,
)
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.config import Settings
from headrace.model import load_tokenizer
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.conftest import Reference
from tests.integration.processes import WorkerProcess, wait_until
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.usefixtures("worker")

LONG = {"max_tokens": 900, "temperature": 1, "seed": 7, "ignore_eos": True}


def sent_by_celery(client: Client, app: Celery, args: list[object], **options: object) -> Job:
    """Send a job without the client: it has no record until a worker receives it."""
    job_id = uuid.uuid4().hex
    app.send_task("headrace.generate", args=args, task_id=job_id, **options)
    wait_until(lambda: client._redis.exists(keys.result(job_id)))
    return client.job(job_id)


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return connect(redis_url)


def test_checkpoint_12_with_a_real_redis(
    own_server: EmbeddedRedis, own_client: Client, reference: Reference, tmp_path: Path
) -> None:
    """The worker is a separate program, as a user starts it."""
    with WorkerProcess(tmp_path / "worker.log", bare=True, HEADRACE_REDIS_URL=own_server.url):
        result = own_client.submit("Hello.", max_tokens=10, temperature=0).result(timeout=PATIENCE_S)
    expected = reference([15496, 13], 10)
    assert result.choices[0].token_ids == expected
    assert result.text == load_tokenizer("demo").decode(expected)
    assert result.usage.model_dump() == {"prompt_tokens": 2, "completion_tokens": 10, "total_tokens": 12}
    assert "f41244398561" in result.fingerprint


def test_sixty_four_mixed_jobs_at_once_equal_the_same_jobs_one_by_one(client: Client) -> None:
    rng = random.Random(5)
    words = [
        "the",
        "and",
        "of",
        "a",
        "to",
        "she",
        "was",
        "in",
        "that",
        "Holmes",
        "river",
        "Alice",
        "said",
        "upon",
        "old",
        "house",
    ]
    requests = [
        {
            "prompt": " ".join(rng.choice(words) for _ in range(rng.choice([0, 1, 4, 30, 200]))),
            "max_tokens": rng.randint(1, 20),
            "temperature": rng.choice([0, 0.5, 1.0]),
            "top_p": rng.choice([1.0, 0.9]),
            "top_k": rng.choice([0, 40]),
            "seed": i,
            "n": rng.choice([1, 1, 2]),
            "logprobs": rng.choice([None, 2]),
            "frequency_penalty": rng.choice([0, 0.5]),
        }
        for i in range(64)
    ]
    together = [job.result(PATIENCE_S) for job in client.submit_many(requests)]
    alone = [client.submit(**request).result(PATIENCE_S) for request in requests]
    assert [result.choices for result in together] == [result.choices for result in alone]


@pytest.mark.parametrize("prompt", ["", "a", "Once upon a time", [464]], ids=["empty", "one token", "four", "ids"])
def test_prompts_of_every_size_equal_transformers(
    client: Client, reference: Reference, prompt: str | list[int]
) -> None:
    ids = (load_tokenizer("demo").encode(prompt) or [50256]) if isinstance(prompt, str) else prompt
    result = client.submit(prompt, max_tokens=6, temperature=0, ignore_eos=True).result(PATIENCE_S)
    assert result.choices[0].token_ids == reference(ids, 6)


def test_a_prompt_that_fills_the_context(client: Client, reference: Reference) -> None:
    prompt = load_tokenizer("demo").encode("The sea was calm and the night was long. " * 200)[:1023]
    assert client.submit(prompt, max_tokens=1, temperature=0).result(PATIENCE_S).choices[0].token_ids == reference(
        prompt, 1
    )


def test_a_prompt_over_the_context_fails_with_both_numbers(client: Client) -> None:
    job = client.submit([464] * 1020, max_tokens=10)
    with pytest.raises(JobFailed, match=r"1020 tokens and max_tokens is 10.*at most 1024") as caught:
        job.result(PATIENCE_S)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.job is job
    assert job.status() == "failed"


def test_a_token_id_outside_the_vocabulary_fails_the_job(client: Client) -> None:
    with pytest.raises(JobFailed, match=r"50257.*50256") as caught:
        client.submit([50257], max_tokens=1).result(PATIENCE_S)
    assert caught.value.code == "invalid_token_id"


def test_states_from_queued_to_succeeded(client: Client, worker: WorkerProcess) -> None:
    with worker.slowly():
        job = client.submit("Hello.", **LONG)
        wait_until(lambda: job.status() != "queued")
        assert job.status() == "running"
    assert client.job(job.id).result(PATIENCE_S).usage.completion_tokens == 900
    assert client.job(job.id).status() == "succeeded"


def test_cancelling_a_running_job_ends_it_with_its_text_so_far(client: Client, worker: WorkerProcess) -> None:
    with worker.slowly():
        job = client.submit("Hello.", **LONG)
        wait_until(lambda: job.status() == "running")
        assert job.cancel()
        with pytest.raises(JobCancelled) as caught:
            job.result(PATIENCE_S)
    assert caught.value.partial
    assert job.status() == "cancelled"
    assert not job.cancel()


def test_a_job_cancelled_before_a_worker_meets_it_is_never_computed(client: Client, connection: redis.Redis) -> None:
    connection.set(keys.cancel("cancelled-early"), "1")
    with pytest.raises(JobCancelled, match="before it started"):
        client.submit("Hello.", id="cancelled-early").result(PATIENCE_S)


def test_celerys_own_revoke_stops_one_row(settings: Settings, client: Client, worker: WorkerProcess) -> None:
    from headrace.worker.celery import make_app

    app = make_app(settings)
    with worker.slowly():
        job, neighbour = client.submit("Hello.", **LONG), client.submit("Hello.", **{**LONG, "max_tokens": 200})
        wait_until(lambda: job.status() == "running")
        app.control.revoke(job.id, terminate=True)
        with pytest.raises(JobCancelled):
            job.result(PATIENCE_S)
    assert neighbour.result(PATIENCE_S).usage.completion_tokens == 200
    assert app.control.inspect(timeout=PATIENCE_S, limit=1).ping()
    app.close()


def test_jobs_of_one_message_are_cancelled_revoked_and_fail_alone(
    settings: Settings, client: Client, worker: WorkerProcess
) -> None:
    from headrace.worker.celery import make_app

    app = make_app(settings)
    requests: list[dict[str, Any]] = [{"prompt": "Hello."} for _ in range(5)]
    requests[3] = {"prompt": [60000]}
    requests[4] = {"prompt": "Hello.", "max_tokens": 200}
    with worker.slowly():
        cancelled, revoked, expired, bad, good = client.submit_many(
            [{**LONG, **request, "timeout_s": 0.3 if i == 2 else None} for i, request in enumerate(requests)]
        )
        wait_until(lambda: cancelled.status() == revoked.status() == "running")
        assert cancelled.cancel()
        app.control.revoke(revoked.id)
        with pytest.raises(JobCancelled) as caught:
            cancelled.result(PATIENCE_S)
        assert caught.value.partial
        with pytest.raises(JobCancelled, match="revoked through Celery"):
            revoked.result(PATIENCE_S)
        with pytest.raises(JobFailed, match="60000"):
            bad.result(PATIENCE_S)
        with pytest.raises(JobExpired):
            expired.result(PATIENCE_S)
    assert good.result(PATIENCE_S).usage.completion_tokens == 200
    assert AsyncResult(good.id, app=app).get(timeout=PATIENCE_S)["usage"]["completion_tokens"] == 200
    assert [AsyncResult(job.id, app=app).state for job in (revoked, bad)] == ["REVOKED", "FAILURE"]
    with pytest.raises(JobFailed, match="60000"):
        AsyncResult(bad.id, app=app).get(timeout=PATIENCE_S)
    app.close()


def test_revoking_a_message_ends_all_its_jobs(settings: Settings, client: Client, worker: WorkerProcess) -> None:
    from headrace.worker.celery import make_app

    app = make_app(settings)
    with worker.slowly():
        jobs = client.submit_many(["Hello."] * 3, **LONG)
        wait_until(lambda: all(job.status() == "running" for job in jobs))
        (active,) = app.control.inspect(timeout=PATIENCE_S, limit=1).active().values()
        (message,) = [task["id"] for task in active if task["name"] == "headrace.generate_many"]
        app.control.revoke(message, terminate=True)
        for job in jobs:
            with pytest.raises(JobCancelled, match="revoked through Celery"):
                job.result(PATIENCE_S)
    waits = uuid.uuid4().hex
    app.control.revoke(waits)
    late = [{"id": f"{waits}:{i}", "request": {"prompt": "Hello."}} for i in range(2)]
    app.send_task("headrace.generate_many", args=[late], task_id=waits)
    for entry in late:
        wait_until(lambda name=entry["id"]: client._redis.exists(keys.result(name)))
        with pytest.raises(JobCancelled):
            client.job(str(entry["id"])).result(1)
    app.close()


def test_an_async_result_hears_of_the_end_of_a_job_in_a_group(settings: Settings, client: Client) -> None:
    from headrace.worker.celery import make_app

    app = make_app(settings)
    names = [uuid.uuid4().hex for _ in range(2)]
    waiting = [AsyncResult(name, app=app) for name in names]
    app.backend.result_consumer.start(names[0])
    client.submit_many([{"prompt": "Hello.", "id": name, "max_tokens": 3, "ignore_eos": True} for name in names])
    assert [result.get(timeout=PATIENCE_S)["usage"]["completion_tokens"] for result in waiting] == [3, 3]
    app.backend.result_consumer.stop()
    app.backend.client.close()
    app.close()


def test_a_job_past_its_timeout_is_expired(client: Client, worker: WorkerProcess) -> None:
    with worker.slowly():
        job = client.submit("Hello.", timeout_s=0.3, **LONG)
        with pytest.raises(JobExpired):
            job.result(PATIENCE_S)
    assert job.status() == "expired"


def test_celerys_own_time_limit_is_kept(settings: Settings, client: Client, worker: WorkerProcess) -> None:
    from headrace.worker.celery import make_app

    app = make_app(settings)
    with worker.slowly():
        job = sent_by_celery(client, app, [{"prompt": "Hello.", **LONG}], time_limit=0.2)
        with pytest.raises(JobExpired, match="time limit"):
            job.result(PATIENCE_S)
    app.close()


def test_plain_celery_gets_the_result_and_the_exception(settings: Settings, client: Client) -> None:
    from headrace.worker.celery import make_app

    app = make_app(settings)
    good, bad = client.submit("Hello.", max_tokens=3, temperature=0), client.submit([60000])
    assert (
        AsyncResult(good.id, app=app).get(timeout=PATIENCE_S)["choices"][0]["token_ids"]
        == good.result().choices[0].token_ids
    )
    with pytest.raises(JobFailed, match="60000"):
        AsyncResult(bad.id, app=app).get(timeout=PATIENCE_S)
    app.close()


def test_plain_celery_may_send_values_that_ask_for_nothing(settings: Settings, client: Client) -> None:
    from headrace.worker.celery import make_app

    app = make_app(settings)
    request = {"prompt": "Hello.", "max_tokens": 8.0, "seed": -1, "n": None, "use_beam_search": False, "priority": 0}
    found = sent_by_celery(client, app, [request]).result(PATIENCE_S)
    app.close()
    assert found.seed != -1
    assert client.submit("Hello.", max_tokens=8, seed=found.seed).result(PATIENCE_S).choices == found.choices
    again = [client.submit("Hello.", max_tokens=8, seed=-1).result(PATIENCE_S).seed for _ in range(2)]
    assert -1 not in again
    assert again[0] != again[1]


def test_a_message_that_no_client_could_send_fails_its_job(settings: Settings, client: Client) -> None:
    from headrace.worker.celery import make_app

    app = make_app(settings)
    cases = [
        ([{"prompt": "x", "max_tokens": "many"}], "invalid_request"),
        ([{"prompt": "x", "schema_version": 99}], "unsupported_version"),
        ([["not", "a", "request"]], "invalid_request"),
        ([{"prompt": "x", "colour": "red"}], "invalid_request"),
    ]
    for args, code in cases:
        with pytest.raises(JobFailed) as caught:
            sent_by_celery(client, app, args).result(PATIENCE_S)
        assert caught.value.code == code
    app.close()


def test_unknown_job_no_worker_and_timeout_are_three_errors(
    settings: Settings, client: Client, worker: WorkerProcess
) -> None:
    with pytest.raises(UnknownJob, match="never-was"):
        client.job("never-was").result(1)
    with pytest.raises(UnknownJob):
        client.job("never-was").status()
    with Client(settings=settings, model="unserved") as elsewhere:
        job = elsewhere.submit("Hello.")
        with pytest.raises(NoWorker, match=r"headrace\.unserved.*headrace up --model unserved`"):
            job.result(0.2)
        assert job.status() == "queued"
    with worker.slowly():
        slow = client.submit("Hello.", **LONG)
        with pytest.raises(ResultTimeout, match="it continues") as caught:
            slow.result(0.05)
        assert not isinstance(caught.value, NoWorker)
        slow.cancel()


def test_as_completed_gives_each_job_once_as_it_ends(client: Client) -> None:
    jobs = client.submit_many([{"prompt": "Hello.", "max_tokens": n, "temperature": 0} for n in (200, 1, 30)])
    ended = list(client.as_completed(jobs, timeout=PATIENCE_S))
    assert sorted(job.id for job in ended) == sorted(job.id for job in jobs)
    assert ended[-1] is jobs[0]
    assert all(job.result(0).usage.completion_tokens for job in ended)


def test_the_same_id_and_request_is_the_same_job(client: Client) -> None:
    first = client.submit("Hello.", id="mine", max_tokens=4)
    seed = first.result(PATIENCE_S).seed
    assert client.submit("Hello.", id="mine", max_tokens=4).result(PATIENCE_S).seed == seed


def test_waiting_for_many_jobs_takes_one_connection_and_no_channel(client: Client, connection: redis.Redis) -> None:
    def ours() -> set[str]:
        return {str(entry["id"]) for entry in connection.client_list()}

    before, channels = ours(), set(connection.pubsub_channels())
    jobs = client.submit_many(["Hello."] * 50, max_tokens=100, temperature=0, ignore_eos=True)
    submitted = ours()
    for job in client.as_completed(jobs, timeout=PATIENCE_S):
        assert len(ours() - before) <= 2  # kombu's for publishing, redis-py's for reading
        assert job.status() == "succeeded"
    assert len(submitted - before) <= 2
    assert set(connection.pubsub_channels()) == channels


def test_priority_goes_first(client: Client, worker: WorkerProcess) -> None:
    """A worker that is full takes an interactive job before bulk jobs that came earlier."""
    with worker.slowly():
        bulk = client.submit_many(["Hello."] * 200, max_tokens=60, ignore_eos=True, temperature=0, priority="bulk")
        urgent = client.submit("Hello.", max_tokens=1, priority="interactive")
        urgent.result(PATIENCE_S)
        assert sum(job.status() == "succeeded" for job in bulk) < 190
    for _ in client.as_completed(bulk, timeout=PATIENCE_S):
        pass


def test_status_shows_the_worker_and_its_slots(client: Client) -> None:
    status = client.status()
    assert [(worker.model, worker.slots) for worker in status.workers] == [("demo", 64)]
    assert status.queues[0].model == "demo"


def test_nothing_is_left_unacknowledged(client: Client, connection: redis.Redis) -> None:
    client.submit("Hello.", max_tokens=2).result(PATIENCE_S)
    wait_until(lambda: connection.hlen(keys.unacked()) == 0)
    assert connection.zcard(keys.unacked_index()) == 0


def test_workers_do_not_receive_the_heartbeats_of_others(connection: redis.Redis, worker: WorkerProcess) -> None:
    """Otherwise the traffic of Redis would grow with the square of the number of workers."""
    with connection.pubsub() as here:
        here.psubscribe("*")
        heard = (message["channel"] for message in here.listen() if message["type"] == "pmessage")
        channel = next(channel for channel in heard if "heartbeat" in channel)
        assert connection.publish(channel, "{}") == 1, "only this test"


def test_the_log_has_the_events_and_no_text(client: Client, worker: WorkerProcess) -> None:
    job = client.submit("Peculiar zebra 7312", max_tokens=5, temperature=0)
    text = job.result(PATIENCE_S).text
    wait_until(lambda: any(line["job_id"] == job.id for line in worker.events("job.finished")))
    log = worker.text()
    assert "zebra 7312" not in log
    assert text.strip() not in log


def test_every_key_has_a_lifetime(client: Client, connection: redis.Redis) -> None:
    client.submit("Hello.", max_tokens=2).result(PATIENCE_S)
    time.sleep(0.3)
    ours = [
        key
        for kind in ("job", "cancel", "worker", "celery-task-meta")
        for key in connection.scan_iter(f"{keys.PREFIX}{kind}*")
    ]
    eternal = [
        key for key in ours if connection.ttl(key) < 0 and key != keys.workers() and "cancelled-early" not in key
    ]
    assert ours
    assert eternal == []


def test_a_job_keeps_its_checkpoints_when_asked_and_not_otherwise(client: Client, connection: redis.Redis) -> None:
    asked = client.submit("Hello.", max_tokens=3, temperature=0, checkpoints=[2, 10])
    tokens = asked.result(PATIENCE_S).choices[0].token_ids
    tensors = client.job(asked.id).checkpoints()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        **dict.fromkeys("qkv", (2, 2, 64)),
        "next_token": (),
    }
    assert int(tensors["next_token"]) == tokens[0]
    assert 0 < connection.ttl(keys.checkpoint(asked.id)) <= 3600  # type: ignore[operator]
    among = client.submit_many([{"prompt": "Hello.", "checkpoints": [10]}, "Hello."], max_tokens=3, temperature=0)
    among[0].result(PATIENCE_S)
    assert int(among[0].checkpoints()["next_token"]) == tokens[0]
    plain = client.submit("Hello.", max_tokens=3)
    plain.result(PATIENCE_S)
    with pytest.raises(NoCheckpoints, match="checkpoints='all'"):
        plain.checkpoints()


def test_the_status_shows_running_samples_and_failures_without_job_ids(client: Client, worker: WorkerProcess) -> None:
    failing = client.submit([60_000], max_tokens=1)
    assert failing.wait(timeout=PATIENCE_S) == "failed"
    with worker.slowly():
        jobs = client.submit_many(["Hello."] * 90, max_tokens=900, ignore_eos=True)
        tags = {keys.tag(job.id) for job in jobs}
        deadline, rows = time.monotonic() + PATIENCE_S, []
        while not rows and time.monotonic() < deadline:
            rows = [row for row in client.status().workers[0].rows if row.job in tags]
        record = client._redis.hgetall(keys.worker(client.status().workers[0].name))
        client.cancel(jobs)
    assert rows
    assert all(row.prompt == 2 and row.most == 900 and row.written <= 900 for row in rows)
    (failure,) = [f for f in client.status().workers[0].failures if f.job == keys.tag(failing.id)]
    assert failure.code == "invalid_token_id"
    assert not any(job.id in str(record) for job in (failing, *jobs))
    for job in jobs:
        job.wait(timeout=PATIENCE_S)


def test_scores_stream_in_order_and_answers_are_chosen_by_them(client: Client) -> None:
    """Values are compared with other code in tests/unit/worker/engine/test_scoring.py; here they come through Redis."""
    pairs: list[Any] = [("The king", " had"), {"prompt": "The king ", "continuation": "had"}, ("", "Hello"), ([5], [6])]
    scores = list(client.score_many(iter(pairs * 3), max_inflight=5))
    assert scores == [client.score("The king", " had"), *scores[1:4]] * 3
    assert scores[0].logprob == scores[1].logprob
    assert [score.characters for score in scores[:4]] == [4, 3, 5, 1]
    answers = [" the", " zebra"]
    likeliest = max(answers, key=lambda answer: client.score("He went to", answer).logprob)
    assert (
        client.choose("He went to", answers) == likeliest == client.choose(["He went to"], answers, normalize="byte")[0]
    )


@pytest.mark.parametrize(
    ("pair", "field"),
    [
        (("a", ""), "continuation"),
        (("a", [5]), "continuation"),
        (("a", None), "continuation"),
        ("ab", "pair"),
        ({"prompt": "a", "continuation": "b", "n": 2}, "continuation"),
        ({"prompt": "a", "continuation": "b" * 131_073}, "continuation"),
    ],
)
def test_a_pair_that_cannot_be_scored_is_named(client: Client, pair: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        list(client.score_many([("a", " b"), pair]))
    assert caught.value.field == f"pairs[1].{field}"

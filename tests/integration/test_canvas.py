"""Jobs in Celery's canvases, together with a user's tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.contrib.testing.worker import start_worker
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import AsyncResult

from headrace.client import Client, InvalidRequest, JobCancelled, JobFailed
from tests.integration.processes import WorkerProcess
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.usefixtures("worker")

FIELDS = {"max_tokens": 5, "temperature": 0}
TEXT = '\n\n"I am'


@pytest.fixture
def mine(client: Client) -> Iterator[Celery]:
    """A user's app, with a task and a worker for it."""
    app = client.celery_app

    @app.task(name="canvas.join", shared=False)
    def join(results: Any, last: str = "") -> str:
        found = results if isinstance(results, list) else [results]
        return "|".join(result["choices"][0]["text"] for result in found) + last

    @app.task(name="canvas.note", shared=False)
    def note() -> str:
        return "noted"

    app.conf.worker_prefetch_multiplier = 1
    with start_worker(app, pool="solo", queues=["mine"], perform_ping_check=False, shutdown_timeout=20):
        yield app


def test_a_group_gives_a_result_for_each(client: Client) -> None:
    jobs = group(client.signature(prompt, **FIELDS) for prompt in ("Hello.", "Hello."))()
    assert [result["choices"][0]["text"] for result in jobs.get(timeout=PATIENCE_S)] == [TEXT, TEXT]


def test_plain_async_result_by_id(client: Client) -> None:
    job = client.submit("Hello.", **FIELDS)
    assert AsyncResult(job.id, app=client.celery_app).get(timeout=PATIENCE_S)["choices"][0]["text"] == TEXT
    bad = client.submit([60_000])
    with pytest.raises(JobFailed) as caught:
        AsyncResult(bad.id, app=client.celery_app).get(timeout=PATIENCE_S)
    assert caught.value.code == "invalid_token_id"


def test_a_signature_is_a_job_under_its_id(client: Client) -> None:
    client.signature("Hello.", id="canvas:named", **FIELDS).apply_async()
    assert AsyncResult("canvas:named", app=client.celery_app).get(timeout=PATIENCE_S)["id"] == "canvas:named"
    assert client.job("canvas:named").result(5).text == TEXT
    assert "Hello" not in repr(client.signature("Hello.").options)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        client.signature("Hello.", max_new_tokens=3)


def test_a_chord_calls_the_users_task_when_all_jobs_are_done(client: Client, mine: Celery) -> None:
    join = mine.tasks["canvas.join"]
    done = chord([client.signature("Hello.", **FIELDS), client.signature("Hello.", **FIELDS)])(
        join.s(last="!").set(queue="mine")
    )
    assert done.get(timeout=PATIENCE_S) == f"{TEXT}|{TEXT}!"
    after = chain(client.signature("Hello.", **FIELDS), join.s().set(queue="mine"))()
    assert after.get(timeout=PATIENCE_S) == TEXT


def test_a_chain_runs_jobs_in_their_order(client: Client) -> None:
    last = chain(client.signature("Hello.", **FIELDS), client.signature([15496, 13], **FIELDS))()
    assert last.get(timeout=PATIENCE_S)["choices"][0]["text"] == TEXT
    assert last.parent.get(timeout=PATIENCE_S)["id"] == last.parent.id


def test_a_signature_sent_to_the_queue_of_another_model_fails(client: Client, worker: WorkerProcess) -> None:
    signature = client.signature("Hello.", id="canvas:elsewhere", model="demo", **FIELDS)
    signature.clone(headers={"model": "other"}).apply_async()
    with pytest.raises(JobFailed, match="its header 'model' names 'other'"):
        AsyncResult("canvas:elsewhere", app=client.celery_app).get(timeout=PATIENCE_S)


def test_a_refused_message_fails_its_chord_and_its_chain_and_calls_its_link_error(client: Client, mine: Celery) -> None:
    join = mine.tasks["canvas.join"].s().set(queue="mine")
    good, bad = client.signature("Hello.", **FIELDS), client.signature("Hello.", **FIELDS).set(soft_time_limit=9)
    with pytest.raises(ChordError, match="soft_time_limit"):
        AsyncResult(chord([good, bad])(join).id, app=mine).get(timeout=PATIENCE_S)
    with pytest.raises(JobFailed, match="soft_time_limit"):
        AsyncResult(chain(bad.clone(task_id="canvas:first"), join)().id, app=mine).get(timeout=PATIENCE_S)
    called = mine.tasks["canvas.note"].si().set(queue="mine", task_id="canvas:called")
    bad.clone(task_id="canvas:linked").apply_async(link_error=called)
    assert AsyncResult("canvas:called", app=mine).get(timeout=PATIENCE_S) == "noted"


def test_celery_map_computes_each_and_the_options_of_a_single_job_are_honoured(client: Client) -> None:
    signature = client.celery_app.signature("headrace.generate")
    requests = [{"prompt": "Hello.", **FIELDS}] * 2
    mapped = client.celery_app.send_task(
        "celery.map", kwargs={"task": signature, "it": requests}, queue="headrace.demo", argsrepr="", kwargsrepr=""
    )
    assert [result["choices"][0]["text"] for result in mapped.get(timeout=PATIENCE_S)] == [TEXT, TEXT]
    options = {"shadow": "a name", "retries": 2, "time_limit": 600, "expires": 600, "reply_to": "somebody"}
    assert (
        client.signature("Hello.", **FIELDS).apply_async(**options).get(timeout=PATIENCE_S)["choices"][0]["text"]
        == TEXT
    )
    expired = client.signature("Hello.", **FIELDS).apply_async(expires=-1)
    with pytest.raises(TaskRevokedError, match="expired"):
        expired.get(timeout=PATIENCE_S)
    with pytest.raises(JobCancelled, match="`expires` of its Celery message passed"):
        client.job(expired.id).result(PATIENCE_S)

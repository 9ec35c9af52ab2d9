"""The service behind the tasks: untrusted requests, checkpoint tensors, result records, and the result writer."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import weakref
from concurrent.futures import Future
from typing import Any, ClassVar

import pytest
import redis
from celery.exceptions import Ignore, TaskRevokedError

from headrace.client.wire.errors import JobCancelled, JobFailed
from headrace.client.wire.requests import GenerateRequest, parse_request
from headrace.client.wire.results import Result, Timings, Usage, parse_outcome
from headrace.client.wire.signing import sign
from headrace.config import load_settings
from headrace.worker.celery import make_app
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.jobs.result_writer import ResultWriter
from headrace.worker.jobs.service import Service, failed
from headrace.worker.queue.messages import read_group, read_wire
from tests.integration.processes import wait_until
from tests.patience import PATIENCE_S
from tests.unit.worker.engine.engine_helpers import models_of
from tests.unit.worker.jobs.memory_store import MemoryStore


def service(store: MemoryStore, limit: int = 10) -> Service:
    return Service(models_of(None), store=store, checkpoint_max_bytes=limit)


def test_tensors_within_the_cap_are_kept() -> None:
    store = MemoryStore()
    service(store)._save_tensors("a", {"q": b"12345"})
    assert store.tensors == {"a": {"q": b"12345"}}


def test_celerys_own_pools_compute_no_job_that_has_ended_or_was_cancelled() -> None:
    """There is no engine: computing would raise another error."""
    store = MemoryStore(results={"ended": "as it ended"}, cancels={"cancelled"})
    with pytest.raises(Ignore):
        service(store).generate("ended", {"prompt": "Hello."}, look_up=True)
    with pytest.raises(JobCancelled):
        service(store).generate("cancelled", {"prompt": "Hello."}, look_up=True)


def test_tensors_over_the_cap_fail_the_job_with_both_numbers() -> None:
    store = MemoryStore()
    with pytest.raises(JobFailed, match=r"take 12 bytes and a job may keep 10") as caught:
        service(store)._save_tensors("a", {"q": b"123456", "k": b"123456"})
    assert caught.value.code == "checkpoints_too_large"
    assert store.tensors == {}


def test_a_redis_that_refuses_the_tensors_fails_the_job_and_one_that_is_away_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Flaky(MemoryStore):
        def __init__(self, *answers: redis.RedisError | None) -> None:
            super().__init__()
            self.answers = list(answers)

        def save_tensors(self, job_id: str, tensors: Any) -> None:
            if error := self.answers.pop(0):
                raise error
            super().save_tensors(job_id, tensors)

    monkeypatch.setattr("headrace.worker.jobs.retry.RETRY_S", 0.0)
    store = Flaky(redis.ConnectionError("away"), None)
    service(store)._save_tensors("a", {"q": b"1"})
    assert store.tensors == {"a": {"q": b"1"}}
    full = Flaky(redis.ResponseError("OOM command not allowed"))
    with pytest.raises(JobFailed, match="OOM") as caught:
        service(full)._save_tensors("a", {"q": b"1"})
    assert caught.value.code == "checkpoints_not_stored"


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (None, "invalid_request"),
        ([1, 2], "invalid_request"),
        ("text", "invalid_request"),
        ({}, "invalid_request"),
        ({"prompt": "x", "schema_version": 2}, "unsupported_version"),
        ({"prompt": "x", "schema_version": {"deep": 1}}, "unsupported_version"),
        ({"prompt": "x", "schema_version": 0}, "unsupported_version"),
        ({"prompt": "x", "max_tokens": 10**400}, "invalid_request"),
        ({"prompt": {"deep": [[[]]]}}, "invalid_request"),
        ({"prompt": "x", "__class__": "os.system"}, "invalid_request"),
        ({1: 2, "prompt": "x"}, "invalid_request"),
    ],
)
def test_invalid_requests_are_refused_with_a_code(wire: Any, code: str) -> None:
    with pytest.raises(JobFailed) as caught:
        read_wire(wire)
    assert caught.value.code == code


def test_a_good_request_is_read() -> None:
    assert read_wire({"prompt": "x", "schema_version": 1}) == parse_request({"prompt": "x"})


def test_the_next_worker_reads_the_requests_of_this_client(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = parse_request({"prompt": "x", "max_tokens": 3}).to_wire()
    for module in ("headrace.client.wire.requests", "headrace.worker.queue.messages"):
        monkeypatch.setattr(f"{module}.SCHEMA_VERSION", 2)
    assert read_wire(stored).max_tokens == 3
    with pytest.raises(JobFailed, match="reads none above 2"):
        read_wire({**stored, "schema_version": 3})


@pytest.mark.parametrize(
    ("group", "jobs"),
    [
        (None, {}),
        ({"id": "a"}, {"a": None}),
        ("text", {}),
        ([], {}),
        ([1, None, "x", ["id", "a"]], {}),
        ([{"request": {}}, {"id": 7}, {"id": ""}, {"id": "with space"}, {"id": "x" * 129}, {"id": {"a": 1}}], {}),
        ([{"id": "a", "request": 1}, {"id": "a", "request": 2}, {"id": "b", "colour": "red"}], {"a": 1, "b": None}),
    ],
)
def test_each_job_of_a_group_with_a_valid_id_is_read_once(group: Any, jobs: dict[str, Any]) -> None:
    assert read_group(group) == jobs


def result(job_id: str) -> Result:
    usage = Usage(prompt_tokens=1, completion_tokens=0, total_tokens=1)
    timings = Timings(waiting_s=0, prefill_s=0, decode_s=0)
    return Result(id=job_id, model="m", choices=[], seed=0, usage=usage, timings=timings)


class Scripted:
    """An engine that ends each job as its prompt says."""

    def submit(self, request: Any, *, job_id: str, **_: Any) -> Future[Result]:
        if request.prompt == "stop":
            return failed(EngineStopped("now"))
        if request.prompt == "fail":
            return failed(JobFailed("nan_logits", "no numbers"))
        future: Future[Result] = Future()
        future.set_result(result(job_id))
        return future


def told(job_id: str, outcome: Any) -> str:
    return f"{job_id} {type(outcome).__name__}"


def test_a_group_without_the_pool_stores_each_job_and_leaves_those_that_ended_alone() -> None:
    store = MemoryStore(results={"before": "as it ended"}, cancels={"cancelled"})
    running = Service(models_of(Scripted()), store, checkpoint_max_bytes=10)
    jobs = {"good": "x", "bad": "fail", "before": "x", "cancelled": "x"}
    group: list[Any] = [{"id": name, "request": {"prompt": prompt}} for name, prompt in jobs.items()]
    running.generate_many([*group, {"id": "unread", "request": [1]}, 5], told)
    assert store.results == {
        "good": "good Result",
        "bad": "bad JobFailed",
        "before": "as it ended",
        "cancelled": "cancelled JobCancelled",
        "unread": "unread JobFailed",
    }


def test_a_group_whose_engine_stops_keeps_the_results_it_has() -> None:
    store = MemoryStore()
    running = Service(models_of(Scripted()), store, checkpoint_max_bytes=10)
    with pytest.raises(EngineStopped):
        running.generate_many([{"id": n, "request": {"prompt": n}} for n in ("x", "stop", "y")], told)
    assert store.results == {"x": "x Result"}


@pytest.mark.parametrize(
    "outcome", [result("a"), JobFailed("nan_logits", "no numbers", ["half"]), TaskRevokedError("r")]
)
def test_records_are_those_that_celerys_backend_stores(outcome: Any) -> None:
    """Against `mark_as_done`, `mark_as_failure` and `mark_as_revoked` of Celery itself."""
    app = make_app(load_settings(redis_url="redis://localhost:1/0"))
    kept: list[str] = []
    app.backend._get_task_meta_for = lambda _: {"status": "PENDING"}
    app.backend._set_with_state = lambda key, value, state: kept.append(value)
    if isinstance(outcome, Result):
        app.backend.mark_as_done("a", outcome.model_dump(mode="json"))
    elif isinstance(outcome, JobFailed):
        app.backend.mark_as_failure("a", outcome)
    else:
        app.backend.mark_as_revoked("a", "r")
    expected, ours = json.loads(kept[0]), json.loads(app.backend.record("a", outcome))
    assert expected.pop("date_done")[:16] == ours.pop("date_done")[:16]
    assert ours == expected
    app.close()


@pytest.mark.parametrize("ended", [result("a"), JobFailed("nan_logits", "no numbers"), TaskRevokedError("revoked")])
def test_a_result_that_is_there_stays_whoever_comes_later(ended: Any) -> None:
    app = make_app(load_settings(redis_url="redis://localhost:1/0"))
    kept = {app.backend.get_key_for_task("a"): app.backend.record("a", ended)}
    before = dict(kept)
    app.backend.get = kept.get
    app.backend._set_with_state = lambda key, value, state: kept.update({key: value})
    app.backend.mark_as_done("a", result("a").model_dump(mode="json"))
    app.backend.mark_as_failure("a", JobFailed("internal_error", "later"))
    app.backend.mark_as_revoked("a", "later")
    assert kept == before
    app.backend.mark_as_done("b", result("b").model_dump(mode="json"))
    assert len(kept) == 2, "another's is stored"
    app.close()


def test_the_writer_stores_in_batches_through_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(MemoryStore):
        """A Redis that does not answer at first; more jobs end in the meantime."""

        calls: ClassVar[list[list[str]]] = []

        def finish(self, records: Any) -> None:
            self.calls.append(list(records))
            if len(self.calls) == 1:
                for name in "bcd":
                    writer.put(name, done(name))
                raise redis.ConnectionError("away")
            super().finish(records)

    def done(job_id: str) -> Future[Result]:
        future: Future[Result] = Future()
        future.set_result(result(job_id))
        return future

    monkeypatch.setattr("headrace.worker.jobs.retry.RETRY_S", 0.0)
    store, stored = Away(), []
    writer = ResultWriter(service(store), told, lambda ended: stored.extend(name for name, _ in ended), pytest.fail)  # type: ignore[arg-type]
    writer.start()
    writer.put("a", done("a"))
    deadline = time.monotonic() + PATIENCE_S
    while len(stored) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    writer.put("e", done("e"))
    writer.stop()
    assert Away.calls == [["a"], ["a"], ["b", "c", "d"], ["e"]]
    assert stored == ["a", "b", "c", "d", "e"]


def test_the_writer_keeps_no_outcome_while_it_waits_for_the_next() -> None:
    writer = ResultWriter(service(MemoryStore()), told, lambda _: None, pytest.fail)  # type: ignore[arg-type]
    writer.start()
    future: Future[Result] = Future()
    future.set_result(result("a"))
    kept = weakref.ref(future)
    writer.put("a", future)
    del future
    wait_until(lambda: kept() is None)
    writer.stop()


@pytest.mark.parametrize("fails", [False, True])
def test_the_tensors_of_a_job_are_kept_if_it_succeeds_and_gone_from_memory_in_any_case(fails: bool) -> None:
    class Computed:
        """An engine that has the tensors at once, and then succeeds or fails."""

        def submit(self, request: Any, *, on_activations: Any, **_: Any) -> Future[Result]:
            on_activations({"q": b"1"})
            future: Future[Result] = Future()
            if fails:
                future.set_exception(JobFailed("nan_logits", "no numbers"))
            else:
                future.set_result(result("a"))
            return future

    store = MemoryStore()
    running = Service(models_of(Computed()), store, checkpoint_max_bytes=10)
    future = running.submit("a", {"prompt": "x", "checkpoints": [2]})
    running.stash("a", future)
    with contextlib.suppress(JobFailed):
        running.generate("a", {"prompt": "x", "checkpoints": [2]})
    assert len(running._tensors) == fails, "stored: gone even if somebody keeps the future"
    del future
    gc.collect()
    assert store.tensors == ({} if fails else {"a": {"q": b"1"}})
    assert len(running._tensors) == 0


def test_a_worker_that_keeps_no_tensors_says_so_before_it_computes_any() -> None:
    future = service(MemoryStore(), limit=0).submit("a", {"prompt": "x", "checkpoints": [8]})
    with pytest.raises(JobFailed, match="HEADRACE_CHECKPOINT_MAX_BYTES is 0") as caught:
        future.result(0)
    assert caught.value.code == "checkpoints_off"


def test_what_is_not_signed_never_reaches_the_engine() -> None:
    class Engine:
        def submit(self, request: GenerateRequest, **_: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(request.prompt)
            return future

    key = b"k" * 32
    keyed, plain = (
        Service(models_of(Engine()), MemoryStore(), checkpoint_max_bytes=10, signing_keys=own) for own in ((key,), ())
    )
    for wire in (None, [], {"prompt": "x"}, {"prompt": "x", "signature": "0" * 64}):
        with pytest.raises(JobFailed) as caught:
            keyed.submit("a", wire).result(0)
        assert caught.value.code == "bad_signature"
    for service in (keyed, plain):  # during an upgrade, clients have a key before workers do
        assert service.submit("a", sign(key, "a", "demo", {"prompt": "x"})).result(0) == "x"


def test_a_result_that_redis_cannot_hold_fails_the_job() -> None:
    app = make_app(load_settings(redis_url="redis://localhost:1/0"))
    app.backend._MAX_STR_VALUE_SIZE = 500
    outcome = parse_outcome(app.backend.record("a", result("a" * 600)))
    assert isinstance(outcome, JobFailed)
    assert outcome.code == "result_too_large"
    app.close()

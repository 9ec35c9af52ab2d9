"""What tasks see of the engine: requests from strangers, and checkpoint tensors that must fit."""

from __future__ import annotations

import contextlib
import gc
from concurrent.futures import Future
from typing import Any

import pytest
import redis

from client.errors import JobFailed
from client.schema import Result, Timings, Usage, parse_request
from worker.service import Service, read_wire
from worker.store import MemoryStore


def service(store: MemoryStore, limit: int = 10) -> Service:
    return Service(engine=None, store=store, checkpoint_max_bytes=limit)  # type: ignore[arg-type]


def test_tensors_within_the_cap_are_kept() -> None:
    store = MemoryStore()
    service(store)._keep("a", {"q": b"12345"})
    assert store.dumps == {"a": {"q": b"12345"}}


def test_tensors_over_the_cap_fail_the_job_with_both_numbers() -> None:
    store = MemoryStore()
    with pytest.raises(JobFailed, match=r"take 12 bytes and a job may keep 10") as caught:
        service(store)._keep("a", {"q": b"123456", "k": b"123456"})
    assert caught.value.code == "checkpoints_too_large"
    assert store.dumps == {}


def test_a_redis_that_refuses_the_tensors_fails_the_job_and_one_that_is_away_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Flaky(MemoryStore):
        def __init__(self, *answers: redis.RedisError | None) -> None:
            super().__init__()
            self.answers = list(answers)

        def dump(self, job_id: str, tensors: Any) -> None:
            if error := self.answers.pop(0):
                raise error
            super().dump(job_id, tensors)

    monkeypatch.setattr("worker.service.RETRY_S", 0.0)
    store = Flaky(redis.ConnectionError("away"), None)
    service(store)._keep("a", {"q": b"1"})
    assert store.dumps == {"a": {"q": b"1"}}
    full = Flaky(redis.ResponseError("OOM command not allowed"))
    with pytest.raises(JobFailed, match="OOM") as caught:
        service(full)._keep("a", {"q": b"1"})
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
        ({"prompt": "x", "max_tokens": 10**400}, "invalid_request"),
        ({"prompt": {"deep": [[[]]]}}, "invalid_request"),
        ({"prompt": "x", "__class__": "os.system"}, "invalid_request"),
        ({1: 2, "prompt": "x"}, "invalid_request"),
    ],
)
def test_what_strangers_write_is_refused_with_a_code(wire: Any, code: str) -> None:
    with pytest.raises(JobFailed) as caught:
        read_wire(wire)
    assert caught.value.code == code


def test_a_good_request_is_read() -> None:
    assert read_wire({"prompt": "x", "schema_version": 1}) == parse_request({"prompt": "x"})


@pytest.mark.parametrize("fails", [False, True])
def test_the_tensors_of_a_job_are_kept_if_it_succeeds_and_gone_from_memory_in_any_case(fails: bool) -> None:
    class Computed:
        """An engine that has the tensors at once, and then succeeds or fails."""

        def submit(self, request: Any, *, on_trace: Any, **_: Any) -> Future[Result]:
            on_trace({"q": b"1"})
            future: Future[Result] = Future()
            if fails:
                future.set_exception(JobFailed("nan_logits", "no numbers"))
            else:
                parts: dict[str, Any] = {"id": "a", "model": "m", "choices": [], "seed": 0}
                usage = Usage(prompt_tokens=1, completion_tokens=0, total_tokens=1)
                future.set_result(Result(**parts, usage=usage, timings=Timings(waiting_s=0, prefill_s=0, decode_s=0)))
            return future

    store = MemoryStore()
    running = Service(Computed(), store, checkpoint_max_bytes=10)  # type: ignore[arg-type]
    with contextlib.suppress(JobFailed):
        running.generate("a", {"prompt": "x", "checkpoints": [2]})
    gc.collect()
    assert store.dumps == ({} if fails else {"a": {"q": b"1"}})
    assert len(running._dumps) == 0

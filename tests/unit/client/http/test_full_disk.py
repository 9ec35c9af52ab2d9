"""A batch of `headrace serve` whose disk is full for a while. Its client is replaced: no Redis, no worker."""

from __future__ import annotations

import errno
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.client.batch import row_file
from headrace.client.batch.errors import OutputRefused
from headrace.client.batch.output import Output
from headrace.client.http import batches as batches_module
from headrace.client.http.batch_objects import BatchRequest, BatchState
from headrace.client.http.batches import Batches
from headrace.client.http.file_store import FileStore
from headrace.client.jobs.polling import PollState, Updates
from headrace.client.jobs.prepared import PreparedJob
from headrace.client.jobs.submission import Submitter
from headrace.client.wire.results import Choice, Result, Timings, Usage
from headrace.config import load_settings
from tests.patience import PATIENCE_S

ROWS = 40
FileIO = io.FileIO


class Jobs:
    """A client whose jobs end as soon as they are polled. One object for all attempts, as Redis is."""

    def __init__(self, *_: Any, **__: Any) -> None:
        settings = load_settings(redis_url="redis://localhost:1/0")
        self.model_name, self.submitter, self.reader = "demo", self, self
        submitter = Submitter(settings, "", None, None, model_name="demo")  # type: ignore[arg-type]
        self.prepare_all, self.prepare_together = submitter.prepare_all, submitter.prepare_together
        self.computed: dict[str, int] = {}

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *_: object) -> None: ...

    def models(self) -> set[str]:
        return {"demo"}

    def adapters(self) -> dict[str, set[str]]:
        return {}

    def submit(self, jobs: list[PreparedJob]) -> None:
        for job in jobs:
            self.computed[job.id] = self.computed.get(job.id, 0) + 1

    def cancel(self, job_ids: list[str]) -> None: ...

    def poll_once(self, polls: PollState) -> Updates:
        job_ids = list(polls)[:4]
        for job_id in job_ids:
            polls.drop(job_id)
        return Updates(outcomes={job_id: result(job_id) for job_id in job_ids})


def result(job_id: str) -> Result:
    choice = Choice(index=0, text="text", token_ids=[1], finish_reason="length")
    usage = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    timings = Timings(waiting_s=0, prefill_s=0, decode_s=0)
    return Result(id=job_id, model="demo", choices=[choice], usage=usage, seed=1, timings=timings)


class Disk:
    """Counts the bytes that are written to output files; from `room` bytes on the disk is full."""

    room: float = float("inf")
    used = 0

    def write(self, file: FileIO, data: bytes) -> int:
        left = int(min(self.room - self.used, len(data)))
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.used += left
        return FileIO.write(file, data[:left])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()

    class Limited(FileIO):
        def write(self, data: Any) -> int:
            return found.write(self, data)

    monkeypatch.setattr(row_file.io, "FileIO", Limited)
    monkeypatch.setattr(batches_module, "DISK_RETRY_S", 0.02, raising=False)
    return found


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    found = Jobs()
    monkeypatch.setattr(batches_module, "Client", lambda **_: found)
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    found = FileStore(tmp_path)
    yield found
    found.close()


@pytest.fixture
def batches(tmp_path: Path, store: FileStore) -> Iterator[Batches]:
    found = Batches(tmp_path, store, load_settings(redis_url="redis://localhost:1/0"))
    yield found
    found.stop()


def create(batches: Batches, store: FileStore) -> BatchState:
    body = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 1}}
    lines = "\n".join(json.dumps({**body, "custom_id": f"row {i}"}) for i in range(ROWS))
    file = store.add(io.BytesIO(lines.encode()), filename="in", owner="me")
    return batches.create(
        BatchRequest(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"), "me"
    )


def wait(batches: Batches, batch_id: str, condition: Callable[[BatchState], Any]) -> BatchState:
    deadline = time.monotonic() + PATIENCE_S
    while not condition(state := batches.get(batch_id, "me")):
        assert time.monotonic() < deadline, state
        assert state.status not in ("failed", "expired"), state
        time.sleep(0.005)
    return state


def test_a_batch_whose_disk_is_full_says_so_and_continues_when_there_is_room(
    batches: Batches, store: FileStore, disk: Disk, jobs: Jobs
) -> None:
    disk.room = 3_000  # in the middle of a line
    batch_id = create(batches, store).id
    waiting = wait(batches, batch_id, lambda state: state.errors)
    assert waiting.status == "in_progress"
    assert waiting.errors is not None
    (error,) = waiting.errors["data"]
    assert (error["code"], "continues when there is room" in error["message"]) == ("no_room", True)
    disk.room = float("inf")
    ended = wait(batches, batch_id, lambda state: state.status == "completed")
    assert ended.errors is None
    assert (ended.request_counts.total, ended.request_counts.completed, ended.request_counts.failed) == (ROWS, ROWS, 0)
    assert ended.output_file_id is not None
    lines = store.path(ended.output_file_id).read_text().splitlines()
    assert sorted(json.loads(line)["custom_id"] for line in lines) == sorted(f"row {i}" for i in range(ROWS))
    assert len(jobs.computed) == ROWS, "a row that is submitted again has the same id"


def test_a_batch_that_waits_for_room_can_be_cancelled(
    batches: Batches, store: FileStore, disk: Disk, jobs: Jobs
) -> None:
    disk.room = 3_000
    batch_id = create(batches, store).id
    wait(batches, batch_id, lambda state: state.errors)
    batches.cancel(batch_id, "me")
    ended = wait(batches, batch_id, lambda state: state.status == "cancelled")
    assert 0 < ended.request_counts.completed < ROWS


def test_states_that_cannot_be_written_end_no_batch(
    batches: Batches, store: FileStore, disk: Disk, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = True

    def write(path: Path, state: BatchState) -> None:
        if full and state.status != "validating":
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(state.model_dump_json())

    monkeypatch.setattr(batches_module, "write_json", write)
    batch_id = create(batches, store).id
    wait(batches, batch_id, lambda state: state.errors)
    full = False
    assert wait(batches, batch_id, lambda state: state.status == "completed").request_counts.completed == ROWS


def test_output_that_does_not_reach_the_disk_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Output(tmp_path / "out.jsonl") as sink:
        sink.open(overwrite=True)
        monkeypatch.setattr(os, "fsync", no_room)
        with pytest.raises(OutputRefused, match="make room, then resume"):
            sink.finish()
    assert (tmp_path / "out.jsonl.run").exists()

"""Batches that a server finds when it starts, without a queue."""

from __future__ import annotations

import io
import json
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headrace.client import Client
from headrace.client.http import batches as batches_module
from headrace.client.http.batch_objects import OPEN_STATUSES, BatchRequest, BatchState
from headrace.client.http.batches import Batches
from headrace.client.http.errors import ApiError
from headrace.client.http.file_store import FileStore, write_json
from headrace.config import load_settings
from tests.patience import PATIENCE_S

USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
ROW = {
    "id": "batch_req_0123456789abcdef",
    "custom_id": "a",
    "response": {"status_code": 200, "request_id": "x", "body": {"usage": USAGE}},
    "error": None,
}
FAILURE = {**ROW, "custom_id": "b", "response": None, "error": {"code": "nan_logits", "message": "m"}}
MISTAKE = {**ROW, "custom_id": "c", "response": {"status_code": 400, "request_id": "x", "body": {"error": {}}}}


@pytest.fixture
def files(tmp_path: Path) -> Any:
    store = FileStore(tmp_path)
    yield store
    store.close()


def left_behind(directory: Path, files: FileStore, **fields: Any) -> BatchState:
    """A batch as a killed server leaves it: two rows are done, and a third one is half written."""
    source = files.add(io.BytesIO(b'{"custom_id": "a", "prompt": "a"}\n'), filename="in", owner="me")
    now = int(time.time())
    state = BatchState(
        id="batch_1",
        input_file_id=source.id,
        created_at=now,
        expires_at=now + 60,
        owner="me",
        rows_id=files.new_id(),
        failures_id=files.new_id(),
    ).model_copy(update=fields)
    (directory / "batches").mkdir(mode=0o700, exist_ok=True)
    write_json(directory / "batches" / "batch_1.json", state)
    files.path(state.rows_id).write_bytes(json.dumps(ROW).encode() + b'\n{"id": "batch_req_01')
    files.path(state.failures_id).write_bytes(
        b"".join(json.dumps(line).encode() + b"\n" for line in (FAILURE, MISTAKE))
    )
    files.path(f"{state.rows_id}.run").write_text('{"run": "abc"}')
    return state


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"status": "in_progress", "in_progress_at": 5, "expires_at": 10}, "expired"),
        ({"status": "validating", "expires_at": 10, "output_retention_s": 3_600}, "expired"),
        ({"status": "cancelling", "in_progress_at": 5, "cancelling_at": 6}, "cancelled"),
    ],
)
def test_a_batch_that_cannot_continue_keeps_its_finished_rows(
    tmp_path: Path, files: FileStore, fields: dict[str, Any], status: str
) -> None:
    left = left_behind(tmp_path, files, **fields)
    batches = Batches(tmp_path, files, load_settings(redis_url="redis://localhost:1/0"))
    batches.start()
    deadline = time.monotonic() + PATIENCE_S
    while (state := batches.get("batch_1", "me")).status != status:
        assert time.monotonic() < deadline, state
        time.sleep(0.01)
    batches.stop()
    assert (state.request_counts.completed, state.request_counts.failed) == (1, 2)
    assert state.usage is not None
    assert (state.usage["input_tokens"], state.usage["output_tokens"], state.usage["total_tokens"]) == (3, 4, 7)
    assert state.output_file_id == left.rows_id
    output = files.get(left.rows_id, "me")
    assert output.expires_at - output.created_at == left.output_retention_s
    assert files.get(left.rows_id, "me").bytes == len(json.dumps(ROW)) + 1
    assert not files.path(f"{left.rows_id}.run").exists()
    assert getattr(state, f"{status}_at") >= left.created_at
    assert Batches(tmp_path, files, load_settings()).get("batch_1", "me") == state  # it is on disk


def test_a_waiting_batch_is_cancelled_at_once_and_only_once(tmp_path: Path, files: FileStore) -> None:
    left = left_behind(tmp_path, files)
    batches = Batches(tmp_path, files, load_settings())
    assert batches.uses(left.input_file_id)
    assert batches.cancel("batch_1", "me").status == "cancelled"
    assert not batches.uses(left.input_file_id)
    for owner, status in (("me", 409), ("other", 404)):
        with pytest.raises(ApiError) as caught:
            batches.cancel("batch_1", owner)
        assert caught.value.status == status
    batches.stop()


def test_a_batch_that_is_cancelled_when_all_rows_are_checked_is_not_computed(
    tmp_path: Path, files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(tmp_path, files)
    batches = Batches(tmp_path, files, load_settings())

    class CheckedBatch:
        checked = SimpleNamespace(rows=1)

        def __init__(self, *_: Any, **__: Any) -> None:
            assert batches.cancel("batch_1", "me").status == "cancelling"

        def run(self, *_: Any, **__: Any) -> None:
            raise AssertionError("the batch is computed")

    monkeypatch.setattr(
        batches_module, "Client", lambda **_: nullcontext(SimpleNamespace(models=lambda: {"demo"}, adapters=dict))
    )
    monkeypatch.setattr(batches_module, "Batch", CheckedBatch)
    batches.start()
    deadline = time.monotonic() + PATIENCE_S
    while (state := batches.get("batch_1", "me")).status in OPEN_STATUSES:
        assert time.monotonic() < deadline, state
        time.sleep(0.01)
    batches.stop()
    assert (state.status, state.in_progress_at) == ("cancelled", None)


def test_internal_fields_are_not_returned(tmp_path: Path, files: FileStore) -> None:
    told = left_behind(tmp_path, files).public()
    assert not {"owner", "rows_id", "failures_id"} & told.keys()
    assert told["object"] == "batch"


def test_a_resumed_batch_knows_the_adapters_of_its_first_check(
    tmp_path: Path, files: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a server resumes, the workers that have them may be restarting."""
    lines = [{"custom_id": name, "body": {"prompt": "a", "model": name}} for name in ("pirate", "demo")]
    file = files.add(io.BytesIO(b"\n".join(json.dumps(line).encode() for line in lines)), filename="in", owner="me")
    request = BatchRequest(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    batches = Batches(tmp_path, files, load_settings())
    monkeypatch.setattr(batches._threads, "submit", lambda *_: None)
    batch_id = batches.create(request, "me").id
    with Client(redis_url="redis://localhost:1/0") as client:
        with monkeypatch.context() as served:
            served.setattr(client, "models", lambda: {"demo"})
            served.setattr(client, "adapters", lambda: {"demo": {"pirate"}})
            first = list(batches._validate(client, batches.get(batch_id, "me")).rows())
        again = Batches(tmp_path, files, load_settings())  # no worker is there, and no Redis
        second = list(again._validate(client, again.get(batch_id, "me")).rows())
    assert [(row.fields["model"], row.fields.get("adapter")) for row in first] == [("demo", "pirate"), ("demo", None)]
    assert second == first
    assert "adapters" not in again.get(batch_id, "me").public()
    batches.stop()
    again.stop()

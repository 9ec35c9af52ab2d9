"""Uploads, downloads and deletions at the same time."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from headrace.client.http import file_store
from headrace.client.http.batch_objects import BatchRequest
from headrace.client.http.batches import Batches
from headrace.client.http.context import paginate
from headrace.client.http.errors import ApiError
from headrace.client.http.file_store import FileStore, StoredFile
from headrace.config import load_settings


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    found = FileStore(tmp_path)
    yield found
    found.close()


def add(store: FileStore, content: bytes = b"line\n") -> str:
    return store.add(io.BytesIO(content), filename="in.jsonl", owner="me").id


def in_threads(work: Callable[[int], None], threads: int = 8) -> None:
    """Run `work` in threads that start together. Raises the first error."""
    barrier = threading.Barrier(threads)

    def start(number: int) -> None:
        barrier.wait()
        work(number)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(start, range(threads)))


def test_parallel_uploads_and_deletions_only_meet_answers_that_are_documented(store: FileStore, tmp_path: Path) -> None:
    def work(number: int) -> None:
        for turn in range(12):
            file_id = add(store)
            store.owned_by("me")
            if (turn + number) % 2:
                store.delete(file_id)
                with pytest.raises(ApiError):
                    store.get(file_id, "me")

    in_threads(work)
    assert len(store.owned_by("me")) == 48
    assert len(list((tmp_path / "files").iterdir())) == 96


def test_parallel_uploads_share_the_space_that_is_left(tmp_path: Path) -> None:
    store, refused = FileStore(tmp_path, max_total_bytes=3_000), []

    def work(_: int) -> None:
        try:
            add(store, b"a" * 2_000)
        except ApiError as error:
            refused.append(error.code)

    in_threads(work)
    assert len(store.owned_by("me")) == 2
    assert refused == ["no_room"] * 6
    store.close()


def test_a_file_that_is_deleted_while_it_is_read_can_be_read_to_its_end(store: FileStore) -> None:
    file_id = add(store)
    with store.reading(file_id, "me") as first, store.reading(file_id, "me"):
        store.delete(file_id)
        assert store.path(first.id).read_bytes() == b"line\n"
        with pytest.raises(ApiError):
            store.get(file_id, "me")
    assert not store.path(file_id).exists()
    with pytest.raises(ApiError), store.reading(file_id, "me"):
        pass


@pytest.fixture
def batches(store: FileStore, tmp_path: Path) -> Iterator[Batches]:
    found = Batches(tmp_path, store, load_settings(redis_url="redis://localhost:1/0"))
    yield found
    found.stop()


def test_a_batch_is_created_or_its_file_deleted_but_not_both(store: FileStore, batches: Batches) -> None:
    ended, statuses = [], set()
    for _ in range(10):
        file_id = add(store)
        request = BatchRequest(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h")

        def work(number: int, request: BatchRequest = request) -> None:
            try:
                if number:
                    ended.append(batches.create(request, "me").input_file_id)
                else:
                    batches.delete_file(request.input_file_id)
            except ApiError as error:
                statuses.add(error.status)

        in_threads(work, 2)
        assert store.path(file_id).exists() == (file_id in ended)
    assert statuses <= {404, 409}


@pytest.mark.parametrize("suffix", [".part", "", ".json"])
def test_a_disk_that_is_full_leaves_nothing_behind(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The write of the content, its renaming, or the write of the metadata fails."""
    original, target = Path.replace, {".part": ".never", "": "", ".json": ".json"}[suffix]

    def replace(path: Path, to: Path) -> Path:
        if to.suffix == target:
            raise OSError(28, "No space left on device")
        return original(path, to)

    def copy(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)
    if suffix == ".part":
        monkeypatch.setattr("headrace.client.http.file_store.shutil.copyfileobj", copy)
    with pytest.raises(ApiError) as caught:
        add(store)
    assert (caught.value.status, caught.value.code) == (507, "no_room")
    assert list((tmp_path / "files").iterdir()) == []


def test_the_work_of_an_upload_and_of_a_page_does_not_grow_with_the_files(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 small files are allowed: asking the disk for each of their sizes took a second for every upload."""
    looked: list[str] = []
    shown: list[str] = []
    for _ in range(50):
        add(store)
    scandir, public = os.scandir, StoredFile.public

    @contextlib.contextmanager
    def counted(path: Path) -> Iterator[Iterator[Any]]:
        with scandir(path) as entries:
            yield (SimpleNamespace(name=e.name, stat=lambda e=e: looked.append(e.name) or e.stat()) for e in entries)

    monkeypatch.setattr(file_store.os, "scandir", counted)
    monkeypatch.setattr(StoredFile, "public", lambda file: shown.append(file.id) or public(file))
    store.path(store.new_id()).write_bytes(b"the output of a batch")
    add(store)
    assert len(looked) == 1
    files = store.owned_by("me")
    request = Request({"type": "http", "query_string": f"limit=2&after={files[3].id}".encode(), "headers": []})
    page = paginate(request, files, 20, 100)
    assert [file["id"] for file in page["data"]] == [files[4].id, files[5].id] == shown
    assert page["has_more"]


@pytest.mark.parametrize("moment", ["between content and metadata", "deleted while it is read", "in a deletion"])
def test_what_a_killed_server_left_of_a_file_is_deleted_at_the_next_start(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileStore(tmp_path)
    kept = add(store)
    if moment == "between content and metadata":
        monkeypatch.setattr(store, "publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            add(store)
    elif moment == "deleted while it is read":
        file_id = add(store)
        reading = store.reading(file_id, "me")
        reading.__enter__()
        store.delete(file_id)
    else:
        (tmp_path / "files" / f"{add(store)}.json").unlink()
    store.close()
    monkeypatch.undo()
    again = FileStore(tmp_path)
    batches = Batches(tmp_path, again, load_settings())
    state = batches._create(BatchRequest(input_file_id=kept, endpoint="/v1/completions", completion_window="24h"), "me")
    again.path(state.rows_id).write_bytes(b"row")
    again.path(state.failures_id).with_name(f"{state.failures_id}.part").touch()
    monkeypatch.setattr(batches, "_run", lambda _: None)
    (tmp_path / "batches" / "batch_spoilt.json").write_text("{")  # it may name files
    batches.start()
    assert len(list((tmp_path / "files").iterdir())) == 5
    (tmp_path / "batches" / "batch_spoilt.json").unlink()
    batches.start()
    assert {path.name.partition(".")[0] for path in (tmp_path / "files").iterdir()} == {
        kept, state.rows_id, state.failures_id,
    }  # fmt: skip
    batches.stop()
    again.close()

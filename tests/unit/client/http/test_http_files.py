"""Files and states of batches on disk."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from headrace.client.http.errors import ApiError
from headrace.client.http.file_store import DirectoryInUse, FileStore, write_json
from headrace.client.wire.results import TopLogprob, Usage


def add(store: FileStore, content: bytes = b"line\n", owner: str = "me", **options: int) -> str:
    return store.add(io.BytesIO(content), filename="in.jsonl", owner=owner, **options).id


def test_files_survive_a_restart(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    file_id = add(store)
    hidden = store.new_id()
    store.path(hidden).write_bytes(b"rows of a batch that is not complete")
    (tmp_path / "files" / "file-1.part").write_bytes(b"half an upload")
    (tmp_path / "files" / "file-2.json").write_text('{"half": ')
    store.close()
    again = FileStore(tmp_path)
    assert [file.id for file in again.owned_by("me")] == [file_id]
    assert again.path(file_id).read_bytes() == b"line\n"
    assert again.path(hidden).exists()
    assert not (tmp_path / "files" / "file-1.part").exists()
    assert tmp_path.stat().st_mode & 0o077 == 0 or (tmp_path / "files").stat().st_mode & 0o077 == 0
    again.close()


def test_a_directory_has_one_server(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with pytest.raises(DirectoryInUse, match="another server uses"):
        FileStore(tmp_path)
    store.close()
    FileStore(tmp_path).close()
    for name in ("files", "batches"):
        (tmp_path / name).chmod(0o777)
        with pytest.raises(DirectoryInUse, match=rf"/{name} can be written by other users: run `chmod go-w"):
            FileStore(tmp_path)
        (tmp_path / name).chmod(0o2770)  # as Kubernetes makes directories in volumes
        FileStore(tmp_path).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryInUse, match="cannot be written"):
        FileStore(tmp_path / "file")


def test_a_file_whose_content_somebody_removed_can_be_deleted_but_not_read(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    file_id = add(store)
    store.path(file_id).unlink()
    with pytest.raises(ApiError, match="no longer on the server's disk") as caught, store.reading(file_id, "me"):
        pass
    assert caught.value.status == 404
    store.delete(file_id)
    assert store.owned_by("me") == []
    store.close()


@pytest.mark.parametrize("name", ["", "../lock", "file-", "x" * 1000, "\0", "file-" + "0" * 32])
def test_only_issued_ids_name_a_file(tmp_path: Path, name: str) -> None:
    store = FileStore(tmp_path)
    add(store)
    with pytest.raises(ApiError) as caught:
        store.get(name, "me")
    assert caught.value.status == 404
    store.close()


def test_only_its_owner_can_access_a_file(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    file_id = add(store, owner="me")
    assert store.get(file_id, "me").owner == "me"
    assert "owner" not in store.get(file_id, "me").public()
    assert store.owned_by("other") == []
    with pytest.raises(ApiError):
        store.get(file_id, "other")
    store.close()


def test_a_full_directory_accepts_files_after_a_deletion(tmp_path: Path) -> None:
    store = FileStore(tmp_path, max_total_bytes=1_000)
    file_id = add(store, b"a" * 1_000)
    with pytest.raises(ApiError) as caught:
        add(store)
    assert (caught.value.status, caught.value.code) == (507, "no_room")
    store.delete(file_id)
    assert list((tmp_path / "files").iterdir()) == []
    add(store)
    store.close()


def test_expired_files_are_deleted_unless_a_batch_needs_them(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    kept, needed, gone = add(store), add(store, retention_s=-1), add(store, retention_s=-1)
    store.delete_expired({needed})
    assert {file.id for file in store.owned_by("me")} == {kept, needed}
    assert not store.path(gone).exists()
    store.close()


def test_json_files_are_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3))
    written = path.read_text()
    with pytest.raises(ValueError, match="surrogates"):
        write_json(path, TopLogprob(token_id=1, token="\ud83d", logprob=0))
    assert path.read_text() == written
    assert list(tmp_path.iterdir()) == [path]

"""Text that is not valid Unicode, and records that cannot be read: refused by name, and in nobody's way."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from headrace.client.http.auth import Limits
from headrace.client.http.responses import encode_json
from tests.http_app import HttpApp

LONE = "\ud83d"
GOOD = {"endpoint": "/v1/completions", "completion_window": "24h"}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[HttpApp]:
    made = HttpApp(tmp_path)
    yield made
    made.close()


def begin(app: HttpApp, **more: Any) -> Any:
    return app.ask("POST", "/v1/batches", {"input_file_id": app.upload().json()["id"], **GOOD, **more})


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/batches", {"input_file_id": "f", **GOOD, "metadata": {"title": LONE}}, "metadata.title"),
        ("/v1/batches", {"input_file_id": "f", **GOOD, "metadata": {LONE: "a"}}, "metadata.\\ud83d"),
        ("/v1/batches", {"input_file_id": LONE, **GOOD}, "input_file_id"),
        ("/v1/batches", {"input_file_id": "f", **GOOD, LONE: 1}, "\\ud83d"),
        ("/v1/completions", {"prompt": "a", LONE: 1}, "\\ud83d"),
        ("/v1/completions", {"prompt": ["a", LONE]}, "prompt[1]"),
        ("/v1/completions", {"prompt": "a", "user": LONE}, "user"),
        ("/v1/completions", {"prompt": "a", "model": LONE}, "model"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {LONE: 1}}, "logit_bias.\\ud83d"),
        ("/v1/completions", {"prompt": "a", "stream": True, "stream_options": {LONE: 1}}, "stream_options.\\ud83d"),
        ("/v1/completions", {"prompt": "a", "x": [[{"y": [LONE]}]]}, "x[0][0].y[0]"),
        ("/execute", {"prompt": "a", "stop": [LONE]}, "stop[0]"),
    ],
)
def test_a_lone_surrogate_in_a_body_is_refused_with_its_place(
    app: HttpApp, path: str, body: dict[str, Any], param: str
) -> None:
    answer = app.ask("POST", path, body)
    assert answer.status == 400, answer
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_request")
    assert "unpaired surrogate" in error["message"]
    assert [app.ask("GET", path).status for path in ("/v1/batches", "/v1/files", "/v1/models")] == [200] * 3


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/v1/files/\ud83d", b""),
        ("/v1/models/\ud83d", b""),
        ("/v1/files", b"after=%ed%a0%bd"),
        ("/v1/batches", b"a=%ff"),
    ],
)
def test_a_url_that_is_not_utf8_is_refused(app: HttpApp, path: str, query: bytes) -> None:
    answer = app.ask("GET", path, query=query)
    assert (answer.status, answer.json()["error"]["param"]) == (400, "url")


def test_bytes_that_are_no_unicode_are_refused(app: HttpApp) -> None:
    for body in (b'{"prompt": "\xed\xa0\xbd"}', b'{"prompt": "\xff"}', b'{"\xc0\x80": 1}'):
        answer = app.ask("POST", "/v1/completions", body)
        assert (answer.status, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert app.ask("POST", "/v1/completions", '{"prompt": "\U0001f600"}'.encode("utf-16")).status == 429


@pytest.mark.parametrize("text", ["\ud83d\ude00", "\0", "\u2028", "\u202e", "\x85", "\ufeff", "\U0001f600"])
def test_what_is_stored_is_read_back_by_the_next_server(tmp_path: Path, text: str) -> None:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    app = HttpApp(tmp_path)
    state = begin(app, metadata={"title": text}).json()
    assert state["metadata"] == {"title": text}
    name = app.upload(filename=text.replace("\0", "")).json()["filename"]
    assert name.isprintable()
    app.close()
    again = HttpApp(tmp_path)
    assert again.ask("GET", "/v1/batches").json()["data"] == [state]
    again.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b'{"id": 5}', b'{"id": "\\ud83d"}', b"[" * 100_000, b'{"id": "%s"}', b"null"],
)
def test_a_record_that_cannot_be_read_hides_no_other(tmp_path: Path, content: bytes) -> None:
    app = HttpApp(tmp_path)
    kept, spoilt = begin(app).json(), begin(app).json()
    app.close()
    for folder, name in (("batches", spoilt["id"]), ("files", spoilt["input_file_id"])):
        path = tmp_path / folder / f"{name}.json"
        if content == b'{"id": "%s"}':  # a whole record under another name
            content = path.read_bytes().replace(name.encode(), b"another")
        path.write_bytes(content)
    with capture_logs() as logged:
        again = HttpApp(tmp_path)
    assert [line["event"] for line in logged] == ["record.unreadable"] * 2
    assert [batch["id"] for batch in again.ask("GET", "/v1/batches").json()["data"]] == [kept["id"]]
    assert kept["input_file_id"] in [file["id"] for file in again.ask("GET", "/v1/files").json()["data"]]
    assert (tmp_path / "batches" / f"{spoilt['id']}.json").exists()
    again.close()


def test_what_is_no_record_does_not_hold_up_the_server(tmp_path: Path) -> None:
    HttpApp(tmp_path).close()
    names = ["folder", "link", "pipe"]
    pipe, link, folder = ((tmp_path / "batches" / f"batch_{name}.json") for name in reversed(names))
    os.mkfifo(pipe)
    link.symlink_to("nowhere")
    folder.mkdir()
    with capture_logs() as logged:
        HttpApp(tmp_path).close()
    assert [line["file"] for line in logged] == [f"batch_{name}.json" for name in names]


def test_a_batch_that_cannot_be_stored_is_in_no_list(app: HttpApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file_id = app.upload().json()["id"]
    monkeypatch.setattr("headrace.client.http.batches.write_json", full)
    assert app.ask("POST", "/v1/batches", {"input_file_id": file_id, **GOOD}).status == 507
    assert app.ask("GET", "/v1/batches").json()["data"] == []


def test_lists_are_newest_first_within_a_second_and_pages_are_stable(app: HttpApp, tmp_path: Path) -> None:
    made = [begin(app).json()["id"] for _ in range(12)]
    newest_first = made[::-1]
    assert [batch["id"] for batch in app.ask("GET", "/v1/batches").json()["data"]] == newest_first
    found, after = [], b""
    while True:
        page = app.ask("GET", "/v1/batches", query=b"limit=5" + after).json()
        found += [batch["id"] for batch in page["data"]]
        after = f"&after={page['last_id']}".encode()
        begin(app)  # a new batch comes before those that were listed
        if not page["has_more"]:
            break
    assert found == newest_first
    files = [file["id"] for file in app.ask("GET", "/v1/files", query=b"order=asc").json()["data"]]
    app.close()
    again = HttpApp(tmp_path)
    assert [file["id"] for file in again.ask("GET", "/v1/files").json()["data"]] == files[::-1]
    again.close()


def test_a_key_outside_ascii_is_compared_as_bytes(tmp_path: Path) -> None:
    key = "schl\u00fcssel-\u20ac-0123456789"
    app = HttpApp(tmp_path, Limits(keys=(key, "plain-key-0123456789"), any_host=True))
    assert app.ask("GET", "/v1/files", headers={"authorization": f"Bearer {key}"}).status == 200
    for wrong in (f"Bearer {key[:-1]}", f"Bearer {LONE}", "Bearer \0", f"Basic {key}", "Bearer"):
        assert app.ask("GET", "/v1/files", headers={"authorization": wrong}).status == 401
    app.close()


def test_a_response_can_always_be_encoded() -> None:
    content = {"a": [float("nan"), float("-inf"), 1.5], "b": {"c": LONE}}
    assert json.loads(encode_json(content)) == {"a": [None, None, 1.5], "b": {"c": LONE}}


def test_queries_are_refused_with_their_values_and_empty_ones_ask_for_nothing(app: HttpApp) -> None:
    for path in ("/v1/files", "/v1/batches"):
        assert app.ask("GET", path, query=b"after=&limit=&order=&purpose=").status == 200
        assert (
            "limit: got '1e1'; expected a whole number"
            in app.ask("GET", path, query=b"limit=1e1").json()["error"]["message"]
        )
        unknown = app.ask("GET", path, query=b"after=file-1")
        assert (unknown.status, unknown.json()["error"]["param"]) == (404, "after")
    assert (
        "order: got 'up'; expected 'asc' or 'desc'"
        in app.ask("GET", "/v1/files", query=b"order=up").json()["error"]["message"]
    )
    assert "purpose: got 'x'; expected 'batch'" in app.upload(purpose="x").json()["error"]["message"]

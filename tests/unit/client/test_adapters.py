"""LoRA adapters from the client's side: which names are refused before anything is queued, and where they are shown."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import TypeAdapter, ValidationError

from headrace.client import Client, InvalidBatch, InvalidRequest
from headrace.client.batch.rows import ItemReader
from headrace.client.wire import keys
from headrace.client.wire.adapters import ADAPTER_NAME, MAX_ADAPTERS, AdapterStatus, differences, is_adapter_name
from headrace.worker.jobs.redis_store import RedisStore

#: Registers a worker of a model with adapters; None: it does not say which it has.
Serve = Callable[..., None]


@pytest.fixture
def url(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of this test, and no cached lists."""
    monkeypatch.setattr("headrace.client.jobs.served.SERVED_S", 0.0)
    return url


@pytest.fixture
def serve(connection: redis.Redis) -> Serve:
    store = RedisStore(connection, result_ttl_s=60, checkpoint_ttl_s=60)

    def serve(worker: str, model: str, names: list[str] | None) -> None:
        record = {} if names is None else {"adapters": json.dumps([{"name": name} for name in names])}
        store.heartbeat(worker, {"model": model, **record}, names or ())

    return serve


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(redis_url=url) as made:
        yield made


def sent(connection: redis.Redis) -> list[dict[str, Any]]:
    """The requests in the queue of demo, the oldest first."""
    found = []
    for name in keys.queue_lists("demo"):
        for message in connection.lrange(name, 0, -1)[::-1]:  # type: ignore[index]
            (argument,), _, _ = json.loads(base64.b64decode(json.loads(message)["body"]))
            found += [job["request"] for job in argument] if isinstance(argument, list) else [argument]
    return found


NAMES = {
    "pirate": True, "A.b_c-1": True, "7": True, "x" * 128: True,
    "x" * 129: False, "": False, ".": False, "..": False, ".hidden": False, "-x": False, "a/b": False, "../a": False,
    "a\\b": False, "a b": False, "a\n": False, "a\x00": False, "é": False, "a:b": False,
}  # fmt: skip


@pytest.mark.parametrize(("name", "is_valid"), NAMES.items(), ids=map(repr, NAMES))
def test_only_a_plain_name_is_one_for_the_schema_and_for_us(client: Client, name: str, is_valid: bool) -> None:
    assert is_adapter_name(name) == is_valid
    if is_valid:
        assert client.submitter.prepare({"prompt": "a", "adapter": name}).request.adapter == name
        AdapterStatus(name=name)
        return
    with pytest.raises(ValidationError):
        AdapterStatus(name=name)
    with pytest.raises(InvalidRequest, match=r"adapter: got .*; expected 1 to 128 letters, digits"):
        client.submit("a", adapter=name)


def test_the_pattern_means_the_same_in_a_json_schema() -> None:
    assert ADAPTER_NAME in json.dumps(TypeAdapter(AdapterStatus).json_schema())
    assert ADAPTER_NAME[0] + ADAPTER_NAME[-1] == "^$"


@pytest.mark.parametrize("name", [5, True, ["pirate"], {"name": "pirate"}, b"pirate"])
def test_a_name_is_text(client: Client, name: Any) -> None:
    with pytest.raises(InvalidRequest, match="adapter: got"):
        client.submit("a", adapter=name)


def test_an_adapter_that_no_worker_has_is_refused_with_those_that_exist(
    client: Client, connection: redis.Redis, serve: Serve, tmp_path: Path
) -> None:
    client.submit("a", adapter="pirate")  # no worker runs: its worker will decide
    serve("w-1", "demo", ["pirate", "poet"])
    serve("w-2", "demo", ["pilot"])
    serve("w-3", "other", ["prophet"])
    expected = "adapter: got 'prophet'; expected an adapter of demo: pilot, pirate, poet; to add one, put it into"
    for ask in (
        lambda: client.submit("a", adapter="prophet"),
        lambda: client.submit_many([{"prompt": "a", "adapter": "prophet"}, "b"]),
        lambda: next(client.map(["a"], adapter="prophet")),
        lambda: client.batch([{"prompt": "a", "adapter": "prophet"}], tmp_path / "out.jsonl"),
        lambda: client.batch(["a"], tmp_path / "out.jsonl", params={"adapter": "prophet"}),
        lambda: client.score("a", " b", adapter="prophet"),
        lambda: client.choose("a", [" b", " c"], adapter="prophet"),
    ):
        with pytest.raises((InvalidRequest, InvalidBatch)) as caught:
            ask()
        assert expected in str(caught.value)
    assert len(sent(connection)) == 1
    client.submit("a", adapter="pilot")
    client.submit("b", model="other", adapter="prophet")
    assert [request.get("adapter") for request in sent(connection)] == ["pirate", "pilot"]


def test_no_adapter_is_refused_by_an_old_list(client: Client, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.client.jobs.served.SERVED_S", 60.0)
    monkeypatch.setattr("headrace.client.jobs.served.UNKNOWN_S", 0.0)
    serve("w-1", "demo", ["poet"])
    client.submit("a", adapter="poet")
    serve("w-1", "demo", ["pirate", "poet"])
    client.submit("a", adapter="pirate")
    with pytest.raises(InvalidRequest, match="an adapter of demo: pirate, poet"):
        client.submit("a", adapter="prophet")


def test_a_model_without_adapters_says_so(client: Client, serve: Serve) -> None:
    serve("w-1", "demo", [])
    with pytest.raises(InvalidRequest, match=r"expected an adapter of demo: none; to add one, .*HEADRACE_ADAPTERS_DIR"):
        client.submit("a", adapter="pirate")


@pytest.mark.parametrize(
    "names",
    [None, [f"a{i}" for i in range(MAX_ADAPTERS)]],
    ids=["a worker that does not say what it has", "a list that may lack some"],
)
def test_what_is_not_known_is_left_to_the_worker(client: Client, serve: Serve, names: list[str] | None) -> None:
    serve("w-1", "demo", ["poet"])
    serve("w-2", "demo", names)
    client.submit("a", adapter="pirate")


@pytest.mark.parametrize("spoilt", [b"\xff", "{", '[{"name": "a/b"}]', "[" * 100_000, '{"name": 5}', "[1]"])
def test_what_others_write_into_records_and_lists_is_no_adapter(
    client: Client, connection: redis.Redis, serve: Serve, spoilt: str | bytes
) -> None:
    serve("w-1", "demo", ["poet"])
    connection.zadd(keys.models(), {"demo/../x": 9e9, "demo/": 9e9, "a b/c": 9e9, "/poet": 9e9, b"demo/\xff": 9e9})
    assert client.adapters() == {"demo": {"poet"}}
    connection.hset(keys.worker("w-1"), mapping={"adapters": spoilt})
    client.submit("a", adapter="pirate")  # not known any more


def test_adapters_of_the_last_day_are_known_and_not_taken_for_models(client: Client, serve: Serve) -> None:
    serve("w-1", "demo", ["poet"])
    assert client.models() == {"demo"}
    serve("w-1", "demo", ["pirate"])  # the other was removed from the directory
    assert client.adapters() == {"demo": {"pirate", "poet"}}
    with pytest.raises(InvalidRequest, match="an adapter of demo: pirate;"):
        client.submit("a", adapter="poet")


def test_a_job_shows_its_adapter(client: Client) -> None:
    plain, adapted = client.submit("a"), client.submit("a", adapter="pirate")
    assert {job.id: job.adapter for job in client.jobs()} == {plain.id: "", adapted.id: "pirate"}
    assert [client.job_details(job).adapter for job in (plain, adapted)] == [None, "pirate"]
    assert client.find_job(adapted.id).adapter == "pirate"  # type: ignore[union-attr]


def test_another_adapter_is_another_request(client: Client) -> None:
    client.submit("a", id="mine", adapter="pirate")
    for other in ("poet", None):
        with pytest.raises(InvalidRequest, match="id: got 'mine'; expected an id that no other request has"):
            client.submit("a", id="mine", adapter=other)


def test_a_message_of_celery_carries_it(client: Client) -> None:
    assert client.signature("a", adapter="pirate").args[0]["adapter"] == "pirate"


# --- the adapter's name in place of a model's ------------------------------------------------------------------------


ADAPTERS = {"demo": {"pirate", "demo-2"}, "demo-2": {"poet", "both"}, "demo-3": {"both"}}


def read(body: dict[str, Any], **options: Any) -> Any:
    reader = ItemReader("demo", {}, models={*ADAPTERS}, adapters=ADAPTERS, **options)
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", **body}}
    return reader.read(1, json.dumps(line).encode())


@pytest.mark.parametrize(
    ("body", "model", "adapter"),
    [
        ({}, None, None),
        ({"model": "demo"}, "demo", None),
        ({"adapter": "pirate"}, None, "pirate"),
        ({"model": "pirate"}, "demo", "pirate"),
        ({"model": "pirate", "adapter": "pirate"}, "demo", "pirate"),
        ({"model": "poet", "adapter": None}, "demo-2", "poet"),
        ({"model": "demo-2"}, "demo-2", None),  # a model's name means the model, also where an adapter has it
        ({"model": "demo-2", "adapter": "poet"}, "demo-2", "poet"),
        ({"model": "demo", "adapter": "demo-2"}, "demo", "demo-2"),
    ],
)
def test_a_row_may_name_an_adapter_as_its_model(body: dict[str, Any], model: str | None, adapter: str | None) -> None:
    fields = read(body).fields
    assert (fields.get("model"), fields.get("adapter")) == (model, adapter)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "pirate", "adapter": "poet"}, "adapter: got 'poet'; expected no value, since model names"),
        ({"model": "both"}, "model: got 'both'; expected one of demo-2, demo-3, each of which has this adapter"),
        ({"model": "demo", "adapter": "poet"}, "adapter: got 'poet'; expected an adapter of demo: demo-2, pirate"),
        ({"adapter": "poet"}, "adapter: got 'poet'; expected an adapter of demo"),
        ({"model": "nobody"}, "model: got 'nobody'; expected one that is served"),
    ],
)
def test_a_row_with_a_wrong_name_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read(body)


def test_a_row_has_the_same_digest_while_no_worker_says_whose_adapter_it_is() -> None:
    """Otherwise a batch could not be resumed before its worker runs."""
    alone = ItemReader("demo", {}).read(1, b'{"prompt": "a", "model": "pirate"}')
    known = ItemReader("demo", {}, adapters=ADAPTERS).read(1, b'{"prompt": "a", "model": "pirate"}')
    assert alone is not None
    assert known is not None
    assert (alone.digest, alone.fields["model"]) == (known.digest, "pirate")
    assert (known.fields["model"], known.fields["adapter"]) == ("demo", "pirate")
    assert known.digest != ItemReader("demo", {}).read(1, b'{"prompt": "a"}').digest  # type: ignore[union-attr]


# --- what workers disagree on ----------------------------------------------------------------------------------------


def test_workers_that_differ_are_named() -> None:
    same = AdapterStatus(name="same", loaded=True, digest="a" * 64)
    one, two = (AdapterStatus(name="changed", loaded=True, digest=letter * 64) for letter in "bc")
    unloaded = AdapterStatus(name="changed")
    assert differences({"w1": [same, one], "w2": [one, same], "w3": [same, unloaded]}) == []
    assert differences({"w1": [same], "w2": []}) == ["same only on w1"]
    assert differences({"w1": [one], "w2": [two], "w3": [unloaded]}) == [
        f"changed with different files, {'b' * 12} on w1; {'c' * 12} on w2"
    ]
    assert differences({}) == []

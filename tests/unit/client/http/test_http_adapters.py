"""LoRA adapters over HTTP: their names are names of models, as in vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.client.http.errors import ApiError
from headrace.client.jobs.status import Status
from tests.http_app import HttpApp

ADAPTERS = ("demo/pirate", "demo/poet", "gpt2/poet", "gpt2/demo")


@pytest.fixture
def app(tmp_path: Path) -> Iterator[HttpApp]:
    made = HttpApp(tmp_path, models=("demo", "gpt2"), adapters=ADAPTERS)
    yield made
    made.close()


@pytest.fixture
def submitted(app: HttpApp, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The requests that reach the queue, which is full."""
    found: list[dict[str, Any]] = []
    client: Any = app.context.client
    submit = client.submit_many

    async def record(requests: list[dict[str, Any]]) -> None:
        found.extend(requests)
        await submit(requests)

    monkeypatch.setattr(client, "submit_many", record)
    return found


def test_models_are_listed_with_their_adapters(app: HttpApp) -> None:
    data = app.ask("GET", "/v1/models").json()["data"]
    assert [(each["id"], each["root"], each["parent"]) for each in data] == [
        ("demo", "demo", None),
        ("gpt2", "gpt2", None),
        ("pirate", "demo", "demo"),
    ], "each name once: not what means a model, and not what means adapters of two"
    assert {each["max_model_len"] for each in data if each["root"] == "demo"} == {512}
    assert app.ask("GET", "/v1/models/pirate").json() == data[2]
    assert app.ask("GET", "/v1/models/demo").json() == data[0], "a model's name means the model"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/execute"])
@pytest.mark.parametrize(
    ("body", "model", "adapter"),
    [
        ({}, "demo", None),
        ({"model": "pirate"}, "demo", "pirate"),
        ({"model": "demo"}, "demo", None),
        ({"model": "demo", "adapter": "poet"}, "demo", "poet"),
        ({"model": "pirate", "adapter": "pirate"}, "demo", "pirate"),
        ({"model": "gpt2", "adapter": "poet"}, "gpt2", "poet"),
        ({"adapter": "pirate"}, "demo", "pirate"),
        ({"model": "pirate", "adapter": None}, "demo", "pirate"),
    ],
)
def test_a_request_reaches_the_queue_of_the_base(
    app: HttpApp, submitted: list[dict[str, Any]], path: str, body: dict[str, Any], model: str, adapter: str | None
) -> None:
    source = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    assert app.ask("POST", path, {**source, **body}).status == 429
    (request,) = submitted
    assert (request["model"], request.get("adapter")) == (model, adapter)


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"model": "pirate", "adapter": "poet"}, 400, "adapter", "expected no value, since model names the adapter"),
        ({"model": "poet"}, 400, "model", "expected one of demo, gpt2, each of which has this adapter"),
        ({"model": "nobody"}, 404, "model", "served: demo, gpt2; adapters: demo, pirate, poet"),
        ({"model": "demo/pirate"}, 404, "model", "no worker serves 'demo/pirate'"),
        ({"adapter": "../demo"}, 400, "adapter", "expected 1 to 128 letters"),
        ({"adapter": 5}, 400, "adapter", "expected 1 to 128 letters"),
    ],
)
def test_a_wrong_name_is_refused(
    app: HttpApp, submitted: list[dict[str, Any]], body: dict[str, Any], status: int, param: str, message: str
) -> None:
    answer = app.ask("POST", "/v1/completions", {"prompt": "a", **body})
    error = answer.json()["error"]
    assert (answer.status, error["param"]) == (status, param)
    assert message in error["message"]
    assert len(submitted) == (status == 400 and param == "adapter" and "letters" in message)


def test_tokens_of_an_adapter_are_those_of_its_model(app: HttpApp, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    async def tokenize(**fields: Any) -> None:
        found.append(fields["model"])
        raise ApiError(418, "seen", "")

    monkeypatch.setattr(app.context.client, "tokenize", tokenize)
    assert app.ask("POST", "/tokenize", {"prompt": "a", "model": "pirate"}).status == 418
    assert found == ["demo"]


def test_an_adapter_whose_workers_restart_is_unavailable_and_not_unknown(
    app: HttpApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = app.context.client.status

    async def without_demo() -> Status:
        status = await whole()
        return status.model_copy(update={"workers": [w for w in status.workers if w.model != "demo"]})

    monkeypatch.setattr(app.context.client, "status", without_demo)
    answer = app.ask("POST", "/v1/completions", {"prompt": "a", "model": "pirate"})
    assert (answer.status, answer.json()["error"]["code"]) == (503, "no_worker")
    assert app.ask("GET", "/v1/models/pirate").status == 503


def test_the_description_has_the_field(app: HttpApp) -> None:
    schemas = json.loads(app.ask("GET", "/openapi.json").body)["components"]["schemas"]
    for name in ("CompletionRequest", "ChatCompletionRequest", "ExecuteRequest"):
        text = next(each for each in schemas[name]["properties"]["adapter"]["anyOf"] if each["type"] == "string")
        assert text["pattern"] == "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"

"""Routes without a queue: methods, encodings, endpoints of other models, the order of models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.client import __version__
from headrace.client.http.app import ROUTES
from headrace.client.http.auth import Limits
from headrace.client.http.openapi import OPERATIONS
from headrace.client.wire.requests import GenerateRequest
from tests.http_app import HttpApp


@pytest.fixture
def app(tmp_path: Path) -> Iterator[HttpApp]:
    made = HttpApp(tmp_path, models=("gpt2", "demo"))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/files", "GET, HEAD, OPTIONS, POST"),
        ("/v1/files/a", "DELETE, GET, HEAD, OPTIONS"),
        ("/v1/completions", "OPTIONS, POST"),
        ("/v1/models/a/b", "GET, HEAD, OPTIONS"),
        ("/health", "GET, HEAD, OPTIONS"),
    ],
)
def test_a_wrong_method_is_answered_with_the_right_ones(app: HttpApp, path: str, methods: str) -> None:
    wrong = app.ask("PUT", path)
    assert (wrong.status, wrong.headers["allow"]) == (405, methods)
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert wrong.json()["error"]["message"] == f"method: got 'PUT'; expected one of {methods}"
    damaged = app.ask("POST", "/v1/files", b"x", headers={"content-type": "multipart/form-data; boundary=b"})
    assert (damaged.status, damaged.json()["error"]["code"]) == (400, "invalid_request")
    assert damaged.json()["error"]["message"].startswith("the body is not a valid form: ")
    asked = app.ask("OPTIONS", path)
    assert (asked.status, asked.headers["allow"], asked.body) == (204, methods, b"")
    assert app.ask("OPTIONS", "/nowhere").status == 404


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP", "identity, gzip"])
def test_an_encoded_body_is_refused(app: HttpApp, encoding: str) -> None:
    for path in ("/v1/completions", "/v1/batches", "/v1/files", "/execute"):
        answer = app.ask("POST", path, b"\x1f\x8b", headers={"content-encoding": encoding})
        assert (answer.status, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    plain = app.ask("POST", "/v1/completions", {"prompt": "a"}, headers={"content-encoding": "identity"})
    assert plain.status == 429  # it reached the queue, which is full


@pytest.mark.parametrize(
    ("path", "content_type", "status"),
    [
        ("/v1/completions", "application/json; charset=utf-8", 429),
        ("/v1/completions", "application/x-www-form-urlencoded", 429),  # curl -d
        ("/v1/completions", "", 429),
        ("/v1/completions", "multipart/form-data; boundary=x", 415),
        ("/v1/files", "application/json", 415),
        ("/v1/files", "Multipart/Form-Data; boundary=x", 400),
    ],
)
def test_which_content_types_are_read(app: HttpApp, path: str, content_type: str, status: int) -> None:
    assert app.ask("POST", path, {"prompt": "a"}, headers={"content-type": content_type}).status == status


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/embeddings"])
def test_an_endpoint_of_other_models_says_what_to_use_instead(app: HttpApp, path: str) -> None:
    answer = app.ask("POST", path, {"model": "demo", "messages": []})
    error = answer.json()["error"]
    assert (answer.status, error["code"]) == (404, "unsupported_endpoint")
    assert "send messages to /v1/chat/completions, or a text as `prompt` to /v1/completions" in error["message"]
    batch = {"input_file_id": app.upload().json()["id"], "endpoint": path, "completion_window": "24h"}
    refused = app.ask("POST", "/v1/batches", batch).json()["error"]
    assert refused["param"] == "endpoint"
    assert "send messages to /v1/chat/completions, or a text as `prompt` to /v1/completions" in refused["message"]


def test_the_default_model_is_listed_first(app: HttpApp) -> None:
    assert [model["id"] for model in app.ask("GET", "/v1/models").json()["data"]] == ["gpt2", "demo"]
    assert app.ask("GET", "/v1/models/demo").json()["id"] == "demo"


def test_the_context_of_a_model_is_the_smallest_of_its_workers_if_they_say_it(app: HttpApp) -> None:
    assert app.ask("GET", "/v1/models/demo").json()["max_model_len"] == 512
    assert "max_model_len" not in app.ask("GET", "/v1/models/gpt2").json()


def test_a_slash_at_the_end_makes_no_difference(tmp_path: Path) -> None:
    key = "a-key-0123456789-0123"
    app = HttpApp(tmp_path, Limits(keys=(key,), any_host=True, max_body_bytes=10))
    access = {"authorization": f"Bearer {key}"}
    for path in ("/v1/models", "/v1/files", "/v1/batches"):
        assert app.ask("GET", f"{path}/", headers=access) == app.ask("GET", path, headers=access)
        assert app.ask("GET", f"{path}/").status == 401
    assert app.ask("GET", "/health/").status == 200
    app.close()


@pytest.mark.parametrize(
    ("policy", "param"),
    [
        ({"anchor": "created_at", "seconds": 3_599}, "output_expires_after.seconds"),
        ({"anchor": "created_at", "seconds": 2_592_001}, "output_expires_after.seconds"),
        ({"anchor": "now", "seconds": 3_600}, "output_expires_after.anchor"),
        ({"anchor": "created_at"}, "output_expires_after.seconds"),
        (5, "output_expires_after"),
    ],
)
def test_a_wrong_expiry_of_the_output_is_refused(app: HttpApp, policy: Any, param: str) -> None:
    asked = {"input_file_id": app.upload().json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    answer = app.ask("POST", "/v1/batches", {**asked, "output_expires_after": policy})
    assert (answer.status, answer.json()["error"]["param"]) == (400, param)
    good = app.ask("POST", "/v1/batches", {**asked, "output_expires_after": None})
    assert good.status == 200
    assert "output_retention_s" not in good.json()


def test_the_description_has_every_route_and_every_schema_that_it_names(app: HttpApp) -> None:
    found = app.ask("GET", "/openapi.json").json()
    described = {(method.upper(), path) for path, methods in found["paths"].items() for method in methods}
    paths = [(route.methods or set(), re.sub(r":\w+}", "}", route.path)) for route in ROUTES]
    served = {(method, path) for methods, path in paths for method in methods - {"HEAD"}}
    assert described == served == OPERATIONS.keys()
    schemas = found["components"]["schemas"]
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found)))
    assert named <= schemas.keys()
    assert not {"owner", "rows_id", "created_ns"} & {*schemas["Batch"]["properties"], *schemas["File"]["properties"]}
    text, chat, executed = (
        schemas[f"{name}Request"]["properties"].keys() for name in ("Completion", "ChatCompletion", "Execute")
    )
    internal = {"schema_version", "expires_at", "operation"}
    assert GenerateRequest.model_fields.keys() - internal - {"stream"} <= executed
    assert GenerateRequest.model_fields.keys() - internal <= text | chat
    assert not internal & (text | chat | executed)
    assert ("messages" in text, "prompt" in chat) == (False, False)


def test_answers_have_the_fields_of_their_description(app: HttpApp) -> None:
    schemas = app.ask("GET", "/openapi.json").json()["components"]["schemas"]
    file = app.upload().json()
    batch = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    answers = {
        "File": file,
        "Batch": app.ask("POST", "/v1/batches", batch).json(),
        "Model": app.ask("GET", "/v1/models/demo").json(),
        "Error": app.ask("GET", "/nowhere").json(),
    }
    unknown = {"Model": {"max_model_len"}}  # its worker here does not report a context
    for name, answer in answers.items():
        assert answer.keys() == schemas[name]["properties"].keys() - unknown.get(name, set()), name


def test_version_and_description_need_no_key(tmp_path: Path) -> None:
    app = HttpApp(tmp_path / "own", Limits(keys=("a-key-0123456789-0123",)))
    assert app.ask("GET", "/version").json() == {"version": __version__}
    assert app.ask("GET", "/openapi.json").status == 200
    assert app.ask("GET", "/status.json").status == 401
    app.close()

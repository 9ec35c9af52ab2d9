"""The OpenAPI description at `/openapi.json`, made from the routes and from the models that read and write bodies."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from headrace import __version__
from headrace.client.batch.openai import OTHER_ENDPOINTS, PROMPT_FORMS, STREAM_OPTIONS
from headrace.client.http.auth import OPENAPI_PATH, PAGE_FILES, PAGE_PATH, PUBLIC_PATHS
from headrace.client.http.batch_objects import PRIVATE_FIELDS, BatchRequest, BatchState
from headrace.client.http.file_store import PRIVATE_FILE_FIELDS, StoredFile
from headrace.client.http.schemas import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    DetokenizedText,
    Error,
    Model,
    Tokens,
)
from headrace.client.http.token_requests import TOKENIZE_FLAGS
from headrace.client.jobs.status import Status
from headrace.client.wire.requests import MAX_LOGPROBS, GenerateRequest
from headrace.client.wire.results import Result, State

REF = "#/components/schemas/{model}"


@dataclass(frozen=True)
class Operation:
    """What the routes themselves do not say.

    Attributes:
        answer: the schema of the response; None for one that is not JSON.
        body: the schema of the request body.
        query: query parameters and their schemas.
        media_types: of the response.
        status: of the response; 0 if it is always an error.
    """

    answer: dict[str, Any] | None = None
    body: dict[str, Any] | None = None
    query: tuple[tuple[str, dict[str, Any]], ...] = ()
    media_types: tuple[str, ...] = ("application/json",)
    status: int = 200


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": REF.format(model=name)}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list_of(name: str) -> dict[str, Any]:
    return _object(object={"const": "list"}, data={"type": "array", "items": _ref(name)})


def _page_of(name: str) -> dict[str, Any]:
    ends = {"first_id": _NULLABLE_TEXT, "last_id": _NULLABLE_TEXT, "has_more": {"type": "boolean"}}
    return _object(**_list_of(name)["properties"], **ends)


_TEXT: dict[str, Any] = {"type": "string"}
_NULLABLE_TEXT: dict[str, Any] = {"type": ["string", "null"]}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"const": "batch"},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer"},
    },
}


_NUMBER = {"type": "number"}
#: A job in a list: no prompt, no text.
_JOB = _object(
    id=_TEXT,
    tag=_TEXT,
    model=_TEXT,
    adapter=_NULLABLE_TEXT,
    state={"enum": list(get_args(State))},
    created_at=_NUMBER,
    age_s=_NUMBER,
    ended_after_s={"type": ["number", "null"]},
)


def _whole_number(most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 1, "maximum": most}


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", "/v1/completions"): Operation(
        _ref("Completion"), _ref("CompletionRequest"), media_types=("application/json", "text/event-stream")
    ),
    ("POST", "/v1/chat/completions"): Operation(
        _ref("ChatCompletion"), _ref("ChatCompletionRequest"), media_types=("application/json", "text/event-stream")
    ),
    ("POST", "/tokenize"): Operation(_ref("Tokens"), _ref("TokenizeRequest")),
    ("POST", "/detokenize"): Operation(_ref("DetokenizedText"), _ref("DetokenizeRequest")),
    ("POST", "/execute"): Operation(None, _ref("ExecuteRequest"), media_types=("text/event-stream",)),
    **{("POST", path): Operation(status=0) for path in OTHER_ENDPOINTS},
    ("GET", "/v1/models"): Operation(_list_of("Model")),
    ("GET", "/v1/models/{model}"): Operation(_ref("Model")),
    ("POST", "/v1/files"): Operation(_ref("File"), _UPLOAD),
    ("GET", "/v1/files"): Operation(
        _page_of("File"),
        query=(
            ("after", _TEXT),
            ("limit", _whole_number(10_000)),
            ("order", {"enum": ["asc", "desc"]}),
            ("purpose", _TEXT),
        ),
    ),
    ("GET", "/v1/files/{id}"): Operation(_ref("File")),
    ("DELETE", "/v1/files/{id}"): Operation(
        _object(id=_TEXT, object={"const": "file"}, deleted={"const": True}),
    ),
    ("GET", "/v1/files/{id}/content"): Operation(media_types=("application/octet-stream",)),
    ("POST", "/v1/batches"): Operation(_ref("Batch"), _ref("BatchRequest")),
    ("GET", "/v1/batches"): Operation(_page_of("Batch"), query=(("after", _TEXT), ("limit", _whole_number(100)))),
    ("GET", "/v1/batches/{id}"): Operation(_ref("Batch")),
    ("POST", "/v1/batches/{id}/cancel"): Operation(_ref("Batch")),
    ("GET", "/health"): Operation(_object(status={"enum": ["ok", "no_worker", "no_redis"]})),
    ("GET", PAGE_PATH): Operation(media_types=("text/html",)),
    **{("GET", path): Operation(media_types=(media_type,)) for path, media_type in PAGE_FILES.items()},
    ("GET", "/jobs.json"): Operation(
        _object(
            data={"type": "array", "items": _JOB},
            has_more={"type": "boolean"},
            after=_TEXT,
            counts={"type": "object"},
        ),
        query=(
            ("state", {"enum": list(get_args(State))}),
            *(("model", _TEXT), ("search", _TEXT), ("after", _TEXT)),
            ("limit", _whole_number(100)),
        ),
    ),
    ("POST", "/jobs/{id}/cancel"): Operation(_JOB),
    ("GET", "/version"): Operation(_object(version=_TEXT)),
    ("GET", OPENAPI_PATH): Operation({"type": "object"}),
    ("GET", "/status.json"): Operation(_ref("Status")),
    ("GET", "/checkpoints.json"): Operation({"type": "object"}, query=(("job", _TEXT), ("reference", _TEXT))),
}
#: Query parameters without which a request is refused.
_REQUIRED_QUERY = ("job", "reference")


def describe(routes: Iterable[Route]) -> dict[str, Any]:
    """The description of these routes."""
    paths: dict[str, Any] = {}
    for route in routes:
        path = re.sub(r":\w+}", "}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(method, path, route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "headrace",
            "version": __version__,
            "description": "The OpenAI API for completions, chats, models, files and batches, and the workers' status.",
        },
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}, {}],
    }


def _operation(method: str, path: str, route: Route) -> dict[str, Any]:
    more = OPERATIONS[method, path]
    summary = " ".join((route.endpoint.__doc__ or "").split())
    found: dict[str, Any] = {"operationId": f"{route.name}_{method.lower()}{_suffix(path)}", "summary": summary}
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _TEXT} for name in re.findall(r"{(\w+)}", path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": name in _REQUIRED_QUERY, "schema": schema}
        for name, schema in more.query
    ]
    if parameters:
        found["parameters"] = parameters
    if more.body is not None:
        media_type = "multipart/form-data" if more.body is _UPLOAD else "application/json"
        found["requestBody"] = {"required": True, "content": {media_type: {"schema": more.body}}}
    error = {"description": "an error", "content": {"application/json": {"schema": _ref("Error")}}}
    found["responses"] = {"default": error}
    if more.status:
        content = {
            kind: {"schema": more.answer} if kind == "application/json" and more.answer else {}
            for kind in more.media_types
        }
        found["responses"][str(more.status)] = {"description": "the answer", "content": content}
    if path in PUBLIC_PATHS:
        found["security"] = []
    return found


def _suffix(path: str) -> str:
    return re.sub(r"\W+", "_", path).rstrip("_")


_ANSWERS: tuple[type[BaseModel], ...] = (Completion, ChatCompletion, ChatCompletionChunk, Tokens, DetokenizedText)
_ANSWERS += (Model, Error, BatchState, StoredFile, Status, Result)


def _schemas() -> dict[str, Any]:
    models: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        (GenerateRequest, "validation"),
        (BatchRequest, "validation"),
        *((model, "serialization") for model in _ANSWERS),
    ]
    _, definitions = models_json_schema(models, ref_template=REF)
    schemas: dict[str, Any] = definitions["$defs"]
    request = schemas.pop("GenerateRequest")["properties"]
    schemas["Batch"] = _public(schemas.pop("BatchState"), PRIVATE_FIELDS)
    schemas["File"] = _public(schemas.pop("StoredFile"), PRIVATE_FILE_FIELDS)
    schemas["File"]["properties"] |= {"object": {"const": "file"}, "status": {"const": "processed"}}
    own = {"prompt": {"anyOf": [_TEXT, _TOKEN_IDS]}, "messages": _MESSAGES}
    schemas["ExecuteRequest"] = {**_request(request, own), "anyOf": _ONE_SOURCE}
    schemas["CompletionRequest"] = _request(request, _COMPLETION_FIELDS, without=_CHAT_ONLY, required=("prompt",))
    schemas["ChatCompletionRequest"] = _request(request, _CHAT_FIELDS, without=("echo",), required=("messages",))
    for name in ("CompletionRequest", "ChatCompletionRequest"):
        schemas[name]["description"] = (
            "The fields of the OpenAI API and further ones. A field that is not listed is refused, unless its value "
            "asks for nothing; null is the default of a field."
        )
    flags = dict.fromkeys(TOKENIZE_FLAGS, _FLAG)
    sources = {"prompt": {"type": ["string", "null"]}, "messages": {"anyOf": [_MESSAGES, {"type": "null"}]}}
    model = {"model": _SHARED_FIELDS["model"]}
    kwargs = {"chat_template_kwargs": {"type": ["object", "null"]}}
    properties = {**model, **sources, **flags, **kwargs}
    schemas["TokenizeRequest"] = {"type": "object", "properties": properties, "anyOf": _ONE_SOURCE}
    properties = {**model, "tokens": _TOKEN_IDS, "skip_special_tokens": _FLAG}
    schemas["DetokenizeRequest"] = {"type": "object", "properties": properties, "required": ["tokens"]}
    return schemas


def _public(schema: dict[str, Any], private: Iterable[str]) -> dict[str, Any]:
    """The schema of a stored record without its private fields."""
    hidden = set(private)
    schema["properties"] = {name: field for name, field in schema["properties"].items() if name not in hidden}
    schema["required"] = [name for name in schema.get("required", []) if name not in hidden]
    return schema


_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_FLAG: dict[str, Any] = {"type": ["boolean", "null"]}
_TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": _TEXT},
}
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": _TEXT,
            "content": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": _TEXT_PART}, {"type": "null"}]},
        },
    },
}
#: A request has a prompt or messages.
_ONE_SOURCE = [{"required": ["prompt"]}, {"required": ["messages"]}]
#: Fields of the message that only chats have.
_CHAT_ONLY = ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
_STREAM_OPTIONS = {
    "type": "object",
    "properties": {name: {"type": ["boolean", "null"]} for name in STREAM_OPTIONS},
}
_OPTIONS: dict[str, Any] = {
    "stream": {"type": ["boolean", "null"], "default": False},
    "stream_options": {"anyOf": [_STREAM_OPTIONS, {"type": "null"}], "description": "only with stream"},
    "user": {"type": ["string", "null"], "description": "has no effect"},
}
#: The fields of a completion that differ from those of `Client.submit`.
_COMPLETION_FIELDS: dict[str, Any] = {
    "prompt": {
        "description": PROMPT_FORMS,
        "anyOf": [
            *(_TEXT, _TOKEN_IDS, {"type": "null"}),
            *({"type": "array", "minItems": 1, "items": form} for form in (_TEXT, _TOKEN_IDS)),
        ],
    },
    **_OPTIONS,
}
#: The fields of a chat that differ from those of `Client.submit`.
_CHAT_FIELDS: dict[str, Any] = {
    "messages": _MESSAGES,
    "logprobs": {"type": ["boolean", "null"], "default": False},
    "top_logprobs": {
        "anyOf": [{"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}, {"type": "null"}],
        "description": "the number of alternatives; only with logprobs",
    },
    **_OPTIONS,
}
#: Fields that a request over HTTP has besides those of the message, and fields of the message that it has not.
_SHARED_FIELDS: dict[str, Any] = {
    "model": {"type": ["string", "null"], "description": "the name of a served model"},
    "timeout_s": {"type": ["number", "null"], "exclusiveMinimum": 0, "description": "seconds until the job expires"},
    "checkpoints": {"anyOf": [{"const": "all"}, {"type": "array", "items": {"type": "integer"}}, {"type": "null"}]},
    "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}]},
}
_INTERNAL_FIELDS = ("schema_version", "expires_at", "operation", "stream", "prompt", "messages")


def _request(
    fields: dict[str, Any], own: dict[str, Any], *, without: Collection[str] = (), required: Collection[str] = ()
) -> dict[str, Any]:
    """The schema of a request.

    Args:
        fields: schemas of the fields of the message.
        own: fields with a schema of their own.
        without: fields of the message that the request has not.
        required: fields without which it is refused.
    """
    given = {name: _or_null(field) for name, field in fields.items() if name not in (*_INTERNAL_FIELDS, *without)}
    shared = {name: {**_described(fields.get(name)), **field} for name, field in _SHARED_FIELDS.items()}
    more = {"required": list(required)} if required else {}
    return {"type": "object", **more, "properties": {**given, **shared, **own}}


def _described(field: dict[str, Any] | None) -> dict[str, Any]:
    return {"description": field["description"]} if field and "description" in field else {}


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    outer: dict[str, Any] = {name: field[name] for name in ("description", "default") if name in field}
    inner = {name: value for name, value in field.items() if name not in (*outer, "title")}
    return {**outer, "anyOf": [*(inner.get("anyOf") or [inner]), {"type": "null"}]}

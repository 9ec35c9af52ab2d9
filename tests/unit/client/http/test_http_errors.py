"""Every failure as an HTTP response: its status, and the exception that the openai package raises for it."""

from __future__ import annotations

import json

import pytest
from starlette.exceptions import HTTPException

from headrace import client
from headrace.client import HeadraceError, JobFailed
from headrace.client.error_codes import ERRORS, JOB_FAILURES
from headrace.client.http.errors import ApiError, translate

#: Every code that a user can meet, and the name of its class.
CLASSES = {
    kind.code: name
    for name in client.__all__
    if isinstance(kind := getattr(client, name), type) and issubclass(kind, HeadraceError) and "code" in vars(kind)
}
CODES = [*((code, CLASSES[code]) for code in ERRORS), *((code, "JobFailed") for code in JOB_FAILURES)]

#: The HTTP status of each code; all others are 500.
STATUS = {
    "result_not_kept": 410,
    "invalid_request": 400,
    "queue_full": 429,
    "redis_unreachable": 503,
    "redis_refused": 503,
    "redis_unsuitable": 503,
    "job_lost": 503,
    "result_timeout": 504,
    "no_worker": 503,
    "cancelled": 499,
    "expired": 504,
    "context_length_exceeded": 400,
    "empty_prompt": 400,
    "no_tokenizer": 400,
    "no_chat_template": 400,
    "invalid_chat_template": 400,
    "chat_template_failed": 400,
    "invalid_token_id": 400,
    "too_many_logprobs": 400,
    "grammar_too_complex": 400,
    "no_token_allowed": 400,
    "adapter_not_found": 400,
    "checkpoints_off": 400,
    "checkpoints_too_large": 400,
    "result_too_large": 400,
}

ARGUMENTS: dict[str, tuple[object, ...]] = {
    "InvalidRequest": ("top_p", "0", "more"),
    "InvalidBatch": ([],),
    "InputChanged": (3, "reason"),
    "QueueFull": ("headrace.demo", 5, 5),
    "RedisUnreachable": ("redis://10.1.2.3:6379/0", "refused"),
    "RedisRefused": ("redis://10.1.2.3:6379/0", "OOM"),
    "RedisUnsuitable": ("redis://10.1.2.3:6379/0", "it evicts keys"),
    "UnknownJob": ("id",),
    "JobLost": ("id",),
    "UnreadableRecord": ("id",),
    "NoCheckpoints": ("id",),
    "ResultTimeout": ("id", 5.0, "queued"),
    "NoWorker": ("id", 5.0, "queued", "headrace.demo"),
    "StreamChanged": ("id",),
}


def made(code: str, name: str) -> HeadraceError:
    error: HeadraceError
    error = (
        JobFailed(code, "at /home/secret") if name == "JobFailed" else getattr(client, name)(*ARGUMENTS.get(name, ()))
    )
    return error


@pytest.mark.parametrize(("code", "name"), CODES)
def test_every_code_has_its_status(code: str, name: str) -> None:
    found = translate(made(code, name))
    assert (found.code, found.status) == (code, STATUS.get(code, 500))
    body = json.loads(bytes(found.as_response().body))
    assert body["error"].keys() == {"message", "type", "param", "code"}
    if found.status >= 429 or code == "no_tokenizer":  # what the client did not cause reveals nothing about the server
        assert "10.1.2.3" not in found.message
        assert "/home" not in found.message


@pytest.mark.parametrize(("code", "name"), CODES)
def test_only_temporary_errors_are_retried(code: str, name: str) -> None:
    headers = translate(made(code, name)).as_response().headers
    may = code in ("queue_full", "redis_unreachable", "redis_refused", "no_worker", "job_lost")
    assert ("retry-after" in headers) == may
    assert (headers.get("x-should-retry") == "false") == (not may and STATUS.get(code, 500) != 400)


def test_an_unknown_error_reveals_nothing() -> None:
    found = translate(ValueError("a prompt that somebody wrote"))
    assert (found.status, found.code, found.kind) == (500, "internal_error", "server_error")
    assert "prompt" not in found.message


def test_an_unknown_path_is_answered_with_the_known_ones() -> None:
    assert "/v1/completions" in translate(HTTPException(404)).message
    assert translate(HTTPException(405)).status == 405


def test_an_api_error_is_not_translated() -> None:
    error = ApiError(413, "too_large", "large")
    assert translate(error) is error
    assert error.kind == "invalid_request_error"

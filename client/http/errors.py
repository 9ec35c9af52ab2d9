"""What went wrong, as the error objects of the OpenAI API.

A client's mistake says which field; a failure of ours says nothing of addresses, users or paths here.
"""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from headrace.client.wire.errors import (
    InvalidRequest,
    JobCancelled,
    JobError,
    JobExpired,
    NoWorker,
    QueueFull,
    RedisRefused,
    RedisUnreachable,
    ResultTimeout,
)
from headrace.client.wire.requests import GenerateRequest

#: Seconds after which it is worth asking again, where that hangs on others.
RETRY_S = 5
#: Nobody reads the answer, or somebody else cancelled the job (nginx's code, and that of gRPC for CANCELLED).
CLIENT_GONE = 499

#: Codes of jobs that failed for what was asked -> the field at fault. Any other is a failure of ours.
_ASKED = {
    "context_length_exceeded": "prompt",
    "empty_prompt": "prompt",
    "invalid_token_id": "prompt",
    "too_many_logprobs": "logprobs",
    "checkpoints_off": "checkpoints",
    "checkpoints_too_large": "checkpoints",
    "result_too_large": "max_tokens",
    "invalid_request": None,
}
_AWAY = "the queue cannot be reached; try again later"


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        code: a short fixed word, of ours or of OpenAI's.
        param: the field at fault.
        retry_after_s: when it is worth asking again; None if that would change nothing.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.param, self.retry_after_s = param, retry_after_s

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        named = {429: "rate_limit_error", CLIENT_GONE: "cancelled"}.get(self.status)
        return named or ("server_error" if self.status >= 500 else "invalid_request_error")

    def as_dict(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def as_response(self) -> JSONResponse:
        """The whole answer."""
        headers = {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        elif self.status >= 409:
            # The openai package repeats such requests by itself. It would compute once more what fails again.
            headers["x-should-retry"] = "false"
        return JSONResponse(self.as_dict(), self.status, headers)


def not_found(what: str, name: str) -> ApiError:
    """There is none of that name, or it is somebody else's."""
    return ApiError(404, "not_found", f"no such {what}: {name}", param="id")


def translate(error: Exception) -> ApiError:
    """Any exception as the error that a client sees."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return _of_route(error)
    if isinstance(error, InvalidRequest):
        return ApiError(400, error.code, str(error), param=error.field)
    if isinstance(error, QueueFull):
        return ApiError(429, error.code, "the queue is full; try again later", retry_after_s=RETRY_S)
    if isinstance(error, (RedisUnreachable, RedisRefused)):
        return ApiError(503, error.code, _AWAY, retry_after_s=RETRY_S)
    if isinstance(error, NoWorker):
        return ApiError(503, error.code, "no worker serves the model; try again later", retry_after_s=RETRY_S)
    if isinstance(error, (ResultTimeout, JobExpired)):
        return ApiError(504, error.code, "it was not done in time; ask for less, or allow more with timeout_s")
    if isinstance(error, JobCancelled):
        return ApiError(CLIENT_GONE, error.code, "the job was cancelled")
    if isinstance(error, JobError):
        return _of_job(error)
    return ApiError(
        500, getattr(error, "code", None) or "internal_error", "something failed here; see the server's log"
    )


def _of_job(error: JobError) -> ApiError:
    if error.code in _ASKED:
        named = error.message.partition(" ")[0]  # an id may be wrong in more fields than one
        param = named if named in GenerateRequest.model_fields else _ASKED[error.code]
        return ApiError(400, error.code, error.message, param=param)
    return ApiError(500, error.code, f"the job failed: {error.code}")


def _of_route(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        paths = "/v1/completions, /v1/models, /v1/files, /v1/batches, /execute and /health"
        return ApiError(404, "unknown_url", f"nothing is here; this server has {paths}")
    if error.status_code == 405:
        return ApiError(405, "method_not_allowed", "this address does not take that method")
    return ApiError(error.status_code, "invalid_request", error.detail)

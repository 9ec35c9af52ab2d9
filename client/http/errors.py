"""Exceptions as error objects of the OpenAI API.

An error that the client caused names the field at fault. An error that the server caused reveals no address, user name
or path of the server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from headrace.client.batch.openai import error_object, request_error
from headrace.client.http.responses import JsonResponse
from headrace.client.wire.errors import (
    InvalidRequest,
    JobCancelled,
    JobError,
    JobExpired,
    JobLost,
    NoWorker,
    QueueFull,
    RedisRefused,
    RedisUnreachable,
    RedisUnsuitable,
    ResultNotKept,
    ResultTimeout,
)

#: The `retry-after` header, in seconds, of errors that go away by themselves: a full queue, a restarting worker.
RETRY_AFTER_S = 5
#: The status when the client has disconnected or the job was cancelled: nginx's 499, gRPC's CANCELLED.
CLIENT_CLOSED_REQUEST = 499

_REDIS_DOWN = "the queue cannot be reached; try again later"
_INTERNAL = "internal server error; see the server's log"


class ApiError(Exception):
    """An error response.

    Attributes:
        status: HTTP status code.
        code: a stable identifier, one of headrace's or of OpenAI's.
        message: one sentence for the user of the API.
        param: the field at fault.
        retry_after_s: seconds until a retry may succeed; None if a retry would fail again.
    """

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.param, self.retry_after_s = param, retry_after_s

    @property
    def kind(self) -> str:
        """The `type` of OpenAI's error object."""
        special = {429: "rate_limit_error", CLIENT_CLOSED_REQUEST: "cancelled"}.get(self.status)
        return special or ("server_error" if self.status >= 500 else "invalid_request_error")

    def as_dict(self) -> dict[str, Any]:
        """The error object of the OpenAI API."""
        return error_object(self.message, self.kind, self.param, self.code)

    def as_response(self) -> JsonResponse:
        """The HTTP response: status, headers and error object."""
        headers = {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        elif self.status >= 409:
            # The openai package retries these statuses by default; here a retry would compute the same failure again.
            headers["x-should-retry"] = "false"
        return JsonResponse(self.as_dict(), self.status, headers)


def invalid(message: str, param: str) -> ApiError:
    """A 400 response for a wrong value of the field `param`."""
    return ApiError(400, "invalid_request", message, param=param)


def no_worker(start: str) -> ApiError:
    """A 503 response: no worker serves the model; `start` is the command that starts one."""
    message = f"no worker serves the model; try again later, or on the server run {start}"
    return ApiError(503, NoWorker.code, message, retry_after_s=RETRY_AFTER_S)


def not_found(kind: str, object_id: str) -> ApiError:
    """A 404 response: the object does not exist or belongs to another API key."""
    return ApiError(404, "not_found", f"no such {kind}: {object_id}", param="id")


def translate(error: Exception) -> ApiError:
    """Map any exception to the error that the client sees."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return _from_routing(error)
    if isinstance(error, ClientDisconnect):
        return ApiError(
            CLIENT_CLOSED_REQUEST, "client_gone", "the connection was closed before the request was complete"
        )
    if isinstance(error, InvalidRequest):
        return ApiError(400, error.code, str(error), param=error.field)
    if isinstance(error, QueueFull):
        return ApiError(429, error.code, "the queue is full; try again later", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, (RedisUnreachable, RedisRefused)):
        start = f", or on the server {error.start_here}" if isinstance(error, RedisUnreachable) else ""
        return ApiError(503, error.code, _REDIS_DOWN + start, retry_after_s=RETRY_AFTER_S)
    if isinstance(error, RedisUnsuitable):
        return ApiError(503, error.code, "the queue would lose jobs; `headrace status` on the server says why")
    if isinstance(error, NoWorker):
        return no_worker(error.start_here)
    if isinstance(error, JobLost):
        return ApiError(503, error.code, "the queue lost the job; send the request again", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, (ResultTimeout, JobExpired)):
        return ApiError(504, error.code, "the job timed out; request fewer tokens, or raise timeout_s")
    if isinstance(error, JobCancelled):
        return ApiError(CLIENT_CLOSED_REQUEST, error.code, "the job was cancelled")
    if isinstance(error, ResultNotKept):
        return ApiError(410, error.code, error.message)
    if isinstance(error, JobError):
        return _from_failed_job(error)
    return ApiError(500, getattr(error, "code", None) or "internal_error", _INTERNAL)


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """In errors that are raised in the block, name fields as the request does.

    Args:
        names: fields of `Client.submit` -> their names in the request, where these differ.
    """
    try:
        yield
    except InvalidRequest as error:
        if error.field not in names:
            raise
        raise InvalidRequest(names[error.field], error.value, error.expected) from None
    except JobError as error:
        found = translate(error)
        found.param = names.get(found.param or "", found.param)
        raise found from error


def _from_failed_job(error: JobError) -> ApiError:
    if (body := request_error(error)) is not None:
        return ApiError(400, error.code, body["error"]["message"], param=body["error"]["param"])
    return ApiError(500, error.code, f"the job failed: {error.code}")


def _from_routing(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        paths = (
            "/v1/completions, /v1/chat/completions, /v1/models, /v1/files, /v1/batches, /tokenize, /detokenize, "
            "/execute and /health"
        )
        return ApiError(404, "unknown_url", f"no such URL; this server has {paths}")
    if error.status_code == 405:
        return ApiError(405, "method_not_allowed", "this URL does not support that method")
    if error.status_code == 400:  # Starlette raises it for the parts of a form
        return ApiError(400, "invalid_request", f"the body is not a valid form: {error.detail}")
    return ApiError(error.status_code, "invalid_request", error.detail)

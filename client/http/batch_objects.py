"""What is known of a batch: OpenAI's objects, and what only this server has to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headrace.client.http.errors import ApiError
from headrace.client.wire.errors import Fault

ENDPOINT, WINDOW, WINDOW_S = "/v1/completions", "24h", 86_400

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
OPEN = ("validating", "in_progress", "finalizing", "cancelling")


class Counts(BaseModel):
    """Rows."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchState(BaseModel):
    """OpenAI's batch object, and what only this server has to know."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str = ENDPOINT
    completion_window: str = WINDOW
    input_file_id: str
    status: Status = "validating"
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: dict[str, Any] | None = None
    request_counts: Counts = Counts()
    usage: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None

    owner: str = Field("", repr=False)
    #: Where rows and failures are written; they become files when it ends.
    rows_id: str
    failures_id: str

    def public(self) -> dict[str, Any]:
        """For the client."""
        return self.model_dump(exclude={"owner", "rows_id", "failures_id"})


class BatchRequest(BaseModel):
    """The body of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = Field(None, max_length=16)


def read_batch_request(body: Mapping[str, Any]) -> BatchRequest:
    """The body, checked. Raises ApiError."""
    try:
        request = BatchRequest.model_validate(dict(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))[:80]
        raise ApiError(400, "invalid_request", f"{field}: {first['msg']}", param=field) from None
    if any(len(name) > 64 or len(value) > 512 for name, value in (request.metadata or {}).items()):
        raise ApiError(
            400, "invalid_request", "metadata: names have 64 characters at most, values 512", param="metadata"
        )
    for name, right in (("endpoint", ENDPOINT), ("completion_window", WINDOW)):
        if getattr(request, name) != right:
            raise ApiError(400, "invalid_request", f"{name}: only {right!r} is offered here", param=name)
    return request


def fault_object(fault: Fault, code: str = "invalid_request") -> dict[str, Any]:
    """OpenAI's form of what is wrong in a line."""
    return {"code": code, "line": fault.line or None, "message": fault.message, "param": fault.field or None}

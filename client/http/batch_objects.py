"""Batches as objects: OpenAI's batch object with the server's private fields, and the body of a create request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headrace.client.batch.openai import ENDPOINT, OTHER_ENDPOINTS
from headrace.client.http.errors import invalid
from headrace.client.http.file_store import MIN_RETENTION_S, RETENTION_S
from headrace.client.wire.errors import Fault
from headrace.client.wire.unicode import printable

WINDOW, WINDOW_S = "24h", 86_400

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
#: The statuses of a batch that has not ended.
OPEN_STATUSES = ("validating", "in_progress", "finalizing", "cancelling")
#: The statuses in which a batch can be cancelled.
CANCELLABLE_STATUSES = ("validating", "in_progress", "cancelling")


class RequestCounts(BaseModel):
    """Numbers of rows, as in OpenAI's batch object."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchState(BaseModel):
    """OpenAI's batch object with the server's private fields; stored as JSON in the directory of batches."""

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
    request_counts: RequestCounts = RequestCounts()
    usage: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None

    owner: str = Field("", repr=False)
    #: Seconds from the creation of an output file to its deletion.
    output_retention_s: int = RETENTION_S
    #: Nanoseconds at which it was created: the order of batches of one second.
    created_ns: int = 0
    #: File ids to which results and errors are written while the batch runs; published when it ends.
    rows_id: str
    failures_id: str

    def public(self) -> dict[str, Any]:
        """OpenAI's batch object, without the private fields."""
        return self.model_dump(exclude=PRIVATE_FIELDS)


#: Fields of a batch that are stored and not shown.
PRIVATE_FIELDS = {"output_retention_s", "owner", "rows_id", "failures_id", "created_ns"}


class ExpiresAfter(BaseModel):
    """When output files are deleted: seconds after each was created."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_RETENTION_S, le=RETENTION_S)


class BatchRequest(BaseModel):
    """The body of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = Field(None, max_length=16)
    output_expires_after: ExpiresAfter | None = None


def parse_batch_request(body: Mapping[str, Any]) -> BatchRequest:
    """Parse and check the body of a create request. Raises ApiError."""
    try:
        request = BatchRequest.model_validate(dict(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = printable(".".join(map(str, first["loc"])))[:80]
        raise invalid(f"{field}: {first['msg']}", field) from None
    if any(len(name) > 64 or len(value) > 512 for name, value in (request.metadata or {}).items()):
        raise invalid("metadata: names have at most 64 characters, values 512", "metadata")
    for name, supported in (("endpoint", ENDPOINT), ("completion_window", WINDOW)):
        if (given := getattr(request, name)) != supported:
            advice = f"; {OTHER_ENDPOINTS[given]}" if given in OTHER_ENDPOINTS else ""
            raise invalid(f"{name}: only {supported!r} is supported{advice}", name)
    return request


def fault_object(fault: Fault, code: str = "invalid_request") -> dict[str, Any]:
    """OpenAI's object for an error in one line of the input file."""
    return {"code": code, "line": fault.line or None, "message": fault.message, "param": fault.field or None}

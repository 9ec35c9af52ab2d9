"""Batches as objects: OpenAI's batch object with the server's private fields, and the body of a create request."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from headrace.client.batch.endpoints import ENDPOINTS
from headrace.client.batch.errors import Fault
from headrace.client.batch.openai import ENDPOINT, OTHER_ENDPOINTS
from headrace.client.http.file_store import MIN_RETENTION_S, RETENTION_S
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.requests import Int
from headrace.client.wire.unicode import printable
from headrace.client.wire.values import show

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
    #: The LoRA adapters of models when the rows were checked: their names may stand in place of a model's.
    adapters: dict[str, list[str]] = {}

    @classmethod
    def new(cls, request: BatchRequest, *, owner: str, rows_id: str, failures_id: str) -> BatchState:
        """The state of a batch that begins now.

        Args:
            rows_id, failures_id: new file ids.
        """
        created_ns = time.time_ns()
        now = created_ns // 10**9
        return cls(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=request.endpoint,
            input_file_id=request.input_file_id,
            created_at=now,
            created_ns=created_ns,
            expires_at=now + WINDOW_S,
            metadata=request.metadata,
            output_retention_s=request.output_expires_after.seconds if request.output_expires_after else RETENTION_S,
            owner=owner,
            rows_id=rows_id,
            failures_id=failures_id,
        )

    def public(self) -> dict[str, Any]:
        """OpenAI's batch object, without the private fields."""
        return self.model_dump(exclude=PRIVATE_FIELDS)


#: Fields of a batch that are stored and not shown.
PRIVATE_FIELDS = {"output_retention_s", "owner", "rows_id", "failures_id", "created_ns", "adapters"}


_MetadataName = Annotated[str, Field(max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]


class ExpiresAfter(BaseModel):
    """When output files are deleted: seconds after each was created."""

    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"] = Field(description="'created_at'")
    seconds: Int = Field(
        ge=MIN_RETENTION_S, le=RETENTION_S, description=f"a whole number from {MIN_RETENTION_S} to {RETENTION_S}"
    )


_ONE_OF_ENDPOINTS = " or ".join(map(repr, ENDPOINTS))


class BatchRequest(BaseModel):
    """The body of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str = Field(description="the id of an uploaded file")
    endpoint: str = Field(description=_ONE_OF_ENDPOINTS)
    completion_window: str = Field(description=repr(WINDOW))
    metadata: dict[_MetadataName, _MetadataValue] | None = Field(
        None, max_length=16, description="at most 16 texts of at most 512 characters, with names of at most 64"
    )
    output_expires_after: ExpiresAfter | None = Field(None, description="an object with anchor and seconds")


def parse_batch_request(body: Mapping[str, Any]) -> BatchRequest:
    """Parse and check the body of a create request. Null asks for nothing. Raises InvalidRequest."""
    try:
        request = BatchRequest.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise _wrong(error.errors(include_url=False)[0]) from None
    if (given := request.endpoint) not in ENDPOINTS:
        advice = f"; {OTHER_ENDPOINTS[given]}" if given in OTHER_ENDPOINTS else ""
        raise InvalidRequest("endpoint", show(given), f"{_ONE_OF_ENDPOINTS}{advice}")
    if request.completion_window != WINDOW:
        raise InvalidRequest("completion_window", show(request.completion_window), repr(WINDOW))
    return request


def _wrong(error: ErrorDetails) -> InvalidRequest:
    """The error for what pydantic found first."""
    path = [part for part in error["loc"] if part != "[key]"]
    model = ExpiresAfter if len(path) > 1 and path[0] == "output_expires_after" else BatchRequest
    name = str(path[0] if model is BatchRequest else path[1])
    field = model.model_fields.get(name)
    expected = f"one of {', '.join(model.model_fields)}" if field is None else str(field.description)
    value = "nothing" if error["type"] == "missing" else show(error["input"])
    return InvalidRequest(printable(".".join(map(str, path)))[:80], value, expected)


def fault_object(fault: Fault, code: str = "invalid_request") -> dict[str, Any]:
    """OpenAI's object for an error in one line of the input file."""
    return {"code": code, "line": fault.line or None, "message": fault.message, "param": fault.field or None}

"""The lines of batch output files, in the format of the OpenAI API."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from headrace.client.batch.endpoints import ENDPOINTS
from headrace.client.batch.formats.text import as_json
from headrace.client.batch.items import BatchItem
from headrace.client.batch.openai import failure_code, request_error
from headrace.client.wire.results import Outcome, Result

#: The `id` of an output line is this prefix and the digest of the request.
ROW_ID = "batch_req_"


class Written(NamedTuple):
    """A request whose line is in an output file."""

    custom_id: str
    #: The digest of the request; empty if another program wrote the line.
    digest: str
    failed: bool


def output_line(row: BatchItem, job_id: str, outcome: Outcome | Exception) -> bytes:
    """The output line of a request, as OpenAI writes it.

    A request that was computed has status code 200, and one that could never be computed has 400 and an error object as
    its body. If anything else happened to the job, the line has an `error` and no response.
    """
    endpoint = ENDPOINTS[row.endpoint]
    line: dict[str, Any] = {"id": ROW_ID + row.digest, "custom_id": row.custom_id, "response": None, "error": None}
    if row.columns:
        line["columns"] = dict(row.columns)
    if isinstance(outcome, Result):
        body = endpoint.answer(outcome, as_token_ids=row.as_token_ids)
        line["response"] = {"status_code": 200, "request_id": job_id, "body": body}
    elif (mistake := request_error(outcome, endpoint.names)) is not None:
        line["response"] = {"status_code": 400, "request_id": job_id, "body": mistake}
    else:
        message = getattr(outcome, "message", None) or str(outcome)
        line["error"] = {"code": failure_code(outcome), "message": message}
    return as_json(line)


def read_output_line(line: bytes) -> Written | None:
    """Parse an output line. Returns None if it is incomplete or is not an output line."""
    if not line.endswith(b"\n"):
        return None  # at least its last byte is missing
    try:
        fields = json.loads(line)
        custom_id, row_id = fields["custom_id"], fields["id"]
        failed = fields["error"] is not None or fields["response"]["status_code"] != 200
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if not isinstance(custom_id, str) or not isinstance(row_id, str):
        return None
    return Written(custom_id, read_digest(row_id.removeprefix(ROW_ID)) if row_id.startswith(ROW_ID) else "", failed)


def read_digest(text: object) -> str:
    """The digest of a request; empty if another program wrote it."""
    ours = isinstance(text, str) and len(text) == 16 and set(text) <= set("0123456789abcdef")
    return str(text) if ours else ""

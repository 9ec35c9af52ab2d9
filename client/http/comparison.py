"""The data of `/checkpoints.json`: the checkpoint tensors of two jobs, compared."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

from headrace.client.async_client import AsyncClient
from headrace.client.http.errors import ApiError, invalid
from headrace.client.wire.errors import InvalidRequest, NoCheckpoints, UnknownJob

if TYPE_CHECKING:
    from headrace.client.wire.comparison import CheckpointResult, Tensors

#: Bytes of tensors of each job. All tensors of GPT-2 124M at 100 tokens take half of it; they are compared in float64.
MAX_BYTES = 64 * 2**20
REFERENCE = "the reference"
#: The checkpoint of the key/value cache, which is checked against the same job's keys and values, not the reference's.
CACHE_CHECKPOINT = 3


class Comparison:
    """Compares two jobs. Comparisons run one at a time, because each needs several hundred megabytes."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._lock = asyncio.Lock()

    async def compare(self, job_id: str, reference_id: str) -> dict[str, Any]:
        """The difference of each checkpoint, and whether all are within their tolerances.

        Raises:
            ApiError: a job has no tensors, has too many, or the two jobs have no checkpoint in common.
        """
        async with self._lock:
            ours = await self._tensors("job", job_id)
            theirs = await self._tensors("reference", reference_id)
            rows = await asyncio.to_thread(_compare, ours, theirs)
        compared = [row for row in rows if row["ok"] is not None]
        if not any(row["number"] != CACHE_CHECKPOINT for row in compared):
            raise invalid("the two jobs have no checkpoint in common", "job")
        return {"job": job_id, "reference": reference_id, "ok": all(row["ok"] for row in compared), "rows": rows}

    async def _tensors(self, param: str, job_id: str) -> Tensors:
        try:
            return await self._client.job(job_id).checkpoints(max_bytes=MAX_BYTES)
        except NoCheckpoints as error:
            code, message = await self._explain_missing(job_id, error)
            raise ApiError(404, code, message, param=param) from None
        except InvalidRequest as error:
            raise ApiError(413, "too_large", str(error), param=param) from None

    async def _explain_missing(self, job_id: str, error: NoCheckpoints) -> tuple[str, str]:
        """Error code and message for a job without tensors."""
        try:
            state = await self._client.job(job_id).status()
        except UnknownJob:
            return "not_found", f"no such job, or it has expired: {job_id}"
        if state in ("queued", "running"):
            return error.code, f"job {job_id} is {state}: its checkpoints are available when it has succeeded"
        return error.code, str(error)


def _compare(ours: Tensors, theirs: Tensors) -> list[dict[str, Any]]:
    from headrace.client.wire.comparison import compare

    try:
        rows = compare(ours, theirs, reference=REFERENCE, tolerances={})
    except (ArithmeticError, LookupError, TypeError, ValueError):  # no headrace worker wrote these tensors
        raise invalid("the tensors of the two jobs cannot be compared", "job") from None
    return [_to_json(row) for row in rows]


def _to_json(row: CheckpointResult) -> dict[str, Any]:
    """A row for JSON, which has neither infinity nor NaN."""
    fields = row.to_json()
    for name in ("max_abs", "max_rel"):
        if fields[name] is not None and not math.isfinite(fields[name]):
            fields["note"] = fields["note"] or "not a finite number"
            fields[name] = None
    return fields

"""What `/checkpoints.json` tells: a job's checkpoint tensors beside those of another job."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

from starlette.datastructures import QueryParams

from headrace.client.async_client import AsyncClient
from headrace.client.http.errors import ApiError
from headrace.client.wire.errors import InvalidRequest, NoCheckpoints, UnknownJob
from headrace.client.wire.requests import is_job_id

if TYPE_CHECKING:
    from headrace.client.wire.comparison import Row, Tensors

#: Tensors of each of the two jobs; all of GPT-2 124M at 100 tokens take half of it. They are worked on in float64.
MAX_BYTES = 64 * 2**20
REFERENCE = "the reference"


class Comparison:
    """Compares one pair of jobs after the other: each pair takes some hundred megabytes meanwhile."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._turn = asyncio.Lock()

    async def tell(self, query: QueryParams) -> dict[str, Any]:
        """The rows, and whether all that were compared are within their tolerances. Raises ApiError."""
        job_id, reference_id = (_asked(query, name) for name in ("job", "reference"))
        async with self._turn:
            ours = await self._tensors("job", job_id)
            theirs = await self._tensors("reference", reference_id)
            rows = await asyncio.to_thread(_compare, ours, theirs)
        compared = [row for row in rows if row["ok"] is not None]
        if not any(row["number"] != 3 for row in compared):  # the cache is compared with itself
            raise ApiError(400, "invalid_request", "the two jobs were asked for no checkpoint in common", param="job")
        return {
            "job": job_id,
            "reference": reference_id,
            "ok": all(row["ok"] for row in compared),
            "rows": rows,
        }

    async def _tensors(self, param: str, job_id: str) -> Tensors:
        try:
            return await self._client.job(job_id).checkpoints(max_bytes=MAX_BYTES)
        except NoCheckpoints as error:
            code, message = await self._why(job_id, error)
            raise ApiError(404, code, message, param=param) from None
        except InvalidRequest as error:
            raise ApiError(413, "too_large", str(error), param=param) from None

    async def _why(self, job_id: str, error: NoCheckpoints) -> tuple[str, str]:
        try:
            state = await self._client.job(job_id).status()
        except UnknownJob:
            return "not_found", f"no such job, or it has expired: {job_id}"
        if state in ("queued", "running"):
            return error.code, f"job {job_id} is {state}: it has its checkpoints when it has succeeded"
        return error.code, str(error)


def _asked(query: QueryParams, name: str) -> str:
    value = query.get(name)
    if not is_job_id(value):
        raise ApiError(400, "invalid_request", f"{name} has to be the id of a job", param=name)
    return value


def _compare(ours: Tensors, theirs: Tensors) -> list[dict[str, Any]]:
    from headrace.client.wire.comparison import compare

    try:
        rows = compare(ours, theirs, reference=REFERENCE, tolerances={})
    except (ArithmeticError, LookupError, TypeError, ValueError):  # tensors that no worker of ours wrote
        message = "the tensors of the two jobs are none that can be compared"
        raise ApiError(400, "invalid_request", message, param="job") from None
    return [_told(row) for row in rows]


def _told(row: Row) -> dict[str, Any]:
    """A row as JSON, which knows neither infinity nor NaN."""
    told = row.to_json()
    for name in ("max_abs", "max_rel"):
        if told[name] is not None and not math.isfinite(told[name]):
            told["note"] = told["note"] or "it is no finite number"
            told[name] = None
    return told

"""The addresses of files and batches."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from headrace.client.http.auth import UPLOAD
from headrace.client.http.context import owner_of, parts_of, read_json, route
from headrace.client.http.errors import ApiError, not_found
from headrace.client.http.file_store import LIFE_S, SHORTEST_LIFE_S

# --- files -----------------------------------------------------------------------------------------------------------


async def upload_file(request: Request) -> Response:
    """`POST /v1/files`."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "invalid_request", "a file is uploaded as multipart/form-data")
    async with request.form(max_files=1, max_fields=8, max_part_size=1024) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "invalid_request", "file: expected the file itself", param="file")
        if purpose != "batch":
            raise ApiError(400, "invalid_request", "purpose: only 'batch' is offered here", param="purpose")
        life_s = _life(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))
        name = file.filename or "file"
        add = parts_of(request).files.add
        stored = await run_in_threadpool(add, file.file, filename=name, owner=owner_of(request), life_s=life_s)
    return JSONResponse(stored.public())


def _life(anchor: Any, seconds: Any) -> int:
    if anchor is None and seconds is None:
        return LIFE_S
    right = anchor == "created_at" and isinstance(seconds, str) and seconds.isascii() and seconds.isdecimal()
    if not right or not SHORTEST_LIFE_S <= int(seconds[:12]) <= LIFE_S:
        expected = f"anchor 'created_at', and seconds from {SHORTEST_LIFE_S} to {LIFE_S}"
        raise ApiError(400, "invalid_request", f"expires_after: expected {expected}", param="expires_after")
    return int(seconds)


def list_files(request: Request) -> Response:
    """`GET /v1/files`."""
    order, purpose = request.query_params.get("order", "desc"), request.query_params.get("purpose")
    if order not in ("asc", "desc"):
        raise ApiError(400, "invalid_request", "order: expected 'asc' or 'desc'", param="order")
    files = [f for f in parts_of(request).files.owned_by(owner_of(request)) if purpose in (None, f.purpose)]
    if order == "desc":
        files.reverse()
    return JSONResponse(_page(request, [file.public() for file in files], 10_000, 10_000))


def get_file(request: Request) -> Response:
    """`GET /v1/files/{id}`."""
    file = parts_of(request).files.get(request.path_params["id"], owner_of(request))
    return JSONResponse(file.public())


def get_content(request: Request) -> Response:
    """`GET /v1/files/{id}/content`. Never as something that a browser would show or run."""
    parts = parts_of(request)
    file = parts.files.get(request.path_params["id"], owner_of(request))
    headers = {"x-content-type-options": "nosniff"}
    kind = "application/octet-stream"
    return FileResponse(parts.files.path(file.id), media_type=kind, filename=file.filename, headers=headers)


def delete_file(request: Request) -> Response:
    """`DELETE /v1/files/{id}`."""
    parts = parts_of(request)
    file = parts.files.get(request.path_params["id"], owner_of(request))
    if parts.batches.uses(file.id):
        raise ApiError(409, "file_in_use", "a batch that is not complete reads the file; cancel it first", param="id")
    parts.files.delete(file.id)
    return JSONResponse({"id": file.id, "object": "file", "deleted": True})


def _page(request: Request, items: list[dict[str, Any]], default: int, most: int) -> dict[str, Any]:
    """The part of a list that is asked for, from the one behind `after` on."""
    given, after = request.query_params.get("limit", str(default)), request.query_params.get("after")
    if not (given.isascii() and given.isdecimal() and 1 <= int(given[:12]) <= most):
        raise ApiError(400, "invalid_request", f"limit: expected a whole number from 1 to {most}", param="limit")
    places = {item["id"]: place for place, item in enumerate(items)}
    if after is not None and after not in places:
        raise not_found("object", after[:80])
    start = 0 if after is None else places[after] + 1
    page = items[start : start + int(given)]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return {"object": "list", "data": page, **ends, "has_more": start + len(page) < len(items)}


# --- batches -------------------------------------------------------------------------------------------------------


async def create_batch(request: Request) -> Response:
    """`POST /v1/batches`."""
    body = await read_json(request)
    state = await run_in_threadpool(parts_of(request).batches.create, body, owner_of(request))
    return JSONResponse(state.public())


def list_batches(request: Request) -> Response:
    """`GET /v1/batches`, the newest first."""
    states = parts_of(request).batches.owned_by(owner_of(request))
    return JSONResponse(_page(request, [state.public() for state in reversed(states)], 20, 100))


def get_batch(request: Request) -> Response:
    """`GET /v1/batches/{id}`."""
    return JSONResponse(parts_of(request).batches.get(request.path_params["id"], owner_of(request)).public())


def cancel_batch(request: Request) -> Response:
    """`POST /v1/batches/{id}/cancel`."""
    return JSONResponse(parts_of(request).batches.cancel(request.path_params["id"], owner_of(request)).public())


ROUTES = [
    route("POST", UPLOAD, upload_file),
    route("GET", UPLOAD, list_files),
    route("GET", "/v1/files/{id}", get_file),
    route("DELETE", "/v1/files/{id}", delete_file),
    route("GET", "/v1/files/{id}/content", get_content),
    route("POST", "/v1/batches", create_batch),
    route("GET", "/v1/batches", list_batches),
    route("GET", "/v1/batches/{id}", get_batch),
    route("POST", "/v1/batches/{id}/cancel", cancel_batch),
]

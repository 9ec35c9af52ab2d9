"""`/v1/files`: uploaded input files, and the output files of batches."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from headrace.client.http.auth import UPLOAD_PATH
from headrace.client.http.context import context_of, owner_of, paginate, route, whole_number
from headrace.client.http.errors import ApiError
from headrace.client.http.file_store import MAX_FILES, MIN_RETENTION_S, RETENTION_S
from headrace.client.http.responses import JsonResponse
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import show

#: A range of bytes: its first and last place, or the number of bytes at the end.
RANGE = re.compile(r"\s*(?:(\d{1,15})-(\d{0,15})|-\d{1,15})\s*", re.ASCII)


async def upload_file(request: Request) -> Response:
    """`POST /v1/files`."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        message = "content-type: expected multipart/form-data, with the fields file and purpose"
        raise ApiError(415, "unsupported_media_type", message, param="content-type")
    async with request.form(max_files=1, max_fields=8, max_part_size=1024) as form:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise InvalidRequest("file", "nothing" if file is None else "text", "a file, with a name")
        if purpose != "batch":
            given = "nothing" if purpose is None else show(purpose) if isinstance(purpose, str) else "a file"
            raise InvalidRequest("purpose", given, "'batch'")
        retention_s = _retention(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))
        name = file.filename or "file"
        add = context_of(request).files.add
        stored = await run_in_threadpool(
            add, file.file, filename=name, owner=owner_of(request), retention_s=retention_s
        )
    return JsonResponse(stored.public())


def _retention(anchor: Any, seconds: Any) -> int:
    """Seconds until the file expires. Raises InvalidRequest if the form fields of `expires_after` are wrong."""
    if anchor is None and seconds is None:
        return RETENTION_S
    texts = [value if isinstance(value, str) else "" for value in (anchor, seconds)]
    retention_s = whole_number(texts[1], MIN_RETENTION_S, RETENTION_S)
    if texts[0] != "created_at" or retention_s is None:
        expected = f"anchor 'created_at', and seconds from {MIN_RETENTION_S} to {RETENTION_S}"
        raise InvalidRequest("expires_after", f"anchor {show(texts[0])} and seconds {show(texts[1])}", expected)
    return retention_s


def list_files(request: Request) -> Response:
    """`GET /v1/files`."""
    order, purpose = request.query_params.get("order") or "desc", request.query_params.get("purpose")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", show(order), "'asc' or 'desc'")
    files = [f for f in context_of(request).files.owned_by(owner_of(request)) if purpose in (None, "", f.purpose)]
    if order == "desc":
        files.reverse()
    return JsonResponse(paginate(request, files, MAX_FILES, MAX_FILES))


def get_file(request: Request) -> Response:
    """`GET /v1/files/{id}`."""
    file = context_of(request).files.get(request.path_params["id"], owner_of(request))
    return JsonResponse(file.public())


def get_content(request: Request) -> Response:
    """`GET /v1/files/{id}/content`, as a download: a browser must not render or run uploaded content."""
    _check_range(request.headers.get("range"))
    files, held = context_of(request).files, contextlib.ExitStack()
    file = held.enter_context(files.reading(request.path_params["id"], owner_of(request)))
    headers = {"x-content-type-options": "nosniff"}
    return _Content(
        files.path(file.id), held, media_type="application/octet-stream", filename=file.filename, headers=headers
    )


def _check_range(header: str | None) -> None:
    """Refuse a `Range` that cannot be read. Raises InvalidRequest."""
    unit, _, ranges = (header or "bytes=0-").partition("=")
    for text in ranges.split(","):
        found = RANGE.fullmatch(text)
        if unit.strip().lower() != "bytes" or found is None or (found[2] and int(found[1]) > int(found[2])):
            raise InvalidRequest("range", show(header), "such as 'bytes=0-99'")


class _Content(FileResponse):
    """The content of a file, which remains until it was sent even if the file is deleted meanwhile.

    Args:
        held: closed when the response was sent, or the client has disconnected.
    """

    def __init__(self, path: Path, held: contextlib.ExitStack, **options: Any) -> None:
        super().__init__(path, **options)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file (ASGI)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._held.close()


def delete_file(request: Request) -> Response:
    """`DELETE /v1/files/{id}`."""
    context = context_of(request)
    file = context.files.get(request.path_params["id"], owner_of(request))
    context.batches.delete_file(file.id)
    return JsonResponse({"id": file.id, "object": "file", "deleted": True})


ROUTES = [
    route("POST", UPLOAD_PATH, upload_file),
    route("GET", UPLOAD_PATH, list_files),
    route("GET", "/v1/files/{id}", get_file),
    route("DELETE", "/v1/files/{id}", delete_file),
    route("GET", "/v1/files/{id}/content", get_content),
]

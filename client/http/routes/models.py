"""`/v1/models`: the models that workers serve."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from headrace.client.http.context import context_of, route


def _model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "headrace"}


async def list_models(request: Request) -> Response:
    """`GET /v1/models`: models that live workers serve."""
    served = await context_of(request).jobs.served_models()
    return JSONResponse({"object": "list", "data": [_model_object(name, served[name]) for name in sorted(served)]})


async def get_model(request: Request) -> Response:
    """`GET /v1/models/{id}`."""
    jobs = context_of(request).jobs
    name = await jobs.find_model(request.path_params["model"])
    return JSONResponse(_model_object(name, (await jobs.served_models())[name]))


ROUTES = [
    route("GET", "/v1/models", list_models),
    route("GET", "/v1/models/{model:path}", get_model),
]

"""`/v1/models`: the models that workers serve."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.client.http.context import context_of, route
from headrace.client.http.responses import JsonResponse


def _model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "headrace"}


async def list_models(request: Request) -> Response:
    """`GET /v1/models`: models that live workers serve, the server's default model first."""
    context = context_of(request)
    served, default = await context.jobs.served_models(), context.client.model_name
    names = sorted(served, key=lambda name: (name != default, name))
    return JsonResponse({"object": "list", "data": [_model_object(name, served[name]) for name in names]})


async def get_model(request: Request) -> Response:
    """`GET /v1/models/{id}`."""
    jobs = context_of(request).jobs
    name = await jobs.find_model(request.path_params["model"])
    return JsonResponse(_model_object(name, (await jobs.served_models())[name]))


ROUTES = [
    route("GET", "/v1/models", list_models),
    route("GET", "/v1/models/{model:path}", get_model),
]

"""`/v1/models`: the models that workers serve."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.client.http.context import context_of, route
from headrace.client.http.jobs import JobRunner
from headrace.client.http.responses import JsonResponse


async def _model_object(jobs: JobRunner, name: str, created: int) -> dict[str, Any]:
    """The object of a model, with the smallest context that its workers report."""
    described = [worker.description for worker in (await jobs.status()).workers if worker.model == name]
    contexts = [each.max_context for each in described if each is not None and each.max_context]
    known = {"max_model_len": min(contexts)} if contexts else {}
    return {"id": name, "object": "model", "created": created, "owned_by": "headrace", **known}


async def list_models(request: Request) -> Response:
    """`GET /v1/models`: models that live workers serve, the server's default model first."""
    context = context_of(request)
    served, default = await context.jobs.served_models(), context.client.model_name
    names = sorted(served, key=lambda name: (name != default, name))
    models = [await _model_object(context.jobs, name, served[name]) for name in names]
    return JsonResponse({"object": "list", "data": models})


async def get_model(request: Request) -> Response:
    """`GET /v1/models/{id}`."""
    jobs = context_of(request).jobs
    name = await jobs.find_model(request.path_params["model"])
    return JsonResponse(await _model_object(jobs, name, (await jobs.served_models())[name]))


ROUTES = [
    route("GET", "/v1/models", list_models),
    route("GET", "/v1/models/{model:path}", get_model),
]

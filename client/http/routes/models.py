"""`/v1/models`: the models that workers serve, and their LoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from headrace.client.http.context import context_of, route
from headrace.client.http.jobs import NamedModel
from headrace.client.http.responses import JsonResponse
from headrace.client.jobs.status import Status


def _model_object(named: NamedModel, created: int, status: Status) -> dict[str, Any]:
    """The object of a model or an adapter, with the smallest context that the model's workers report."""
    described = [worker.description for worker in status.workers if worker.model == named.model]
    contexts = [each.max_context for each in described if each is not None and each.max_context]
    known = {"max_model_len": min(contexts)} if contexts else {}
    base = {"root": named.model, "parent": None if named.adapter is None else named.model}
    name = named.adapter or named.model
    return {"id": name, "object": "model", "created": created, "owned_by": "headrace", **base, **known}


def _adapters(status: Status, models: Sequence[str]) -> list[NamedModel]:
    """The adapters of models that a request can name as its model, in the order of the models."""
    bases: dict[str, set[str]] = {}
    for worker in status.workers:
        if worker.model in models and not worker.stalled:
            for each in worker.adapters or ():
                bases.setdefault(each.name, set()).add(worker.model)
    named = [NamedModel(next(iter(found)), name) for name, found in bases.items() if len(found) == 1]
    own = (each for each in named if each.adapter not in models)
    return sorted(own, key=lambda each: (models.index(each.model), each.adapter))


async def list_models(request: Request) -> Response:
    """`GET /v1/models`: models that live workers serve, the server's default model first, then their adapters."""
    context = context_of(request)
    served, status = await context.jobs.served_models(), await context.jobs.status()
    names = sorted(served, key=lambda name: (name != context.client.model_name, name))
    listed = [*map(NamedModel, names), *_adapters(status, names)]
    models = [_model_object(each, served[each.model], status) for each in listed]
    return JsonResponse({"object": "list", "data": models})


async def get_model(request: Request) -> Response:
    """`GET /v1/models/{id}`."""
    jobs = context_of(request).jobs
    named = await jobs.find_model(request.path_params["model"])
    return JsonResponse(_model_object(named, (await jobs.served_models())[named.model], await jobs.status()))


ROUTES = [
    route("GET", "/v1/models", list_models),
    route("GET", "/v1/models/{model:path}", get_model),
]

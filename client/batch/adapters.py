"""LoRA adapters under the name of a model, as the OpenAI API and vLLM name them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from headrace.client.wire.adapters import MAX_ADAPTERS, is_adapter_name, unknown_adapter
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import is_missing, show
from headrace.config.model_names import served_name


def model_of_adapter(named: str, adapters: Mapping[str, Collection[str]], models: Collection[str] = ()) -> str | None:
    """The model of the adapter that a request names as its model; None if this is not the name of an adapter.

    Args:
        named: as the request has it.
        adapters: the names of the adapters of each model.
        models: names that mean models, also where an adapter has the same name.

    Raises:
        InvalidRequest: several models have an adapter of this name.
    """
    if served_name(named) in models:
        return None
    having = sorted(model for model, names in adapters.items() if named in names)
    if len(having) > 1:
        expected = f"one of {', '.join(having)}, each of which has this adapter, and its name in the field adapter"
        raise InvalidRequest("model", show(named), expected)
    return having[0] if having else None


def check_one_adapter(fields: Mapping[str, Any], adapter: str) -> None:
    """Check a request whose model is the name of this adapter.

    Raises:
        InvalidRequest: the request names another adapter too.
    """
    given = fields.get("adapter")
    if not is_missing(given) and given != adapter:
        raise InvalidRequest("adapter", show(given), f"no value, since model names the adapter {adapter}")


def check_adapter(adapter: Any, model: str, adapters: Mapping[str, Collection[str]]) -> None:
    """Check that a model has the adapter that a request names, as far as is known.

    Args:
        adapter: the value of the field.
        model: the model of the request.
        adapters: the names of the adapters of each model.

    Raises:
        InvalidRequest: it has not.
    """
    known = adapters.get(model)
    if is_adapter_name(adapter) and known is not None and len(known) < MAX_ADAPTERS and adapter not in known:
        raise unknown_adapter(adapter, model, known)

"""LoRA adapters in the settings of a worker: their names, the models that they belong to, and their directories."""

from __future__ import annotations

import re
from collections.abc import Collection

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def is_adapter_name(name: str) -> bool:
    """Whether this is an adapter's name: 1 to 128 letters, digits, `.`, `_`, `-`, the first a letter or a digit."""
    return _NAME.fullmatch(name) is not None


def parse_adapters(value: str | None, models: Collection[str]) -> dict[str, dict[str, str]]:
    """Parse a list such as `tone=/adapters/tone,chat/formal=/adapters/formal` into model -> adapter -> directory.

    Args:
        value: NAME=DIRECTORY or MODEL/NAME=DIRECTORY, separated by commas. The model may be left out if there is one.
        models: names of the served models.

    Raises:
        ValueError: an item has another form, names a model that is not served, or has a name that is taken.
    """
    found: dict[str, dict[str, str]] = {model: {} for model in models}
    taken = set(models)
    for item in value.split(",") if value else ():
        key, _, folder = map(str.strip, item.partition("="))
        model, named, name = key.rpartition("/")
        if not named and len(models) == 1:
            (model,) = models
        if model not in found or name in taken or not is_adapter_name(name) or not folder:
            raise ValueError("adapter")
        taken.add(name)
        found[model][name] = folder
    return found

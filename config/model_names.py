"""Names of models: from strings alone, so that every machine and every working directory gives the same name.

A *served name* identifies a model in requests, results and queues. A *model* is what the settings of a worker name: a
served name or hub id to look up, or the path of a directory. Nothing here looks at the file system: if a directory
`gpt2` decided what `gpt2` means, a client would send its jobs to another queue than its worker reads.
"""

from __future__ import annotations

import os
import re

MAX_NAME = 128


def as_name(text: str) -> str:
    """A text made into a served name: other characters become `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:MAX_NAME].rstrip("-.") or "model"


def is_served_name(name: str) -> bool:
    """Whether this is a served name: 1 to 128 letters, digits, `.`, `_`, `-`, with no `.` or `-` at its ends."""
    return name == as_name(name)


def served_name(model: str) -> str | None:
    """The served name that a request means: itself, or `org-name` for a hub id `org/name`; None if it is neither."""
    name = model.replace("/", "-", 1)
    return name if is_served_name(name) else None


def slug(model: str) -> str:
    """The served name of a model in the settings: the last part of a path, and `org-name` for a hub id `org/name`.

    A path begins with `/`, `.` or `~`. `.` and `..` in it are relative to the working directory, and a symbolic link
    is named as it is written.
    """
    if not model.startswith(("/", ".", "~")):
        return as_name(model)
    path = os.path.normpath(model)
    return as_name(os.path.basename(os.path.abspath(path) if path.endswith(".") else path))


def parse_models(value: str) -> dict[str, str]:
    """Parse a list such as `demo,gpt2,chat=/models/v2` into name -> model, in the order of the list.

    Raises:
        ValueError: an item is empty, or two have the same name.
    """
    models: dict[str, str] = {}
    for item in map(str.strip, value.split(",")):
        name, named, model = map(str.strip, item.partition("="))
        if not named or not is_served_name(name):  # the = may be part of a directory's path
            name, model = slug(item), item
        if not model or model.startswith("=") or name in models:
            raise ValueError("model")
        models[name] = model
    return models

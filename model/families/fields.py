"""Read the fields of a config.json, with errors that name the file, the field, the value and what would be right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from headrace.model.hub import short_repr
from headrace.model.trusted_files import ModelError

#: Names of transformers' activation functions -> the function of the decoder (config.ACTIVATIONS) that each computes.
ACTIVATION_FUNCTIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
#: The largest size that is accepted.
MAX_SIZE = 1_000_000


class ConfigFields:
    """The fields of one config.json.

    Args:
        aliases: other names that transformers accepts: alias -> the name that the family reads.

    Raises:
        ModelError: a field is given under two names with different values.
    """

    def __init__(self, path: Path, raw: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
        self.path = path
        #: All fields, as they are written.
        self.raw = raw
        self._names = {name: name for name in raw}  # the name that is read -> the name in the file
        for alias, name in aliases.items():
            if alias not in raw:
                continue
            if name in raw and raw[name] != raw[alias]:
                self.refuse(alias, f"{name}, another name for it, is {short_repr(raw[name])}; remove the wrong one")
            self._names[name] = alias

    def get(self, name: str, default: Any) -> Any:
        """The value of a field, whatever its type is; the default where config.json does not have the field."""
        return self.raw[self._names[name]] if name in self._names else default

    def refuse(self, name: str, reason: str) -> NoReturn:
        """Raise a ModelError about a field: what is wrong with its value, and what to do."""
        written = self._names.get(name, name)
        raise ModelError(f"{self.path}: {written} is {short_repr(self.raw.get(written))}; {reason}")

    def size(self, name: str, default: int | None) -> int:
        """A whole number of at least 1. Without a default the field must be in the file."""
        value = self.get(name, default)
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            self.refuse(name, f"it must be a whole number from 1 to {MAX_SIZE:,}")
        return value

    def optional_size(self, name: str) -> int | None:
        """A whole number of at least 1, or null, which is also the default."""
        value = self.get(name, None)
        if value is not None and (type(value) is not int or not 1 <= value <= MAX_SIZE):
            self.refuse(name, f"it must be null or a whole number from 1 to {MAX_SIZE:,}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            self.refuse(name, "it must be true or false")
        return value

    def epsilon(self, name: str) -> float:
        """A small positive number; 1e-5 where the field is left out."""
        value = self.get(name, 1e-5)
        if not isinstance(value, float) or not (math.isfinite(value) and value > 0):
            self.refuse(name, "it must be a small positive number")
        return value

    def activation(self, name: str) -> str:
        """The decoder's function (config.ACTIVATIONS) for a name of transformers; gelu_new where it is left out."""
        value = self.get(name, "gelu_new")
        if not isinstance(value, str) or value not in ACTIVATION_FUNCTIONS:
            self.refuse(name, f"it must be one of {', '.join(ACTIVATION_FUNCTIONS)}; other functions are not computed")
        return ACTIVATION_FUNCTIONS[value]

    def check_heads(self, width: int, width_name: str, heads: int, heads_name: str) -> None:
        """Check that the width is a multiple of the number of heads."""
        if width % heads:
            written = [self._names.get(name, name) for name in (width_name, heads_name)]
            raise ModelError(f"{self.path}: {written[0]} {width} is not a multiple of {written[1]} {heads}")

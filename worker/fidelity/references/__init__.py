"""GPT-2 as other people's libraries compute it: what the checkpoints are compared with.

Each module builds the forward pass from its library's own primitives and shares no code with `model`. A library is
imported only when its reference is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from headrace.worker.fidelity.references.base import Reference, ReferenceUnavailable

REFERENCES = ("transformers", "tinygrad", "candle")
DTYPES = ("float32", "bfloat16", "float16", "int8")

__all__ = ["DTYPES", "REFERENCES", "Reference", "ReferenceUnavailable", "load_reference"]


def load_reference(name: str, folder: Path, dtype: str = "float32") -> Reference:
    """A reference with the weights of a directory in Hugging Face form (config.json and safetensors).

    Args:
        dtype: what it computes in; others than "float32" with transformers only. "int8" is bfloat16 with what goes into
            each product rounded to whole numbers of 8 bits, a row and a column each by a scale of its own.

    Raises:
        ValueError: unknown name or dtype; or a config that is not a plain GPT-2's.
        FileNotFoundError: the directory lacks its config or its weights.
        ReferenceUnavailable: the library is not installed, or cannot run here or in that dtype.
    """
    if name not in REFERENCES:
        raise ValueError(f"unknown reference {name!r}; there are {', '.join(REFERENCES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if dtype != "float32" and name != "transformers":
        raise ReferenceUnavailable(f"the reference {name!r} computes in float32 only, not in {dtype}")
    load: Callable[[Path, str], Reference] = import_module(f"{__name__}.{name}").load
    return load(Path(folder), dtype)

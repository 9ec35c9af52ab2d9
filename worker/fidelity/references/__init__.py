"""Models as other libraries compute them, and a float64 evaluation to measure errors against.

Each module builds the forward pass from the primitives of its library and shares no code with `model`. A library is
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


def load_reference(name: str, folder: Path, dtype: str = "float32", *, adapter: Path | None = None) -> Reference:
    """Load a reference with the weights of a directory in Hugging Face format (config.json and safetensors).

    Args:
        name: one of `REFERENCES`.
        folder: the directory.
        dtype: one of `DTYPES`; only transformers supports others than "float32". "int8" computes in bfloat16 and rounds
            the operands of each matrix product to 8-bit integers, with one scale for each row and each column.
        adapter: a directory with a LoRA adapter, which PEFT computes beside the weights; for transformers only.

    Raises:
        ValueError: the name or the dtype is unknown, or the config is of a model that the references do not compute.
        FileNotFoundError: the directory has no config or no weights.
        ReferenceUnavailable: the library is not installed, or cannot run on this machine or in that dtype, or
            computes plain GPT-2 only (tinygrad, candle) and the model is another one.
    """
    if name not in REFERENCES:
        raise ValueError(f"unknown reference {name!r}; expected one of {', '.join(REFERENCES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if dtype != "float32" and name != "transformers":
        raise ReferenceUnavailable(f"the reference {name!r} computes in float32 only, not in {dtype}")
    load: Callable[..., Reference] = import_module(f"{__name__}.{name}").load
    return load(Path(folder), dtype) if adapter is None else load(Path(folder), dtype, adapter)

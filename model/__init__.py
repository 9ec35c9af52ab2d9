"""GPT-2 in torch, with compiled kernels for CPUs. It can be used without the rest of headrace:

from headrace.model import load_model, load_tokenizer
gpt2, tokenizer = load_model("demo"), load_tokenizer("demo")
gpt2.logits(torch.tensor([tokenizer.encode("Hello.")]))     # [1, 2, 50257]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headrace.model.hub import ModelError, missing_package
from headrace.model.tokenizer import Tokenizer, load_tokenizer
from headrace.short_names import refuse_submodules as _refuse_submodules

if TYPE_CHECKING:
    from headrace.model.config import ModelConfig
    from headrace.model.decoder import Decoder
    from headrace.model.weights import load_model

__all__ = ["Decoder", "ModelConfig", "ModelError", "Tokenizer", "load_model", "load_tokenizer"]

#: Imported when they are first used: torch takes a second and 200 MB, and counting tokens does not need it.
_LAZY = {
    "Decoder": "headrace.model.decoder",
    "ModelConfig": "headrace.model.config",
    "load_model": "headrace.model.weights",
}

_refuse_submodules(__name__)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("headrace"):
            raise
        raise ImportError(f"headrace.model.{name} cannot be used: {missing_package(error.name)}") from error

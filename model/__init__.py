"""GPT-2 in plain torch. Imports nothing else of headrace, so it can be read and used on its own.

from headrace.model import load_model, load_tokenizer
gpt2, tokenizer = load_model("demo"), load_tokenizer("demo")
gpt2.logits(torch.tensor([tokenizer.encode("Hello.")]))     # [1, 2, 50257]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from headrace.model.hub import ModelError
from headrace.model.tokenizer import Tokenizer, load_tokenizer
from headrace.short_names import refuse_submodules as _refuse_submodules

if TYPE_CHECKING:
    from headrace.model.gpt2 import GPT2, GPT2Config
    from headrace.model.weights import load_model

__all__ = ["GPT2", "GPT2Config", "ModelError", "Tokenizer", "load_model", "load_tokenizer"]

#: What brings torch, which takes a second and 200 MB: imported when it is asked for. Who counts tokens needs none.
_HEAVY = {"GPT2": "headrace.model.gpt2", "GPT2Config": "headrace.model.gpt2", "load_model": "headrace.model.weights"}

_refuse_submodules(__name__)


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HEAVY[name]), name)

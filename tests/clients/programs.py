"""The programs: what is installed, and what each does. `drivers/NAME.py` runs in the program's own environment."""

from __future__ import annotations

from typing import NamedTuple


class Program(NamedTuple):
    """A program.

    Attributes:
        name: of its driver, with `_` for `-`.
        packages: what pip installs; the first is the one whose version is shown.
        does: what its driver does.
        of_node: whether npm installs it; `packages` are then npm's.
        sees_ours: whether it needs torch and transformers, and so sees the packages of this environment.
    """

    name: str
    packages: tuple[str, ...]
    does: str
    sees_ours: bool = False
    of_node: bool = False


PROGRAMS = (
    Program(
        "lm-eval",
        ("lm_eval[api]", "accelerate"),
        "four tasks against its own Hugging Face backend, twice with other batches",
        sees_ours=True,
    ),
    Program("litellm", ("litellm",), "a completion, a stream and a chat error"),
    Program("langchain-openai", ("langchain-openai",), "a completion, a batch of five and a stream"),
    Program("llama-index", ("llama-index-llms-openai-like",), "a completion and a stream"),
    Program("openai-node", ("openai",), "a completion, a stream, a chat and an error from Node", of_node=True),
    Program("guidellm", ("guidellm",), "40 requests at once", sees_ours=True),
    Program("flower", ("flower",), "the worker and a task in its API", sees_ours=True),
    Program(
        "moto",
        ("moto[server,s3]", "s3fs"),
        "batches from and to s3://, killed and resumed; refused buckets",
        sees_ours=True,
    ),
    Program("schemathesis", ("schemathesis",), "requests made from the OpenAPI description"),
)

"""The contenders: our engine and its peers, which run the same weights and prompts with the same number of threads."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Protocol

from benchmarks.workloads import Item

#: The new tokens of each prompt, in the order of the prompts.
Tokens = list[list[int]]


class Contender(Protocol):
    """Computes a workload greedily, with exactly the requested number of tokens."""

    def plans(self, items: Sequence[Item]) -> list[str]:
        """The possible ways to run this workload. Each is tried once, and the fastest one is measured."""

    def prepare(self, items: Sequence[Item], plan: str) -> Callable[[], Tokens]:
        """Do what a server does once before it accepts prompts. Returns the function to be timed."""


class Headrace:
    """The engine, driven step by step in this thread: no Celery, no Redis."""

    def __init__(self, folder: Path, precision: str, threads: int, scratch: Path) -> None:  # noqa: ARG002
        import structlog

        from headrace.config import Settings
        from headrace.worker.engine.build import load_engine

        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
        # No speculative decoding: a model with random weights repeats itself, so nearly every proposal is accepted.
        # Rounds repeat their prompts, which no peer keeps from one to the next.
        options = {"draft_tokens": 0, "prefix_cache": False}
        settings = Settings(model=str(folder), dtype=precision, device="cpu", threads=threads, **options)
        self.engine = load_engine(settings)

    def plans(self, items: Sequence[Item]) -> list[str]:  # noqa: ARG002
        return ["default settings, no speculative decoding"]

    def prepare(self, items: Sequence[Item], plan: str) -> Callable[[], Tokens]:  # noqa: ARG002
        return lambda: self._run(items)

    def _run(self, items: Sequence[Item]) -> Tokens:
        from headrace.client.wire.requests import parse_request

        wanted = [
            {"prompt": item.prompt, "max_tokens": item.new_tokens, "temperature": 0, "ignore_eos": True}
            for item in items
        ]
        futures = [self.engine.submit(parse_request(request)) for request in wanted]
        while self.engine.step():
            pass
        return [list(future.result().choices[0].token_ids) for future in futures]


@dataclass(frozen=True)
class Entry:
    """A contender in one precision, with its names in tables and on the command line."""

    peer: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.peer} {self.precision}"


#: Name -> class, modules that must be installed, supported precisions.
_KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "headrace": ("benchmarks.contenders:Headrace", (), ("float32", "bfloat16", "int8")),
    "transformers": ("benchmarks.peers.transformers:Padded", ("transformers",), ("float32", "bfloat16")),
    "transformers-continuous": (
        "benchmarks.peers.transformers:Continuous",
        ("transformers",),
        ("float32", "bfloat16"),
    ),
    "ctranslate2": (
        "benchmarks.peers.ctranslate2:CTranslate2",
        ("ctranslate2", "transformers"),
        ("float32", "bfloat16", "int8"),
    ),
    "llama.cpp": ("benchmarks.peers.llama:LlamaCpp", ("llama_cpp", "gguf"), ("float32", "bfloat16", "int8")),
}

OURS = "headrace"
PEERS = [name for name in _KINDS if name != OURS]


def entries(dtype: str, peers: Sequence[str]) -> list[Entry]:
    """Our engine in `dtype`, then the peers in comparable precisions.

    With bfloat16 these include int8, in which our engine runs as well.
    """
    allowed = {dtype, "int8"} if dtype == "bfloat16" else {dtype}
    chosen = [OURS, *(name for name in PEERS if name in peers)]
    return [Entry(name, precision) for name in chosen for precision in _KINDS[name][2] if precision in allowed]


def missing(peer: str) -> list[str]:
    """The modules of a peer that are not installed."""
    return [module for module in _KINDS[peer][1] if util.find_spec(module) is None]


class Seat:
    """Runs in the process of a contender: builds it, times it and counts its tokens."""

    def __init__(self, entry: Entry, threads: int, scratch: Path) -> None:
        self.entry, self.threads, self.scratch = entry, threads, scratch
        self.contender: Contender | None = None

    def load(self, folder: Path) -> None:
        """Build the contender on this model. Raises what the peer raises for an unsupported model or precision."""
        import torch

        torch.set_num_threads(self.threads)
        self.contender = None  # free the previous model
        module, _, name = _KINDS[self.entry.peer][0].partition(":")
        build = getattr(import_module(module), name)
        self.contender = build(folder, self.entry.precision, self.threads, self.scratch)

    def plans(self, items: Sequence[Item]) -> list[str]:
        assert self.contender
        return self.contender.plans(items)

    def run(self, items: Sequence[Item], plan: str) -> tuple[float, Tokens]:
        """Run the workload once. Returns the seconds from prompts to tokens, and the tokens.

        Raises:
            RuntimeError: a prompt got more or fewer tokens than asked for.
        """
        assert self.contender
        compute = self.contender.prepare(items, plan)
        began = time.perf_counter()
        tokens = compute()
        took = time.perf_counter() - began
        if [len(row) for row in tokens] != [item.new_tokens for item in items]:
            raise RuntimeError(f"{self.entry.name} did not give the requested numbers of tokens")
        return took, tokens

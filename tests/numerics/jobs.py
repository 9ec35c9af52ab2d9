"""The models and jobs whose results have digests, and how a result becomes a digest.

Weights are integers of torch's generator times a power of two: the same on every machine, unlike normal numbers, which
torch computes by vector functions.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.client.wire.requests import parse_request
from headrace.client.wire.results import Choice, Result
from headrace.model import Decoder, load_model
from headrace.model.adapters.lora import Adapter, LowRank
from headrace.model.config import ModelConfig
from headrace.model.families.base import decoder_shapes
from headrace.worker.engine.adapters import Adapters
from headrace.worker.engine.loaded_adapter import FILES
from tests.unit.worker.engine.engine_helpers import build, drive

PRECISIONS = ("float32", "int8")
#: name -> fields of a request.
Jobs = Mapping[str, Mapping[str, Any]]


def _ids(count: int, vocabulary: int, seed: int) -> list[int]:
    return [(seed + 7919 * i * i + 104729 * i) % vocabulary for i in range(count)]


def jobs_of(vocabulary: int, positions: int) -> Jobs:
    """Jobs for a model with `vocabulary` tokens: greedy, sampled, penalised, of several samples, long, drafted."""
    long = min(positions - 16, 300)
    again = (_ids(12, vocabulary, 5) * 5)[: positions - 20]
    return {
        "greedy": {"prompt": _ids(9, vocabulary, 1), "max_tokens": 12, "temperature": 0, "logprobs": 2},
        "sampled": {"prompt": _ids(20, vocabulary, 2), "max_tokens": 10, "temperature": 0.9, "logprobs": 1, "n": 3},
        "filtered": {
            "prompt": _ids(3, vocabulary, 3),
            "max_tokens": 10,
            "temperature": 1.3,
            "logprobs": 0,
            "top_k": 50,
            "top_p": 0.9,
            "min_p": 0.02,
        },
        "penalised": {
            "prompt": _ids(30, vocabulary, 4),
            "max_tokens": 12,
            "temperature": 0.7,
            "logprobs": 1,
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "logit_bias": {"7": 2.5},
        },
        "long": {"prompt": _ids(long, vocabulary, 6), "max_tokens": 4, "temperature": 0, "logprobs": 5, "echo": True},
        "drafted": {"prompt": again, "max_tokens": 16, "temperature": 0, "logprobs": 0},
    }


TEXTS: Jobs = {
    "text": {"prompt": "The river mill turned", "max_tokens": 24, "temperature": 0, "logprobs": 3},
    "text sampled": {"prompt": "Hello.", "max_tokens": 24, "temperature": 0.8, "top_p": 0.95, "logprobs": 1, "n": 2},
}


@dataclass(frozen=True)
class Subject:
    """A model with its jobs."""

    name: str
    make: Callable[[str], Decoder]
    jobs: Jobs
    precisions: tuple[str, ...] = PRECISIONS
    #: Ranks of adapters, which jobs name by them.
    ranks: tuple[int, ...] = ()


@functools.cache
def seeded_weights(config: ModelConfig) -> dict[str, Tensor]:
    """float32 weights by the names of `decoder_shapes`; matrices have a standard deviation of about 0.019."""
    generator = torch.Generator().manual_seed(2718)

    def numbers(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int32).float() * scale

    weights = {name: numbers(shape, 2.0**-20) for name, shape in decoder_shapes(config)}
    for name in weights:
        if ".ln_" in f".{name}" and name.endswith("weight"):
            weights[name] = 1 + weights[name]
    return weights


def seeded_adapter(config: ModelConfig, rank: int) -> Adapter:
    """An adapter for every linear layer, with biases of its own for a layer and for two norms."""
    generator = torch.Generator().manual_seed(rank)
    width, inner = config.n_embd, config.inner

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-99, 100, shape, generator=generator).float() / 512

    columns = (config.n_head + 2 * config.kv_heads) * config.head_dim
    shapes = {"attn.c_attn": (width, columns), "attn.c_proj": (width, width)}
    shapes |= {"mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}
    matrices = {
        f"h.{layer}.{name}.weight": [LowRank(numbers(rows, rank), numbers(rank, columns), 0)]
        for layer in range(config.n_layer)
        for name, (rows, columns) in shapes.items()
        if layer or name != "mlp.c_fc"
    }
    biases = {"h.0.mlp.c_fc.bias": numbers(inner), "h.1.ln_1.bias": numbers(width), "ln_f.bias": numbers(width)}
    return Adapter(matrices, biases, f"{rank:064x}", rank)


def seeded(config: ModelConfig) -> Callable[[str], Decoder]:
    """A maker of a model with seeded weights, for a precision."""
    return lambda precision: Decoder(config, seeded_weights(config), digest="seeded", int8=precision == "int8")


def bundled(precision: str) -> Decoder:
    """The model that headrace comes with."""
    return load_model("demo", device="cpu", dtype=precision)


#: Of adapters: one lane, a whole vector, and three vectors.
RANKS = (1, 16, 40)


def adapted_jobs() -> Jobs:
    """Jobs of a model with adapters: one with each, and one without."""
    jobs = list(jobs_of(1009, 400).items())
    ranks = itertools.cycle((*RANKS, None))
    return {
        name: {**fields, "adapter": None if rank is None else str(rank)}
        for (name, fields), rank in zip(jobs, ranks, strict=False)
    }


_SMALL = {"vocab_size": 1009, "n_positions": 400, "n_layer": 2}


def narrow(activation: str, **sizes: int) -> Callable[[str], Decoder]:
    """A maker of a small model with another activation function, and widths that are not multiples of a vector."""
    return seeded(ModelConfig(**_SMALL, **sizes, activation=activation))


_LARGE = ModelConfig(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
_PLAIN = (
    Subject(name, make, jobs)
    for name, make, jobs in (
        ("bundled", bundled, {**TEXTS, **jobs_of(50257, 1024)}),
        ("124M shape", seeded(_LARGE), jobs_of(50257, 1024)),
        ("heads of 80", seeded(ModelConfig(**_SMALL, n_embd=320, n_head=4)), jobs_of(1009, 400)),
        ("multi-query", seeded(ModelConfig(**_SMALL, n_embd=128, n_head=4, n_kv_head=1)), jobs_of(1009, 400)),
        (
            "windows",
            seeded(ModelConfig(**_SMALL, n_embd=128, n_head=2, windows=(None, 40))),
            jobs_of(1009, 400),
        ),
        ("gelu, width 75", narrow("gelu", n_embd=75, n_head=3, n_inner=131), jobs_of(1009, 400)),
        ("relu, width 160", narrow("relu", n_embd=160, n_head=2, n_inner=1001), jobs_of(1009, 400)),
        ("silu, width 128", narrow("silu", n_embd=128, n_head=2, n_inner=99), jobs_of(1009, 400)),
        ("tanh, width 128", narrow("tanh", n_embd=128, n_head=2), jobs_of(1009, 400)),
    )
)
SUBJECTS = (*_PLAIN, Subject("adapters", narrow("gelu_tanh", n_embd=136, n_head=2), adapted_jobs(), ranks=RANKS))


def adapters_of(model: Decoder, ranks: Sequence[int], folder: Path) -> Adapters:
    """Seeded adapters of these ranks, loaded. `folder` has their places, and must remain."""
    named = {str(rank): folder / str(rank) for rank in ranks}
    for place, file in itertools.product(named.values(), FILES):
        place.mkdir(exist_ok=True)
        (place / file).touch()
    found = Adapters(lambda place: model.pack_adapter(seeded_adapter(model.config, int(place.name))), named=named)
    found.load_named()
    return found


def digests(subject: Subject, precision: str) -> dict[str, str]:
    """The digest of each job's result, computed together in one engine that proposes tokens and shares prefixes."""
    model = subject.make(precision)
    with tempfile.TemporaryDirectory() as folder:
        adapters = adapters_of(model, subject.ranks, Path(folder))
        engine = build(model=model, slots=32, draft_tokens=5, budget_positions=24 * 1024, adapters=adapters)
        requests = [parse_request({"seed": 17, "ignore_eos": True, **fields}) for fields in subject.jobs.values()]
        results = drive(engine, *[engine.submit(request) for request in requests])
    return {name: digest(result) for name, result in zip(subject.jobs, results, strict=True)}


def digest(result: Result) -> str:
    """A hash of the tokens and of every bit of the log probabilities; of NaN only that it is NaN."""
    return hashlib.sha256(json.dumps([_content(choice) for choice in result.choices]).encode()).hexdigest()[:16]


def _content(choice: Choice) -> list[object]:
    rows = [[token.logprob, *(top.logprob for top in token.top)] for token in choice.logprobs or []]
    tops = [[top.token_id for top in token.top] for token in choice.logprobs or []]
    return [choice.token_ids, tops, [[_bits(number) for number in row] for row in rows]]


def _bits(number: float | None) -> str | None:
    return None if number is None else "nan" if math.isnan(number) else number.hex()

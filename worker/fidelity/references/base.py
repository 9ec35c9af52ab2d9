"""The interface of references, their errors, and the checkpoints that are derived from the logits."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from headrace.extras import how_to_install

Array = NDArray[Any]

#: Reference name -> (package on PyPI, version that produced the recorded outputs).
PACKAGES = {
    "transformers": ("transformers", "5.23.0"),
    "tinygrad": ("tinygrad", "0.14.0"),
    "candle": ("candle-nn", "0.4.2"),
    "peft": ("peft", "0.21.2"),
}
#: Checkpoint 11 is taken at this temperature.
PROBS_TEMPERATURE = 0.8


class ReferenceUnavailable(RuntimeError):
    """Raised when a reference cannot run on this machine; the message says what to install."""


class Reference(Protocol):
    """GPT-2 as another library computes it."""

    @property
    def name(self) -> str:
        """Library and version, for example "transformers 5.23.0"."""
        ...

    def trace(self, token_ids: Sequence[int]) -> dict[str, Array]:
        """Return the activations at the checkpoints for T tokens, in float32 and without a batch dimension.

        `embeddings`, `ln_1`, `attn`, `mlp`, `block_0` [T, E]; `q` [T, H, D]; `k`, `v` [T, KV, D], where KV is the
        number of heads of keys and values; `scores` [H, T, T], scaled and before the mask; `logits` [T, V];
        `last_logits`, `probs` [V]; `next_token` [], int64. Also `hidden` [n_layer + 1, T, E]: the residual stream after
        the embeddings and after each block.

        Raises:
            ValueError: there are no tokens, more tokens than positions, or a token id outside the vocabulary.
        """
        ...

    def generate(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Return `count` new tokens by argmax, without stopping at end of text. Raises ValueError like `trace`."""
        ...


def import_library(reference: str, module: str) -> ModuleType:
    """Import a module of the reference's library.

    Raises:
        ReferenceUnavailable: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package, tested = PACKAGES[reference]
        raise ReferenceUnavailable(
            f"The reference {reference!r} needs the package {package} (tested with {tested}): "
            f"{how_to_install('references')}, or `pip install {package}=={tested}` anywhere. ({error})"
        ) from error


def library_name(reference: str) -> str:
    """Return the library's name and installed version."""
    try:
        return f"{reference} {version(PACKAGES[reference][0])}"
    except PackageNotFoundError:
        return reference


def check_tokens(token_ids: Sequence[int], *, count: int = 0, n_positions: int, vocab_size: int) -> list[int]:
    """Check that the tokens and `count` new ones fit the model. Returns the tokens as ints.

    Raises:
        ValueError: there are no tokens, too many, or one is outside the vocabulary.
    """
    ids = [int(token) for token in token_ids]
    # The last new token is not fed back into the model, so it needs no position.
    needed = len(ids) + max(count - 1, 0)
    if not ids:
        raise ValueError("there are no tokens; an empty prompt stands for the one token 50256")
    if needed > n_positions:
        raise ValueError(f"{needed} tokens are more than the model's {n_positions} positions")
    wrong = [token for token in ids if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(f"token id {wrong[0]} is outside the vocabulary, 0 to {vocab_size - 1}")
    return ids


def with_outcome(tensors: dict[str, Array]) -> dict[str, Array]:
    """Add the tensors derived from `logits` [T, V]: `last_logits`, `next_token` and `probs`."""
    last = tensors["logits"][-1]
    return tensors | {
        "last_logits": last,
        "next_token": np.array(last.argmax(), np.int64),
        "probs": probabilities(last),
    }


def probabilities(logits: Array) -> Array:
    """Return the softmax at the temperature of checkpoint 11. [V] -> float32 [V]."""
    # Computed in float64, because the error of a float32 sum of 50,257 numbers exceeds the tolerance of 1e-6.
    scaled = logits.astype(np.float64) / PROBS_TEMPERATURE
    weights = np.exp(scaled - scaled.max())
    probs: Array = weights / weights.sum()
    return probs.astype(np.float32)

"""Find the likely cause of a failed checkpoint.

Each common mistake is applied to the reference's tensors. If the result is close to the tensors of the tested
implementation, that mistake is the likely cause. This module uses numpy only; comments give shapes as in
model/decoder.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]
Weights = Mapping[str, np.ndarray]


def likely_cause(number: int, ours: Tensors, theirs: Tensors, weights: Weights, tokens: list[int]) -> str | None:
    """Name the mistake that explains a failed checkpoint.

    Args:
        number: the first checkpoint that failed.
        ours: the tensors of the tested implementation, by name.
        theirs: the tensors of the reference.
        weights: the model's weights by their names in the file, without `transformer.`.
        tokens: the prompt.

    Returns:
        A sentence, or None if no common mistake explains the error.
    """
    candidates = _CANDIDATES.get(number, _none)
    try:
        if number == 3:
            return _cache_cause(ours)
        for cause, name, guess in candidates(ours, theirs, weights, tokens):
            if _explains(guess, ours[name], theirs[name]):
                return str(cause)
    except (KeyError, ValueError, IndexError):  # a tensor is missing or has another shape: no mistake can be applied
        return None
    return None


def _explains(guess: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Return whether the guess is much closer to our tensor than the reference is."""
    if guess.shape != ours.shape or guess.shape != theirs.shape:
        return False
    return float(np.abs(guess - ours).max()) < 0.02 * float(np.abs(theirs - ours).max())


Candidates = Iterator[tuple[str, str, np.ndarray]]


def _first_norm(ours: Tensors, theirs: Tensors, weights: Weights, tokens: list[int]) -> Candidates:  # noqa: ARG001
    x, count = theirs["embeddings"], len(tokens)  # [T, E]
    for shift in (1, -1):
        positions = np.clip(np.arange(count) + shift, 0, None)
        yield (
            f"positions are off by one (the first is {shift})",
            "embeddings",
            weights["wte.weight"][tokens] + weights["wpe.weight"][positions],
        )
    centred = x - x.mean(-1, keepdims=True)
    scale, bias = weights["h.0.ln_1.weight"], weights["h.0.ln_1.bias"]
    unbiased = centred / np.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5)
    yield "the variance is unbiased (divided by N - 1); GPT-2 divides by N", "ln_1", unbiased * scale + bias
    outside = centred / (np.sqrt(x.var(-1, keepdims=True)) + 1e-5)
    yield "epsilon is added outside the square root", "ln_1", outside * scale + bias
    biased = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    yield "the scale and the bias of the layer norm are missing", "ln_1", biased


def _projections(ours: Tensors, theirs: Tensors, weights: Weights, tokens: list[int]) -> Candidates:  # noqa: ARG001
    x, weight, bias = theirs["ln_1"], weights["h.0.attn.c_attn.weight"], weights["h.0.attn.c_attn.bias"]
    count, heads, size = theirs["q"].shape
    transposed = x @ weight.reshape(weight.shape[::-1]).T + bias  # [T, 3E]
    for i, name in enumerate("qkv"):
        part = np.split(transposed, 3, axis=-1)[i].reshape(count, heads, size)
        yield "the weight is read transposed; the files store [in, out] and x @ W needs no transpose", name, part
    interleaved = (x @ weight + bias).reshape(count, heads, 3, size)
    for i, name in enumerate("qkv"):
        yield "q, k and v are read interleaved by head; each is one third of the columns", name, interleaved[:, :, i]


def _cache_cause(ours: Tensors) -> str | None:
    """Checkpoint 3 compares the cache with the tensors of checkpoint 2, so no reference is needed."""
    for side in ("k", "v"):
        cache, written = ours[f"cache_{side}"], ours[side]
        if len(cache) > 1 and np.array_equal(cache[1:], written[:-1]):
            return "the cache index is off by one: row i is stored at i + 1"
        if len(cache) > 1 and np.array_equal(cache[:-1], written[1:]):
            return "the cache index is off by one: row i is stored at i - 1"
    return None


def _scores(ours: Tensors, theirs: Tensors, weights: Weights, tokens: list[int]) -> Candidates:  # noqa: ARG001
    size = theirs["q"].shape[-1]
    width = theirs["q"].shape[-2] * size
    yield "the scores are not scaled by 1/sqrt(head size)", "scores", theirs["scores"] * math.sqrt(size)
    yield "the scores are scaled twice", "scores", theirs["scores"] / math.sqrt(size)
    yield (
        "the scores are scaled by the model width, not by the head size",
        "scores",
        theirs["scores"] * math.sqrt(size / width),
    )


def _attention(ours: Tensors, theirs: Tensors, weights: Weights, tokens: list[int]) -> Candidates:  # noqa: ARG001
    count = theirs["scores"].shape[-1]
    weight, bias = weights["h.0.attn.c_proj.weight"], weights["h.0.attn.c_proj.bias"]

    def output(diagonal: int) -> np.ndarray:
        seen = np.tril(np.ones((count, count), dtype=bool), diagonal)
        seen[0, 0] = True  # otherwise the first row would attend to nothing
        masked = np.where(seen, theirs["scores"].astype(np.float64), -np.inf)
        shares = np.exp(masked - masked.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed: np.ndarray = np.einsum("hts,shd->thd", shares, theirs["v"]).reshape(count, -1)
        return mixed

    yield "the mask is off by one: a token sees the next one", "attn", output(1) @ weight + bias
    yield "the mask is off by one: a token does not attend to itself", "attn", output(-1) @ weight + bias
    yield "there is no causal mask", "attn", output(count) @ weight + bias
    yield "the weight of the projection is read transposed", "attn", output(0) @ weight.T + bias
    yield "the bias of the projection is missing", "attn", output(0) @ weight


def _feed_forward(ours: Tensors, theirs: Tensors, weights: Weights, tokens: list[int]) -> Candidates:  # noqa: ARG001
    x = (theirs["embeddings"] + theirs["attn"]).astype(np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normed = normed * weights["h.0.ln_2.weight"] + weights["h.0.ln_2.bias"]
    inner = normed @ weights["h.0.mlp.c_fc.weight"] + weights["h.0.mlp.c_fc.bias"]
    weight, bias = weights["h.0.mlp.c_proj.weight"], weights["h.0.mlp.c_proj.bias"]
    erf = np.vectorize(math.erf, otypes=[np.float64])
    exact = inner * 0.5 * (1 + erf(inner / math.sqrt(2)))
    yield "GELU is computed with erf; GPT-2 was trained with the tanh form (gelu_new)", "mlp", exact @ weight + bias
    yield "the activation is ReLU; GPT-2's is GELU", "mlp", np.maximum(inner, 0) @ weight + bias
    yield "the second layer norm is missing", "mlp", _tanh_gelu(x @ weights["h.0.mlp.c_fc.weight"]) @ weight + bias


def _tanh_gelu(x: np.ndarray) -> np.ndarray:
    value: np.ndarray = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return value


def _logits(ours: Tensors, theirs: Tensors, weights: Weights, tokens: list[int]) -> Candidates:  # noqa: ARG001
    if "hidden" not in ours or "hidden" not in theirs:
        return
    gaps = np.abs(ours["hidden"] - theirs["hidden"]).max(axis=(1, 2))  # [n_layer + 1]
    diverged = [depth for depth, gap in enumerate(gaps) if gap > 1e-2]
    if diverged:
        yield f"the residual streams diverge in block {diverged[0] - 1}; inspect that block", "logits", ours["logits"]
        return
    last = theirs["hidden"][-1]
    yield "the final layer norm is missing", "logits", last @ weights["wte.weight"].T
    cause = "all blocks agree, so the head is not the token embedding (untied) or the final layer norm differs"
    yield cause, "logits", ours["logits"]


def _none(*_: Any) -> Candidates:
    return iter(())


_CANDIDATES: dict[int, Any] = {
    1: _first_norm,
    2: _projections,
    4: _scores,
    5: _attention,
    6: _feed_forward,
    8: _logits,
}

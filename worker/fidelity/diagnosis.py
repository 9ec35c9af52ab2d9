"""Find the likely cause of a failed checkpoint.

Each common mistake is applied to the reference's tensors. If the result is close to the tensors of the tested
implementation, that mistake is the likely cause. Mistakes in later blocks are applied to the shape of the model, of
which float64 then computes the logits. Comments give shapes as in model/decoder.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headrace.worker.fidelity.references.float64 import ACTIVATIONS, Float64
from headrace.worker.fidelity.references.shape import Shape

Tensors = Mapping[str, np.ndarray]
Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Case:
    """What is known of a failed checkpoint; see `likely_cause`."""

    ours: Tensors
    theirs: Tensors
    weights: Weights
    tokens: list[int]
    arbiter: Float64

    @property
    def shape(self) -> Shape:
        """The shape of the model, from config.json."""
        return self.arbiter.shape


def likely_cause(number: int, ours: Tensors, theirs: Tensors, arbiter: Float64, tokens: list[int]) -> str | None:
    """Name the mistake that explains a failed checkpoint.

    Args:
        number: the first checkpoint that failed.
        ours: the tensors of the tested implementation, by name.
        theirs: the tensors of the reference.
        arbiter: the float64 evaluation of the model, which has its shape and weights.
        tokens: the prompt.

    Returns:
        A sentence, or None if no common mistake explains the error.
    """
    candidates = _CANDIDATES.get(number, _none)
    try:
        if number == 3:
            return _cache_cause(ours)
        for cause, name, guess in candidates(_Case(ours, theirs, arbiter.weights, tokens, arbiter)):
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


def _first_norm(case: _Case) -> Candidates:
    theirs, weights, tokens = case.theirs, case.weights, case.tokens
    x, count, epsilon = theirs["embeddings"], len(tokens), case.shape.epsilon  # [T, E]
    for shift in (1, -1):
        positions = np.clip(np.arange(count) + shift, 0, None)
        yield (
            f"positions are off by one (the first is {shift})",
            "embeddings",
            weights["wte.weight"][tokens] + weights["wpe.weight"][positions],
        )
    centred = x - x.mean(-1, keepdims=True)
    scale, bias = weights["h.0.ln_1.weight"], weights["h.0.ln_1.bias"]
    unbiased = centred / np.sqrt(x.var(-1, keepdims=True, ddof=1) + epsilon)
    yield "the variance is unbiased (divided by N - 1); GPT-2 divides by N", "ln_1", unbiased * scale + bias
    outside = centred / (np.sqrt(x.var(-1, keepdims=True)) + epsilon)
    yield "epsilon is added outside the square root", "ln_1", outside * scale + bias
    biased = centred / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    yield "the scale and the bias of the layer norm are missing", "ln_1", biased


def _projections(case: _Case) -> Candidates:
    theirs, shape = case.theirs, case.shape
    x, weight, bias = theirs["ln_1"], case.weights["h.0.attn.c_attn.weight"], case.weights["h.0.attn.c_attn.bias"]
    heads = shape.n_head, shape.kv_heads, shape.kv_heads
    ends = np.cumsum(heads)[:-1]

    def by_thirds(columns: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip("qkv", np.split(columns.reshape(len(x), -1, shape.head_size), ends, axis=1), strict=True))

    transposed = by_thirds(x @ weight.reshape(weight.shape[::-1]).T + bias)  # [T, (H + 2 KV) D]
    for name in "qkv":
        yield (
            "the weight is read transposed; GPT-2's files store [in, out], those of other families [out, in]",
            name,
            transposed[name],
        )
    right = x @ weight + bias
    if shape.kv_heads < shape.n_head:
        for name in "kv":
            other = by_thirds(right)["v" if name == "k" else "k"]
            yield "keys and values are exchanged", name, other
        return
    if shape.family == "gpt_bigcode":
        together = right.reshape(len(x), 3, shape.n_head, -1).swapaxes(1, 2)
        for name, part in by_thirds(together).items():
            yield "q, k and v are read as thirds; without multi_query each head has its own three together", name, part
        return
    interleaved = right.reshape(len(x), shape.n_head, 3, -1)
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


def _scores(case: _Case) -> Candidates:
    theirs = case.theirs
    size = theirs["q"].shape[-1]
    width = theirs["q"].shape[-2] * size
    if math.isclose(case.shape.scales[0], 1.0) and size > 1:
        scaled = "the scores are scaled by 1/sqrt(head size); this model's are not scaled"
        yield scaled, "scores", theirs["scores"] / math.sqrt(size)
        return
    yield "the scores are not scaled by 1/sqrt(head size)", "scores", theirs["scores"] * math.sqrt(size)
    yield "the scores are scaled twice", "scores", theirs["scores"] / math.sqrt(size)
    yield (
        "the scores are scaled by the model width, not by the head size",
        "scores",
        theirs["scores"] * math.sqrt(size / width),
    )


def _attention(case: _Case) -> Candidates:
    theirs, shape = case.theirs, case.shape
    count = theirs["scores"].shape[-1]
    weight, bias = case.weights["h.0.attn.c_proj.weight"], case.weights["h.0.attn.c_proj.bias"]
    window, groups = shape.windows[0] or count, np.arange(shape.n_head) * shape.kv_heads // shape.n_head

    def output(last: int = 0, *, window: int = window, groups: np.ndarray = groups) -> np.ndarray:
        """The heads' sums, if row i attends to `window` positions up to i + last."""
        seen = np.tril(np.ones((count, count), dtype=bool), last)
        seen = np.triu(seen, 1 - window)
        seen[0, 0] = True  # otherwise the first row would attend to nothing
        q, k, v = (theirs[name].astype(np.float64) for name in "qkv")
        scores = np.einsum("thd,shd->hts", q, k[:, groups]) * shape.scales[0]
        masked = np.where(seen, scores, -np.inf)
        shares = np.exp(masked - masked.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed: np.ndarray = np.einsum("hts,shd->thd", shares, v[:, groups]).reshape(count, -1)
        return mixed

    yield "the mask is off by one: a token sees the next one", "attn", output(1) @ weight + bias
    yield "the mask is off by one: a token does not attend to itself", "attn", output(-1) @ weight + bias
    yield "there is no causal mask", "attn", output(count) @ weight + bias
    for wrong in (window + 1, window - 1) if shape.windows[0] else ():
        cause = f"the window is off by one: a token attends to {wrong} positions instead of {window}"
        yield cause, "attn", output(window=max(1, wrong)) @ weight + bias
    if shape.windows[0]:
        yield "the window is missing", "attn", output(window=count) @ weight + bias
    yield "the window of another layer is taken", "attn", output(window=_first_window(shape)) @ weight + bias
    for wrong_groups in (np.arange(shape.n_head) % shape.kv_heads, *((groups + i) % shape.kv_heads for i in (1, -1))):
        cause = "query heads read the keys and values of the wrong group"
        yield cause, "attn", output(groups=wrong_groups) @ weight + bias
    yield "the weight of the projection is read transposed", "attn", output() @ weight.T + bias
    yield "the bias of the projection is missing", "attn", output() @ weight


def _first_window(shape: Shape) -> int:
    return next((window for window in shape.windows if window), shape.n_positions)


def _feed_forward(case: _Case) -> Candidates:
    theirs, weights, right = case.theirs, case.weights, case.shape.activation
    x = (theirs["embeddings"] + theirs["attn"]).astype(np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + case.shape.epsilon)
    normed = normed * weights["h.0.ln_2.weight"] + weights["h.0.ln_2.bias"]
    matrix, inner_bias = weights["h.0.mlp.c_fc.weight"], weights["h.0.mlp.c_fc.bias"]
    weight, bias = weights["h.0.mlp.c_proj.weight"], weights["h.0.mlp.c_proj.bias"]
    inner = normed @ matrix + inner_bias
    for wrong in ACTIVATIONS.keys() - {right}:
        cause = f"the activation is {_ACTIVATION_NAMES[wrong]}; this model's is {_ACTIVATION_NAMES[right]}"
        yield cause, "mlp", ACTIVATIONS[wrong](inner) @ weight + bias
    yield "the second layer norm is missing", "mlp", ACTIVATIONS[right](x @ matrix) @ weight + bias


_ACTIVATION_NAMES = {
    "gelu_tanh": "GELU in the tanh form (gelu_new)",
    "gelu": "GELU with erf (gelu)",
    "relu": "ReLU",
    "silu": "SiLU",
    "tanh": "tanh",
}


def _logits(case: _Case) -> Candidates:
    ours, theirs = case.ours, case.theirs
    if "hidden" not in ours or "hidden" not in theirs:
        return
    gaps = np.abs(ours["hidden"] - theirs["hidden"]).max(axis=(1, 2))  # [n_layer + 1]
    diverged = [depth for depth, gap in enumerate(gaps) if gap > 1e-2]
    if diverged:
        for cause, shape in _wrong_shapes(case.shape):
            yield cause, "logits", Float64(case.arbiter.folder, shape).trace(case.tokens)["logits"]
        yield f"the residual streams diverge in block {diverged[0] - 1}; inspect that block", "logits", ours["logits"]
        return
    last = theirs["hidden"][-1]
    yield "the final layer norm is missing", "logits", last @ case.weights["lm_head.weight"].T
    head = "the token embedding (untied)" if case.shape.tied else "lm_head.weight, but the token embedding"
    cause = f"all blocks agree, so the head is not {head} or the final layer norm differs"
    yield cause, "logits", ours["logits"]


def _wrong_shapes(shape: Shape) -> Iterator[tuple[str, Shape]]:
    """Mistakes that do not show in block 0, and the shape that computes each."""
    window = next((each for each in shape.windows if each), None)
    if window is not None:
        for wrong in (window + 1, max(1, window - 1)):
            windows = tuple(each and wrong for each in shape.windows)
            cause = f"the window is off by one: a token attends to {wrong} positions instead of {window}"
            yield cause, replace(shape, windows=windows)
        yield "the window is missing", replace(shape, windows=(None,) * shape.n_layer)
        yield "global and local layers are exchanged", replace(shape, windows=(*shape.windows[1:], shape.windows[0]))
    first = shape.scales[0]
    by_layer = tuple(first / (layer + 1) for layer in range(shape.n_layer))
    if shape.scales != by_layer:
        yield "the scores are divided by the number of the layer; this model's are not", replace(shape, scales=by_layer)
    else:
        cause = "the scores are not divided by the number of the layer (scale_attn_by_inverse_layer_idx)"
        yield cause, replace(shape, scales=(first,) * shape.n_layer)


def _none(_: _Case) -> Candidates:
    return iter(())


_CANDIDATES: dict[int, Any] = {
    1: _first_norm,
    2: _projections,
    4: _scores,
    5: _attention,
    6: _feed_forward,
    8: _logits,
}

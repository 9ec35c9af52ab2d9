"""GPT-2 in float64, against which the error of every implementation is measured.

It uses numpy only, holds the weights of one layer at a time, and shares no code with `model`. Its rounding errors are
about five hundred million times smaller than those of float32. Weights are read as float32, like in every
implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headrace.worker.fidelity.references.base import PROBS_TEMPERATURE, Array, check_tokens
from headrace.worker.fidelity.references.files import StoredWeights, read_shape

NAME = "float64"
#: How many positions the head computes at once: 128 rows of 50,257 logits are 51 MB.
HEAD_ROWS = 128


class Float64:
    """The float64 evaluation of the weights of a directory in Hugging Face format.

    Raises:
        FileNotFoundError: the directory has no config or no weights.
        ValueError: the config is not that of a plain GPT-2.
    """

    name = NAME

    def __init__(self, folder: Path) -> None:
        self.shape = read_shape(folder)
        self.weights = StoredWeights(folder)

    def trace(self, token_ids: Sequence[int]) -> dict[str, Array]:
        """Return the tensors of `Reference.trace` in float64. Raises the same ValueError."""
        (tensors,) = self.traces([token_ids])
        return tensors

    def traces(self, prompts: Sequence[Sequence[int]], *, logits_limit: int | None = None) -> list[dict[str, Array]]:
        """Return the tensors of several prompts. The weights are read once for all of them.

        Args:
            prompts: token ids.
            logits_limit: longer prompts get no `logits`, only `last_logits` and the tensors derived from them.
        """
        kept: list[dict[str, Array]] = [{} for _ in prompts]
        finals = self._run(prompts, kept)
        for tensors, final in zip(kept, finals, strict=True):
            every = logits_limit is None or len(final) <= logits_limit
            logits = self._head(final if every else final[-1:])
            last = logits[-1]
            tensors.update({"logits": logits} if every else {})
            tensors |= {"last_logits": last, "next_token": np.array(last.argmax(), np.int64), "probs": _probs(last)}
        return kept

    def margins(self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[Array]:
        """Return by how much the logit of each new token is below the largest logit at its position.

        It is zero for the most likely token.

        Args:
            prompts: token ids.
            tokens: the new tokens of each prompt.

        Returns:
            A float64 array [number of new tokens] for each prompt.
        """
        fed = [[*prompt, *new[:-1]] for prompt, new in zip(prompts, tokens, strict=True)]
        finals = [final[len(prompt) - 1 :] for final, prompt in zip(self._run(fed, None), prompts, strict=True)]
        chosen = np.concatenate([check_tokens(new, **self._limits) for new in tokens])
        margins = []
        for rows, ids in zip(_slices(np.concatenate(finals)), _slices(chosen), strict=True):
            logits = self._head(rows)
            margins.append(logits.max(-1) - logits[np.arange(len(ids)), ids])
        return np.split(np.concatenate(margins), np.cumsum([len(new) for new in tokens])[:-1])

    def generate(self, token_ids: Sequence[int], count: int) -> list[int]:
        """See `Reference.generate`."""
        ids = check_tokens(token_ids, count=count, **self._limits)
        for _ in range(count):
            (final,) = self._run([ids], None)
            ids = [*ids, int(self._head(final[-1:])[0].argmax())]
        return ids[len(token_ids) :]

    @property
    def _limits(self) -> dict[str, int]:
        return {"n_positions": self.shape.n_positions, "vocab_size": self.shape.vocab_size}

    def _run(self, prompts: Sequence[Sequence[int]], kept: list[dict[str, Array]] | None) -> list[Array]:
        """Return the residual stream [T, E] of each prompt after the last block; `kept` gets the activations."""
        ids = [check_tokens(prompt, **self._limits) for prompt in prompts]
        tokens, positions = self.weights["wte.weight"], self.weights["wpe.weight"]
        streams = [tokens[row].astype(np.float64) + positions[: len(row)] for row in ids]
        hidden = [[stream] for stream in streams]
        for layer in range(self.shape.n_layer):
            prefix = f"h.{layer}."
            block = {n.removeprefix(prefix): self._weight(n) for n in self.weights if n.startswith(prefix)}
            for i, stream in enumerate(streams):
                inner: dict[str, Array] = {}
                streams[i] = self._block(block, stream, inner)
                if kept is not None:
                    hidden[i].append(streams[i])
                    kept[i].update({**inner, "block_0": streams[i], "embeddings": stream} if layer == 0 else {})
        if kept is not None:
            for tensors, stages in zip(kept, hidden, strict=True):
                tensors["hidden"] = np.stack(stages)  # [n_layer + 1, T, E]
        return streams

    def _weight(self, name: str) -> Array:
        return self.weights[name].astype(np.float64)

    def _block(self, weights: dict[str, Array], x: Array, inner: dict[str, Array]) -> Array:
        """[T, E] -> [T, E]."""
        count, heads = len(x), self.shape.n_head
        normed = self._norm(weights["ln_1.weight"], weights["ln_1.bias"], x)
        qkv = normed @ weights["attn.c_attn.weight"] + weights["attn.c_attn.bias"]  # [T, 3E]
        q, k, v = (part.reshape(count, heads, -1) for part in np.split(qkv, 3, axis=-1))  # [T, H, D]
        mixed = np.empty_like(q)
        scores = np.empty((heads, count, count))
        future = np.triu(np.ones((count, count), bool), 1)
        for head in range(heads):
            scores[head] = q[:, head] @ k[:, head].T / math.sqrt(q.shape[-1])
            shares = np.exp(np.where(future, -np.inf, scores[head]) - _largest(scores[head], future))
            mixed[:, head] = shares @ v[:, head] / shares.sum(-1, keepdims=True)
        attn = mixed.reshape(count, -1) @ weights["attn.c_proj.weight"] + weights["attn.c_proj.bias"]
        x = x + attn
        wide = self._norm(weights["ln_2.weight"], weights["ln_2.bias"], x) @ weights["mlp.c_fc.weight"]
        mlp = _gelu(wide + weights["mlp.c_fc.bias"]) @ weights["mlp.c_proj.weight"] + weights["mlp.c_proj.bias"]
        inner.update(ln_1=normed, q=q, k=k, v=v, scores=scores, attn=attn, mlp=mlp)
        result: Array = x + mlp
        return result

    def _norm(self, weight: Array, bias: Array, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        normed: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.shape.epsilon) * weight + bias
        return normed

    def _head(self, x: Array) -> Array:
        """The final norm and the tied head. [R, E] -> [R, V]."""
        normed = self._norm(self._weight("ln_f.weight"), self._weight("ln_f.bias"), x)
        tokens = self.weights["wte.weight"]
        parts = np.array_split(tokens, max(1, tokens.size // 2**24))  # in parts, because float64 doubles its size
        return np.concatenate([normed @ part.astype(np.float64).T for part in parts], axis=-1)


def _slices(rows: Array) -> list[Array]:
    """`HEAD_ROWS` rows at a time: the head converts its weights once for each, and logits are large."""
    return [rows[start : start + HEAD_ROWS] for start in range(0, len(rows), HEAD_ROWS)]


def _largest(scores: Array, future: Array) -> Array:
    """Return the largest unmasked score of each row. [T, T] -> [T, 1]."""
    seen: Array = np.where(future, -np.inf, scores).max(-1, keepdims=True)
    return seen


def _gelu(x: Array) -> Array:
    """GELU, tanh approximation, with which GPT-2 was trained."""
    value: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return value


def _probs(logits: Array) -> Array:
    weights = np.exp((logits - logits.max()) / PROBS_TEMPERATURE)
    probs: Array = weights / weights.sum()
    return probs

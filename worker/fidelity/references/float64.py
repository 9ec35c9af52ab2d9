"""The decoder of any family in float64, against which the error of every implementation is measured.

It uses numpy only, holds the weights of one layer at a time, and shares no code with
`model`. Its rounding errors are about five hundred million times smaller than those of float32. Weights are read as
float32, like in every implementation, unless an adapter is folded into them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headrace.worker.fidelity.references.base import PROBS_TEMPERATURE, Array, check_tokens
from headrace.worker.fidelity.references.decoder_weights import HEAD, DecoderWeights
from headrace.worker.fidelity.references.files import StoredWeights
from headrace.worker.fidelity.references.shape import Shape, read_shape

NAME = "float64"
#: How many positions the head computes at once: 128 rows of 50,257 logits are 51 MB.
HEAD_ROWS = 128
#: The scores of longer prompts are not kept: those of 16 heads over 8,192 positions are 8.6 GB.
SCORES_LIMIT = 1024


class Float64:
    """The float64 evaluation of the weights of a directory in Hugging Face format.

    Args:
        folder: the directory.
        shape: of the model, by default that in its config.json; `diagnosis` asks what a wrong one would compute.
        keep_float64: do not round weights that are stored as float64 to float32.

    Raises:
        FileNotFoundError: the directory has no config or no weights.
        ValueError: the config is of another family, or of a variant that is not computed.
    """

    name = NAME

    def __init__(self, folder: Path, shape: Shape | None = None, *, keep_float64: bool = False) -> None:
        self.shape = shape or read_shape(folder)
        self.folder = folder
        #: By the names of GPT-2, linear weights as [in, out].
        self.weights = DecoderWeights(self.shape, StoredWeights(folder, keep_float64=keep_float64))

    def trace(self, token_ids: Sequence[int]) -> dict[str, Array]:
        """Return the tensors of `Reference.trace` in float64. Raises the same ValueError."""
        (tensors,) = self.traces([token_ids])
        return tensors

    def traces(self, prompts: Sequence[Sequence[int]], *, logits_limit: int | None = None) -> list[dict[str, Array]]:
        """Return the tensors of several prompts. The weights are read once for all of them.

        Prompts of more than SCORES_LIMIT tokens get no `scores`.

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
        if not prompts:
            return []
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
                streams[i] = self._block(layer, block, stream, inner)
                if kept is not None:
                    hidden[i].append(streams[i])
                    kept[i].update({**inner, "block_0": streams[i], "embeddings": stream} if layer == 0 else {})
        if kept is not None:
            for tensors, stages in zip(kept, hidden, strict=True):
                tensors["hidden"] = np.stack(stages)  # [n_layer + 1, T, E]
        return streams

    def _weight(self, name: str) -> Array:
        return self.weights[name].astype(np.float64)

    def _block(self, layer: int, weights: dict[str, Array], x: Array, inner: dict[str, Array]) -> Array:
        """[T, E] -> [T, E]."""
        count = len(x)
        normed = self._norm(weights["ln_1.weight"], weights["ln_1.bias"], x)
        qkv = normed @ weights["attn.c_attn.weight"] + weights["attn.c_attn.bias"]  # [T, (H + 2 KV) D]
        heads = np.split(qkv.reshape(count, -1, self.shape.head_size), self._head_ends, axis=1)
        q, k, v = heads  # [T, H, D], [T, KV, D] twice
        kept = layer == 0 and count <= SCORES_LIMIT
        scores = np.empty((self.shape.n_head, count, count) if kept else 0)
        mixed = np.empty_like(q)
        hidden = self._hidden_positions(layer, count)
        for head in range(self.shape.n_head):
            of = head * self.shape.kv_heads // self.shape.n_head
            found = q[:, head] @ k[:, of].T * self.shape.scales[layer]
            shares = np.exp(np.where(hidden, -np.inf, found) - _largest(found, hidden))
            mixed[:, head] = shares @ v[:, of] / shares.sum(-1, keepdims=True)
            if kept:
                scores[head] = found
        attn = mixed.reshape(count, -1) @ weights["attn.c_proj.weight"] + weights["attn.c_proj.bias"]
        x = x + attn
        wide = self._norm(weights["ln_2.weight"], weights["ln_2.bias"], x) @ weights["mlp.c_fc.weight"]
        mlp = (
            self._activation(wide + weights["mlp.c_fc.bias"]) @ weights["mlp.c_proj.weight"]
            + weights["mlp.c_proj.bias"]
        )
        inner.update(ln_1=normed, q=q, k=k, v=v, attn=attn, mlp=mlp, **({"scores": scores} if kept else {}))
        result: Array = x + mlp
        return result

    @property
    def _head_ends(self) -> list[int]:
        return [self.shape.n_head, self.shape.n_head + self.shape.kv_heads]

    def _hidden_positions(self, layer: int, count: int) -> Array:
        """The positions that each row does not attend to. -> bool [T, T]."""
        window = self.shape.windows[layer]
        future = np.triu(np.ones((count, count), bool), 1)
        return future if window is None else future | np.tril(np.ones((count, count), bool), -window)

    def _activation(self, x: Array) -> Array:
        return ACTIVATIONS[self.shape.activation](x)

    def _norm(self, weight: Array, bias: Array, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        normed: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + self.shape.epsilon) * weight + bias
        return normed

    def _head(self, x: Array) -> Array:
        """The final norm and the head. [R, E] -> [R, V]."""
        normed = self._norm(self._weight("ln_f.weight"), self._weight("ln_f.bias"), x)
        head = self.weights[HEAD]
        parts = np.array_split(head, max(1, head.size // 2**24))  # in parts, because float64 doubles its size
        return np.concatenate([normed @ part.astype(np.float64).T for part in parts], axis=-1)


def _slices(rows: Array) -> list[Array]:
    """`HEAD_ROWS` rows at a time: the head converts its weights once for each, and logits are large."""
    return [rows[start : start + HEAD_ROWS] for start in range(0, len(rows), HEAD_ROWS)]


def _largest(scores: Array, hidden: Array) -> Array:
    """Return the largest unmasked score of each row. [T, T] -> [T, 1]."""
    seen: Array = np.where(hidden, -np.inf, scores).max(-1, keepdims=True)
    return seen


def _gelu(x: Array) -> Array:
    """GELU, tanh approximation, with which GPT-2 was trained."""
    value: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return value


_erf = np.vectorize(math.erf, otypes=[np.float64])  # numpy has no error function


def _erf_gelu(x: Array) -> Array:
    """GELU by its definition."""
    value: Array = 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    return value


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _silu(x: Array) -> Array:
    value: Array = x * (0.5 + 0.5 * np.tanh(0.5 * x))
    return value


def _tanh(x: Array) -> Array:
    value: Array = np.tanh(x)
    return value


#: Name in `Shape.activation` -> the function between the two feed-forward matrices.
ACTIVATIONS = {"gelu_tanh": _gelu, "gelu": _erf_gelu, "relu": _relu, "silu": _silu, "tanh": _tanh}


def _probs(logits: Array) -> Array:
    weights = np.exp((logits - logits.max()) / PROBS_TEMPERATURE)
    probs: Array = weights / weights.sum()
    return probs

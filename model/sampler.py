"""Sampling: logits -> next tokens, for all rows of a step at once, each with its own parameters.

Pure functions on tensors. R rows, V vocabulary. No function combines rows, so a row's token depends only on its own
logits, parameters and seed. The order of the steps is Hugging Face's: bias, penalties, temperature, top-k, top-p,
min-p; penalties follow vLLM (repetition over prompt and output, presence and frequency over output).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from headrace.model.kernels import sampling as kernel
from headrace.model.kernels.argmax import largest
from headrace.model.kernels.token_mask import Words, mask_rows

#: In place of a token: the row's logits hold a NaN; its mask leaves no token.
NOT_A_NUMBER, NO_TOKEN = -1, -2

NEVER = float("-inf")


@dataclass(frozen=True)
class RowParams:
    """How one row is sampled; the names are those of the request."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    #: Tokens that are not allowed at this position, such as the end of text before min_tokens.
    banned: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the temperature is so low that sampling is argmax."""
        return self.temperature < 1e-6

    @property
    def penalised(self) -> bool:
        """Whether a penalty depends on the tokens so far."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True)
class Draw:
    """The state of one row: its tokens so far, and what its next random number is derived from."""

    params: RowParams
    prompt: Sequence[int]
    output: Sequence[int]
    seed: int
    sample: int

    @property
    def position(self) -> int:
        """The index of the token to be drawn, counted from the first one after the prompt."""
        return len(self.output)


class TokenMasks(NamedTuple):
    """The rows that may not get every token, and one bit for each token that they may get; see `mask_rows`."""

    rows: list[int]
    words: Words


def sample(logits: Tensor, draws: Sequence[Draw], masks: TokenMasks | None = None) -> Tensor:
    """Next token of each row. logits: [R, V] -> LongTensor [R]; NOT_A_NUMBER or NO_TOKEN for a row that gets none.

    Logits may be in the type of the weights: argmax is the same in float32, in which everything else is computed. With
    masks they are overwritten.
    """
    logits = adjust(logits, draws)
    if masks is not None:
        mask_rows(logits, masks.rows, masks.words)
    best, chosen = largest(logits)
    rows = [i for i, draw in enumerate(draws) if not draw.params.greedy]
    if rows:
        picked = torch.tensor(rows, device=logits.device)
        chosen = chosen.index_copy(0, picked, _draw(logits, best, rows, [draws[i] for i in rows]))
    # The largest logit of a row with a NaN is NaN, so this one check is enough; +inf would make all probabilities NaN.
    chosen = chosen.masked_fill(best == NEVER, NO_TOKEN)
    return chosen.masked_fill(best.isnan() | (best == float("inf")), NOT_A_NUMBER)


def _draw(logits: Tensor, best: Tensor, rows: list[int], draws: Sequence[Draw]) -> Tensor:
    """Draw tokens for some rows, by the compiled kernel where there is one, else by torch's operators."""
    params, numbers = [draw.params for draw in draws], [uniform(d.seed, d.sample, d.position) for d in draws]
    drawn = kernel.draw(
        logits,
        best,
        kernel.DrawnRows(
            rows,
            temperatures=[p.temperature for p in params],
            top_ks=[max(p.top_k, 0) for p in params],
            top_ps=[p.top_p for p in params],
            min_ps=[p.min_p for p in params],
            uniforms=numbers,
        ),
    )
    if drawn is not None:
        return drawn
    picked = torch.tensor(rows, device=logits.device)
    target = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
    return draw_tokens(filtered(logits[picked].float(), params), target)


def adjust(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Apply logit bias, banned tokens and penalties, to a float32 copy if any row has some. [R, V] -> [R, V]."""
    touched = [i for i, d in enumerate(draws) if d.params.penalised or d.params.logit_bias or d.params.banned]
    if not touched:
        return logits
    logits = logits.to(torch.float32, copy=True)
    for i in touched:
        row, params = logits[i], draws[i].params
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
        if params.banned:
            row[torch.tensor(params.banned, device=row.device)] = NEVER
        if params.penalised:
            penalise(row, draws[i])
    return logits


def penalise(row: Tensor, draw: Draw) -> None:
    """Apply the three penalties to one row of logits [V], in place."""
    params = draw.params
    output = torch.tensor(list(draw.output), dtype=torch.long, device=row.device)
    if params.repetition_penalty != 1:
        prompt = torch.tensor(list(draw.prompt), dtype=torch.long, device=row.device)
        seen = torch.unique(torch.cat([prompt, output]))
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if len(output) and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.unique(output, return_counts=True)
        row[ids] -= params.frequency_penalty * counts + params.presence_penalty


def filtered(logits: Tensor, params: Sequence[RowParams]) -> Tensor:
    """Probabilities, float64 [R, V], after temperature, top-k, top-p and min-p; removed tokens have exactly 0."""
    logits = logits / _column([p.temperature for p in params], logits)
    vocabulary = logits.shape[-1]
    ks = [p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params]
    if min(ks) < vocabulary:
        logits = keep_top_k(logits, ks)
    if any(p.top_p < 1 for p in params):
        logits = keep_top_p(logits, [p.top_p for p in params])
    # In float64: the sum of torch's float32 softmax of 50,257 numbers has errors of up to 3e-5.
    probs = torch.softmax(logits.double(), dim=-1)
    if any(p.min_p > 0 for p in params):
        floor = _column([p.min_p for p in params], probs) * probs.amax(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < floor, 0.0)
    return probs


def keep_top_k(logits: Tensor, ks: Sequence[int]) -> Tensor:
    """Keep the k largest logits of each row, and ties with the k-th. [R, V] -> [R, V]."""
    width = max(k for k in ks if k < logits.shape[-1])
    top = logits.topk(width, dim=-1).values  # [R, width], descending
    at = torch.tensor([min(k, width) - 1 for k in ks], device=logits.device)
    floor = top.gather(1, at[:, None])
    off = torch.tensor([k >= logits.shape[-1] for k in ks], device=logits.device)
    return logits.masked_fill(logits < floor.masked_fill(off[:, None], NEVER), NEVER)


def keep_top_p(logits: Tensor, top_ps: Sequence[float]) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches top_p, at least one. [R, V] -> [R, V]."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probs = torch.softmax(ordered, dim=-1)
    limits = _column(top_ps, probs)
    before = probs.cumsum(dim=-1) - probs  # the probability of all tokens that are more likely
    cut = (before >= limits) & (limits < 1)
    cut[:, 0] = False
    return logits.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), NEVER)


def draw_tokens(probs: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability exceeds `uniform`. [R, V], [R] in [0, 1) -> LongTensor [R].

    It takes one random number for each row, not for each token, so drawing costs no more than the softmax.
    """
    total = probs.double().cumsum(dim=-1)
    target = uniform[:, None] * total[:, -1:]
    chosen = (total <= target).sum(dim=-1)
    # Rounding may move the target to the end of the sum; then the last token with a probability above 0 is chosen.
    last = (total < total[:, -1:]).sum(dim=-1)
    return torch.minimum(chosen, last)


def uniform(seed: int, sample: int, position: int) -> float:
    """A random number in [0, 1) that depends only on seed, sample index and position, which count as a counter.

    Its 53 bits are from SplitMix64's finalizer (Steele et al. 2014), used once for each of the three.
    """
    state = 0
    for value in (seed, sample, position):
        state = _mix((state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    return (state >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


def top_logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log probabilities of the unmodified logits: of `tokens`, and of the `count` most likely tokens.

    logits: float32 [R, V], tokens: [R] -> float64 [R], LongTensor [R, count], float64 [R, count].
    """
    # In float64: in float32 the sum over 50,257 tokens has an error of 1e-5.
    total = kernel.log_sums(logits, largest(logits)[0])
    if total is None:
        total = logits.double().logsumexp(dim=-1)
    values, ids = logits.topk(count, dim=-1)
    chosen = logits.gather(1, tokens[:, None]).squeeze(1).double() - total
    return chosen, ids, values.double() - total[:, None]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]

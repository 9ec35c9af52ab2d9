"""Measure the error of one implementation against a float64 evaluation of the same weights. Uses numpy only.

Two float32 implementations each have rounding errors, and their difference is about the sum of both. The tolerance of a
checkpoint limits the error of one implementation, so each implementation is compared with float64 separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from headrace.client.wire.activations import CHECKPOINTS
from headrace.client.wire.comparison import CheckpointResult, Tensors, compare
from headrace.worker.fidelity.references.float64 import NAME

LOGITS, NEXT_TOKEN, TOKENS = 8, 10, 12


def judge(
    tensors: Tensors,
    exact: Tensors,
    margins: np.ndarray | None,
    *,
    tolerances: Mapping[int, float] | None = None,
    job: bool = True,
) -> list[CheckpointResult]:
    """Compare the tensors of one prompt with float64. Returns the rows of checkpoints 1 to 12.

    A token that differs from float64's token is accepted only as a near tie: float64's logits of the two tokens may
    differ by at most twice the tolerance of the logits, because each of the two logits may be off by that tolerance.

    Args:
        tensors: the implementation's tensors by name.
        exact: the prompt's tensors from `Float64.traces`.
        margins: the result of `Float64.margins` for `tensors["tokens"]`; None if there are no tokens.
        tolerances: replaces the tolerances of the table, for lower precisions.
        job: whether `tensors` belong to a job. If so, its cache and the last row of its logits are checked bit for bit.
    """
    tolerances = tolerances or {}
    compared = {name: tensor for name, tensor in exact.items() if name not in ("next_token", "tokens")}
    rows = compare(tensors, compared, reference=NAME, tolerances=tolerances, job=job)
    allowed = 2 * tolerances.get(LOGITS, CHECKPOINTS[LOGITS][2])
    tokens = {NEXT_TOKEN: next_margin(tensors, exact), TOKENS: margins}
    return [_tokens(row, tensors, tokens[row.number], allowed) if row.number in tokens else row for row in rows]


def next_margin(tensors: Tensors, exact: Tensors) -> np.ndarray | None:
    """Return by how much the float64 logit of `next_token` is below the largest; infinite for an invalid token."""
    if "next_token" not in tensors:
        return None
    token, logits = tensors["next_token"], exact["last_logits"]
    if token.shape != () or not 0 <= token < len(logits) or token != int(token):
        return np.array(np.inf)
    return np.array(logits.max() - logits[int(token)])


def _tokens(row: CheckpointResult, tensors: Tensors, margins: np.ndarray | None, allowed: float) -> CheckpointResult:
    if margins is None:
        return row
    (name,) = CHECKPOINTS[row.number][1]
    largest, others = float(margins.max(initial=0.0)), int((margins > 0).sum())
    ok = largest <= allowed
    note = ""
    if others:
        note = f"{others} of {margins.size} not float64's token: {'a near tie' if ok else 'a smaller logit'}"
    return replace(
        row,
        compared=f"{name} with {NAME}'s logits",
        shape=str(list(tensors[name].shape)),
        max_abs=largest,
        tolerance=allowed,
        ok=ok,
        note=note,
    )

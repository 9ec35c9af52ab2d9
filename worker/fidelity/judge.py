"""An implementation's error: its checkpoint tensors against a float64 evaluation of the same weights. numpy only.

Two implementations in float32 each have rounding errors, and the difference between them is about the sum of both. The
tolerance of a checkpoint is for one implementation's own error, so each is measured against float64 by itself.
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
    """Rows 1 to 12 of one prompt: an implementation's tensors against those of float64.

    A token other than float64's is accepted only if float64's logits of the two differ by at most twice the tolerance
    of the logits: each of the two logits may be off by that tolerance, so that neither token is wrong.

    Args:
        exact: what `Float64.traces` gives for the prompt.
        margins: what `Float64.margins` gives for `tensors["tokens"]`; None if there are none.
        tolerances: replace those of the table, for half precision.
        job: `tensors` are a job's: its cache and the last row of its logits are checked bit for bit.
    """
    tolerances = tolerances or {}
    compared = {name: tensor for name, tensor in exact.items() if name not in ("next_token", "tokens")}
    rows = compare(tensors, compared, reference=NAME, tolerances=tolerances, job=job)
    allowed = 2 * tolerances.get(LOGITS, CHECKPOINTS[LOGITS][2])
    tokens = {NEXT_TOKEN: next_margin(tensors, exact), TOKENS: margins}
    return [_tokens(row, tensors, tokens[row.number], allowed) if row.number in tokens else row for row in rows]


def next_margin(tensors: Tensors, exact: Tensors) -> np.ndarray | None:
    """How far the logit of `next_token` is below the largest, in float64; infinite for what is no token."""
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

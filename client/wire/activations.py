"""A job's checkpoint tensors beside those of another implementation, or of another job: the table of differences.

numpy only: `headrace validate` compares with it, and `headrace serve`, which has no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]

#: Checkpoint number -> what it is, the tensors that are compared, and the largest absolute difference in float32.
CHECKPOINTS: dict[int, tuple[str, tuple[str, ...], float]] = {
    0: ("worker ready and taking jobs", (), 0.0),
    1: ("first layer norm", ("embeddings", "ln_1"), 1e-5),
    2: ("queries, keys, values", ("q", "k", "v"), 1e-4),
    3: ("cache", (), 0.0),
    4: ("scaled scores", ("scores",), 1e-4),
    5: ("attention output", ("attn",), 1e-4),
    6: ("feed-forward output", ("mlp",), 1e-4),
    7: ("output of block 0", ("block_0",), 1e-4),
    8: ("logits", ("logits",), 1e-3),
    9: ("logits of the last position", ("last_logits",), 1e-3),
    10: ("next token", ("next_token",), 0.0),
    11: ("probabilities at 0.8", ("probs",), 1e-6),
    12: ("tokens end to end", ("tokens",), 0.0),
}


@dataclass(frozen=True)
class Row:
    """One checkpoint compared with one reference, the worst of all prompts. `ok` is None where nothing was compared."""

    number: int
    name: str
    compared: str = ""
    shape: str = ""
    max_abs: float | None = None
    max_rel: float | None = None
    tolerance: float | None = None
    ok: bool | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def compare(
    ours: Tensors, theirs: Tensors, *, reference: str, tolerances: Mapping[int, float], job: bool = True
) -> list[Row]:
    """Rows 1 to 12 for one prompt.

    Args:
        tolerances: replace those of the table, for half precision.
        job: `ours` are a job's tensors, so that its cache and the last row of its logits are checked bit for bit.
    """
    rows = []
    for number, (name, tensors, tolerance) in CHECKPOINTS.items():
        if number == 3:
            rows.append(check_cache(ours) if job else Row(3, name))
        elif number > 0:
            present = [tensor for tensor in tensors if tensor in ours and tensor in theirs]
            parts = [_compare_one(ours[t], theirs[t], tolerances.get(number, tolerance)) for t in present]
            row = Row(number, name, f"{', '.join(present)} with {reference}" if present else "")
            rows.append(worst([replace(row, **part) for part in parts]) if parts else row)
    return [_exact(row, ours, job) for row in rows]


def _compare_one(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> dict[str, Any]:
    found: dict[str, Any] = {"shape": str(list(ours.shape)), "tolerance": tolerance}
    if ours.shape != theirs.shape:
        return found | {"max_abs": float("inf"), "ok": False, "note": f"the reference has shape {list(theirs.shape)}"}
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    largest = float(difference.max(initial=0.0))
    scale = float(np.abs(theirs.astype(np.float64)).max(initial=0.0))
    # A NaN compares false with everything, and so is never within the tolerance.
    return found | {"max_abs": largest, "max_rel": largest / scale if scale else 0.0, "ok": largest <= tolerance}


def check_cache(ours: Tensors) -> Row:
    """Checkpoint 3 needs no reference: the cache holds exactly what checkpoint 2 wrote, and zero elsewhere."""
    row = Row(3, CHECKPOINTS[3][0], "cache with what k, v wrote", tolerance=0.0)
    if "cache_k" not in ours:
        return replace(row, compared="")
    largest = float(ours["cache_rest"])
    note = "" if largest == 0 else "something stands beyond the prompt"
    for side in ("k", "v"):
        written = np.concatenate([ours[side], ours[f"{side}_new"]])
        for cache, expected in ((ours[f"cache_{side}"], ours[side]), (ours[f"cache_{side}_end"], written)):
            largest = max(largest, float(np.abs(cache - expected).max(initial=0.0)))
    shape = str(list(ours["cache_k"].shape))
    return replace(row, shape=shape, max_abs=largest, max_rel=0.0, ok=largest == 0.0, note=note)


def _exact(row: Row, ours: Tensors, job: bool) -> Row:
    """What the table asks for beside the difference: 9 is row T-1 of 8, bit for bit, and 11 sums to one."""
    last_row = job and row.number == 9 and row.ok and "logits" in ours
    if last_row and not np.array_equal(ours["last_logits"], ours["logits"][-1]):
        return replace(row, ok=False, note="it is not the last row of the logits")
    if row.number == 11 and row.ok and abs(float(ours["probs"].astype(np.float64).sum()) - 1) > 1e-6:
        return replace(row, ok=False, note="the probabilities do not sum to 1")
    return row


def worst(rows: Sequence[Row]) -> Row:
    """The row of the largest difference, failed ones first; rows are of one checkpoint."""
    return max(rows, key=lambda row: (row.ok is not None, row.ok is False, row.max_abs or 0.0))

"""Compare the captured activations of a job with those of another implementation, or of another job.

Needs numpy but not torch: `headrace serve`, which runs without torch, uses it as well as `headrace validate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from headrace.client.wire.activations import CHECKPOINTS

#: Captured activations by tensor name.
Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class CheckpointResult:
    """One checkpoint compared with one reference: the largest difference over all prompts.

    `ok` is None if nothing was compared.
    """

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
        """The fields as a JSON object."""
        return asdict(self)


def compare(
    ours: Tensors, theirs: Tensors, *, reference: str, tolerances: Mapping[int, float], job: bool = True
) -> list[CheckpointResult]:
    """Compare checkpoints 1 to 12 for one prompt.

    Args:
        ours: activations of the job under test.
        theirs: activations of the reference.
        reference: the name of the reference, for the report.
        tolerances: by checkpoint number, in place of those of `CHECKPOINTS`: half precision needs larger ones.
        job: `ours` are the activations of a job, so its cache and the last row of its logits are checked bit for bit.
    """
    rows = []
    for number, (name, names, tolerance) in CHECKPOINTS.items():
        if number == 3:
            rows.append(check_cache(ours) if job else CheckpointResult(3, name))
        elif number > 0:
            present = [tensor for tensor in names if tensor in ours and tensor in theirs]
            parts = [_compare_one(ours[t], theirs[t], tolerances.get(number, tolerance)) for t in present]
            row = CheckpointResult(number, name, f"{', '.join(present)} with {reference}" if present else "")
            rows.append(worst([replace(row, **part) for part in parts]) if parts else row)
    return [_check_exact(row, ours, job) for row in rows]


def _compare_one(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> dict[str, Any]:
    found: dict[str, Any] = {"shape": str(list(ours.shape)), "tolerance": tolerance}
    if ours.shape != theirs.shape:
        return found | {"max_abs": float("inf"), "ok": False, "note": f"the reference has shape {list(theirs.shape)}"}
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    largest = float(difference.max(initial=0.0))
    scale = float(np.abs(theirs.astype(np.float64)).max(initial=0.0))
    # NaN compares false with everything, so it is never within the tolerance.
    return found | {"max_abs": largest, "max_rel": largest / scale if scale else 0.0, "ok": largest <= tolerance}


def check_cache(ours: Tensors) -> CheckpointResult:
    """Check checkpoint 3, without a reference: the cache is exactly the k and v of checkpoint 2, and 0 elsewhere."""
    row = CheckpointResult(3, CHECKPOINTS[3].name, "cache with what k, v wrote", tolerance=0.0)
    if "cache_k" not in ours:
        return replace(row, compared="")
    largest = float(ours["cache_rest"])
    note = "" if largest == 0 else "the cache is not zero beyond the prompt"
    for side in ("k", "v"):
        written = np.concatenate([ours[side], ours[f"{side}_new"]])
        for cache, expected in ((ours[f"cache_{side}"], ours[side]), (ours[f"cache_{side}_end"], written)):
            largest = max(largest, float(np.abs(cache - expected).max(initial=0.0)))
    shape = str(list(ours["cache_k"].shape))
    return replace(row, shape=shape, max_abs=largest, max_rel=0.0, ok=largest == 0.0, note=note)


def _check_exact(row: CheckpointResult, ours: Tensors, job: bool) -> CheckpointResult:
    """Check that checkpoint 9 of a job is the last row of 8, bit for bit, and that the probabilities of 11 sum to 1."""
    last_row = job and row.number == 9 and row.ok and "logits" in ours
    if last_row and not np.array_equal(ours["last_logits"], ours["logits"][-1]):
        return replace(row, ok=False, note="it is not the last row of the logits")
    if row.number == 11 and row.ok and abs(float(ours["probs"].astype(np.float64).sum()) - 1) > 1e-6:
        return replace(row, ok=False, note="the probabilities do not sum to 1")
    return row


def worst(rows: Sequence[CheckpointResult]) -> CheckpointResult:
    """The row of one checkpoint with the largest difference. A row that fails is worse than any that passes."""
    return max(rows, key=lambda row: (row.ok is not None, row.ok is False, row.max_abs or 0.0))

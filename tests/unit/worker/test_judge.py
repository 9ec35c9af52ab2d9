"""Verdicts on an implementation's error, on tensors small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from headrace.client.wire.comparison import CheckpointResult
from headrace.worker.fidelity.judge import judge
from headrace.worker.fidelity.report import Report, passed, report_json, report_text

EXACT: dict[str, np.ndarray] = {
    "logits": np.array([[0.0, 1.0], [2.0, 1.9985]]),
    "last_logits": np.array([2.0, 1.9985]),
    "next_token": np.array(0),
    "probs": np.array([0.6, 0.4]),
}


def found(**changes: Any) -> dict[str, np.ndarray]:
    """What float64 has, in float32, with changes."""
    tensors = {name: tensor.astype(np.float32) for name, tensor in EXACT.items()} | {"next_token": np.array(0)}
    return tensors | {"tokens": np.array([0, 1])} | changes


def verdicts(tensors: dict[str, np.ndarray], margins: list[float], **more: Any) -> dict[int, CheckpointResult]:
    rows = judge(tensors, EXACT, np.array(margins), job=False, **more)
    return {row.number: row for row in rows if row.ok is not None}


def test_what_has_rounding_errors_only_holds() -> None:
    rows = verdicts(found(), [0.0, 0.0])
    assert rows.keys() == {8, 9, 10, 11, 12}
    assert all(row.ok and "float64" in row.compared and not row.note for row in rows.values())


def test_a_near_tie_in_float64_is_accepted_and_said() -> None:
    rows = verdicts(found(next_token=np.array(1)), [0.0, 0.0015])
    assert (rows[10].ok, rows[10].max_abs) == (True, pytest.approx(0.0015))
    assert (rows[12].ok, rows[12].max_abs, rows[12].tolerance) == (True, 0.0015, 0.002)
    assert rows[12].note == "1 of 2 not float64's token: a near tie"


def test_another_token_fails_where_float64_is_sure() -> None:
    rows = verdicts(found(), [0.0, 0.0021])
    assert rows[12].ok is False
    assert "a smaller logit" in rows[12].note
    assert verdicts(found(), [0.0, 0.0021], tolerances={8: 0.1})[12].ok


@pytest.mark.parametrize("token", [np.array(2), np.array(-1), np.array([0]), np.array(0.5), np.array(np.nan)])
def test_what_is_no_token_fails(token: np.ndarray) -> None:
    assert verdicts(found(next_token=token), [0.0])[10].ok is False


def test_only_a_jobs_last_row_must_be_the_same_bits() -> None:
    other = found(last_logits=np.nextafter(EXACT["last_logits"].astype(np.float32), np.float32(9)))
    assert verdicts(other, [0.0])[9].ok
    (row,) = [row for row in judge(other, EXACT, None) if row.number == 9]
    assert row.ok is False


def report(subject: str, ok: bool, *, judged: bool) -> Report:
    rows = [CheckpointResult(8, "logits", "logits with float64", max_abs=0.5, tolerance=1e-3, ok=ok)]
    return Report("demo", "float32", subject, "", 1, rows, judged=judged)


def test_a_librarys_own_error_is_reported_and_fails_nothing() -> None:
    ours, library = report("headrace", True, judged=True), report("candle 0.4.2", False, judged=False)
    assert passed([ours, library])
    text = report_text([ours, library])
    assert "FAILED" not in text
    assert "candle 0.4.2's own error is over the tolerance at checkpoint 8; this fails nothing" in text
    assert '"judged": false' in report_json([library])


def test_our_error_and_a_files_fail() -> None:
    file = report("mine.npz", False, judged=True)
    assert not passed([report("headrace", True, judged=True), file])
    assert "FAILED" in report_text([file])

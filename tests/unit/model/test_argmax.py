"""Argmax: the same results as torch's `max`, also for unusual rows."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

import headrace.model.kernels.argmax
from headrace.model.kernels.argmax import largest

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 2, 1023, 1024, 1025, 50257])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_argmax_agrees_with_torch(dtype: torch.dtype, width: int, threads: int) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    x[3] = x[3].round()  # many are equal
    x[4], x[5, width // 2] = -INF, INF
    for logits in (x, x[2:5], x[:, : -(-width // 2)], x.t().contiguous().t()):
        best, chosen = largest(logits)
        expected = logits.max(-1)
        assert torch.equal(best, expected.values)
        assert torch.equal(chosen, expected.indices)
        assert chosen.dtype == torch.long


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_first_token_and_both_zeros_are_equal(dtype: torch.dtype) -> None:
    x = torch.full((4, 3000), -1.0, dtype=dtype)
    x[0, [2999, 70, 1500]] = 5
    x[1, 1100], x[1, 2200] = -0.0, 0.0
    x[2, 1100], x[2, 2200] = 0.0, -0.0
    assert largest(x)[1].tolist() == [70, 1100, 1100, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("at", [0, 1023, 1024, 2999])
def test_nan_is_reported_for_its_row_only(dtype: torch.dtype, sign: int, at: int) -> None:
    x = torch.randn(3, 3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[1, at] = torch.copysign(torch.tensor(NAN), torch.tensor(float(sign)))
    x[1, 5] = INF
    best, chosen = largest(x)
    assert best.isnan().tolist() == [False, True, False]
    assert 0 <= chosen[1] < 3000
    x[1] = NAN
    assert largest(x)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_numba_or_with_wrong_results_torch_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # a kernel that is kept needs no numba
    fresh = headrace.model.kernels.argmax._kernel.__wrapped__
    import_ = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("numba"):
            raise ImportError("No module named 'numba'")
        return import_(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        assert fresh(dtype) is None
    run = headrace.model.kernels.argmax._run
    with monkeypatch.context() as patch:
        patch.setattr(
            headrace.model.kernels.argmax, "_run", lambda kernel, x: (run(kernel, x)[0], run(kernel, x)[1] + 1)
        )
        assert fresh(dtype) is None
    monkeypatch.setattr(headrace.model.kernels.argmax, "_kernel", lambda _: None)
    assert largest(torch.tensor([[1.0, 3.0, 2.0]], dtype=dtype))[1].tolist() == [1]

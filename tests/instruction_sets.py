"""Marks for tests that need an instruction set: skipped where the CPU lacks it, and named in the summary."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest

#: Name of a set -> the features of the CPU, as LLVM calls them, that our kernels for it need.
FEATURES = {
    "AVX2": {"avx2", "fma"},
    "AVX-512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "AVX-512-VNNI": {"avx512f", "avx512bw", "avx512vl", "avx512vnni"},
    "AVX-512-BF16": {"avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16"},
    "AMX": {"amx-tile", "amx-bf16", "avx512bf16"},
    "AMX-INT8": {"amx-tile", "amx-int8"},
}

needs_avx2 = pytest.mark.instruction_set("AVX2")
needs_avx512 = pytest.mark.instruction_set("AVX-512")
needs_vnni = pytest.mark.instruction_set("AVX-512-VNNI")
needs_bf16 = pytest.mark.instruction_set("AVX-512-BF16")
needs_amx = pytest.mark.instruction_set("AMX")
needs_amx_int8 = pytest.mark.instruction_set("AMX-INT8")


@functools.cache
def why_missing(name: str) -> str:
    """Why tests of an instruction set cannot run here; empty if they can."""
    from llvmlite import binding

    from headrace.model.kernels.gemm_bf16_amx import _permitted

    present = {feature for feature, on in binding.get_host_cpu_features().items() if on}
    if lacking := sorted(FEATURES[name] - present):
        return f"this CPU lacks {', '.join(lacking)}"
    if name.startswith("AMX") and not _permitted():
        return "the system does not permit it"
    return ""


def note_sets(items: Iterable[pytest.Item]) -> None:
    """Let the reports of marked tests carry the name of their instruction set."""
    for item in items:
        for mark in item.iter_markers("instruction_set"):
            item.user_properties.append(("instruction_set", mark.args[0]))


def skip_if_missing(item: pytest.Item) -> None:
    """Skip a marked test where the CPU lacks the set."""
    for mark in item.iter_markers("instruction_set"):
        if why := why_missing(mark.args[0]):
            pytest.skip(f"needs {mark.args[0]}: {why}")


def summary(ran: Iterable[pytest.TestReport], skipped: Iterable[pytest.TestReport]) -> str:
    """One line: which instruction sets' tests ran. Empty if there were no such tests."""
    parts = {}
    for report in skipped:
        for name in _sets(report):
            parts[name] = f"{name} did not: {why_missing(name)}"
    for report in ran:
        for name in _sets(report):
            parts[name] = f"{name} ran"
    return f"instruction sets: {'; '.join(parts[name] for name in sorted(parts))}" if parts else ""


def _sets(report: pytest.TestReport) -> list[str]:
    return [str(value) for name, value in getattr(report, "user_properties", []) if name == "instruction_set"]

"""Instruction sets: the ladder, what lowers it, and errors that say what is wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from headrace.config import Settings
from headrace.model.hub import ModelError
from headrace.model.kernels import isa
from headrace.model.kernels.gemm_bf16_amx import bf16_amx_works
from headrace.model.kernels.gemm_fp32 import fp32_works
from headrace.worker.engine.build import build_engine


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(isa, "_requested", None)
    isa.find.cache_clear()
    yield
    isa.find.cache_clear()


def machine(monkeypatch: pytest.MonkeyPatch, *features: str, amx: bool = True) -> None:
    """Pretend that the CPU is an x86-64 with these features."""
    monkeypatch.setattr(isa, "host_features", lambda: dict.fromkeys(features, True))
    monkeypatch.setattr(isa, "amx_is_permitted", lambda: amx)
    monkeypatch.setattr(isa, "architecture", lambda: "x86_64")


SKYLAKE = isa._AVX512
ZEN4 = (*SKYLAKE, "avx512vnni", "avx512bf16")
SAPPHIRE_RAPIDS = (*ZEN4, "avxvnni", "amx-tile", "amx-int8", "amx-bf16")


@pytest.mark.parametrize(
    ("features", "names"),
    [
        (SAPPHIRE_RAPIDS, ["amx", "avx512_vnni", "avx512", "avx2"]),
        (ZEN4, ["avx512_vnni", "avx512", "avx2"]),
        (SKYLAKE, ["avx512", "avx2"]),
        (isa._AVX2, ["avx2"]),
        (("sse2", "avx512f"), []),
    ],
    ids=["sapphire rapids", "zen 4", "skylake-x", "haswell", "old"],
)
def test_the_best_rung_is_chosen_and_can_be_lowered(
    monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], names: list[str]
) -> None:
    machine(monkeypatch, *features)
    assert [each.name for each in isa.available()] == names
    assert isa.find("auto").name == [*names, "none"][0]
    for name in (*names, "none"):
        monkeypatch.setenv("HEADRACE_CPU_ISA", name)
        assert isa.chosen().name == name


def test_optional_features_are_used_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, *ZEN4)
    assert isa.find("avx512_vnni").has("avx512bf16")
    isa.find.cache_clear()
    machine(monkeypatch, *SKYLAKE, "avx512vnni")
    assert not isa.find("avx512_vnni").has("avx512bf16")
    assert "avx512bf16" not in isa.find("avx512_vnni").features


def test_a_rung_that_the_machine_lacks_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, *SKYLAKE)
    message = "HEADRACE_CPU_ISA is 'avx512_vnni', but this machine lacks avx512vnni; its best .* is 'avx512'"
    with pytest.raises(isa.IsaError, match=message):
        isa.use("avx512_vnni")
    assert isa.chosen().name == "avx512"
    with pytest.raises(isa.IsaError, match="lacks a CPU of the kind aarch64"):
        isa.use("neon")
    isa.find.cache_clear()
    machine(monkeypatch, *SAPPHIRE_RAPIDS, amx=False)
    assert isa.chosen().name == "avx512_vnni"
    with pytest.raises(isa.IsaError, match="lacks the permission of the system to use AMX"):
        isa.use("amx")


def test_an_unknown_rung_is_an_error_that_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(isa.IsaError, match=r"HEADRACE_CPU_ISA is 'avx3'; it must be one of 'auto', 'amx', .*'none'"):
        isa.use("avx3")
    monkeypatch.setenv("HEADRACE_CPU_ISA", "AVX2")
    with pytest.raises(isa.IsaError, match="HEADRACE_CPU_ISA is 'AVX2'"):
        isa.chosen()


def test_what_is_used_has_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_CPU_ISA", "none")
    best = isa.use("auto")
    assert best.name == [*(each.name for each in isa.available()), "none"][0]
    assert isa.chosen() is best


def test_on_the_lowest_rung_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("HEADRACE_CPU_ISA", "none")
    assert not fp32_works("cpu", torch.float32)
    bf16_amx_works.cache_clear()
    assert not bf16_amx_works("cpu", torch.bfloat16)
    bf16_amx_works.cache_clear()


def test_an_engine_is_not_built_for_a_rung_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, *SKYLAKE)
    with pytest.raises(ModelError, match="HEADRACE_CPU_ISA is 'amx', but this machine lacks"):
        build_engine(Settings(model="demo", cpu_isa="amx"))


def test_the_setting_offers_every_rung() -> None:
    description = Settings.model_fields["cpu_isa"].description
    assert description is not None
    assert all(repr(name) in description for name in (isa.AUTO, *isa.NAMES))

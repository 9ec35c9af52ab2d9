"""One instruction set for all contenders of a run, so that a machine can stand for a lesser one.

llama.cpp chooses its instructions when it is compiled, so it is left out where the set is lowered.
"""

from __future__ import annotations

from collections.abc import Mapping

#: The rung of headrace -> what CTranslate2, torch and oneDNN call it.
_NAMES = {
    "amx": ("AVX512", "avx512", "AVX512_CORE_AMX"),
    "avx512_vnni": ("AVX512", "avx512", "AVX512_CORE_BF16"),
    "avx512": ("AVX512", "avx512", "AVX512_CORE"),
    "avx2": ("AVX2", "avx2", "AVX2"),
}
RUNGS = tuple(_NAMES)
#: Peers that cannot be told which instructions to use.
FIXED = frozenset({"llama.cpp"})


def environment(rung: str | None) -> Mapping[str, str]:
    """The variables that hold every contender to an instruction set; none for None, the best set of the machine."""
    if rung is None:
        return {}
    ctranslate2, aten, onednn = _NAMES[rung]
    return {
        "HEADRACE_CPU_ISA": rung,
        "CT2_FORCE_CPU_ISA": ctranslate2,
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": "AVX2" if rung == "avx2" else "AVX512",
    }

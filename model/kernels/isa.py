"""Instruction sets: what a kernel may use, from the best CPU down, and which of them this process uses.

Kernels are described once, on vectors of 16 float32 lanes (vectors.py), and compiled for one of these instruction sets.
They are compiled for the set and not for the CPU that happens to run them, so all CPUs of a rung run the same code.
Results in float32 and int8 do not depend on the rung, because each sum has a written order.

| rung | needs | float32 |
|---|---|---|
| amx | Intel AMX, AVX-512 | AVX-512 |
| avx512_vnni | AVX-512 with VNNI | AVX-512 |
| avx512 | AVX-512 F, BW, CD, DQ, VL (Skylake-X) | AVX-512 |
| avx2 | AVX2 and FMA (Haswell) | AVX2 |
| neon | 64-bit ARM | NEON |
| none | nothing: torch's operators | torch |
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

#: The environment variable that lowers the rung; `auto` and an empty value mean the best one.
VARIABLE = "HEADRACE_CPU_ISA"
AUTO, NONE = "auto", "none"


class IsaError(ValueError):
    """Raised when the chosen instruction set is unknown, or the machine does not have it; the message says which."""


@dataclass(frozen=True)
class Isa:
    """An instruction set, and how kernels use it."""

    name: str
    #: The LLVM target that kernels are compiled for.
    architecture: str
    cpu: str
    #: The features that are added to those of `cpu`; a CPU needs these and `needs`.
    adds: tuple[str, ...] = ()
    #: Features, as LLVM calls them, that a CPU must have besides `adds`.
    needs: tuple[str, ...] = ()
    #: Features that are used where the CPU has them.
    uses: tuple[str, ...] = ()
    #: How the code generator is tuned.
    tuning: tuple[str, ...] = ()
    #: The register tile of the float32 micro-kernel: rows, and columns, a multiple of 16.
    mr: int = 0
    nr: int = 0

    @property
    def features(self) -> str:
        """The features in LLVM's notation."""
        return ",".join([*(f"+{feature}" for feature in self.adds), *self.tuning])

    def has(self, feature: str) -> bool:
        """Whether code may use a feature, by LLVM's name."""
        return feature in self.adds or feature in self.needs


_AVX2 = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
#: LLVM would split vectors of 512 bits into two of 256.
_WHOLE_REGISTERS = ("-prefer-256-bit",)

#: From the best to the last. AVX-512 has 32 registers of 16 lanes: 8 x 3 sums, 3 of the weight, and 5 to spare. AVX2
#: has 16 registers of 8 lanes: 6 x 2 sums, 2 of the weight, and 2 to spare. NEON has 32 registers of 4 lanes.
LADDER = (
    Isa(
        name="amx",
        architecture="x86_64",
        cpu="x86-64-v4",
        adds=("avx512vnni", "avx512bf16", "amx-tile", "amx-int8", "amx-bf16"),
        needs=_AVX512,
        tuning=_WHOLE_REGISTERS,
        mr=8,
        nr=48,
    ),
    Isa(
        name="avx512_vnni",
        architecture="x86_64",
        cpu="x86-64-v4",
        adds=("avx512vnni",),
        needs=_AVX512,
        uses=("avx512bf16",),
        tuning=_WHOLE_REGISTERS,
        mr=8,
        nr=48,
    ),
    Isa(name="avx512", architecture="x86_64", cpu="x86-64-v4", needs=_AVX512, tuning=_WHOLE_REGISTERS, mr=8, nr=48),
    Isa(name="avx2", architecture="x86_64", cpu="x86-64-v3", needs=_AVX2, uses=("avxvnni",), mr=6, nr=16),
    Isa(name="neon", architecture="aarch64", cpu="generic", needs=("neon",), uses=("dotprod",), mr=6, nr=16),
    Isa(name=NONE, architecture="", cpu=""),
)
AMX = LADDER[0]
NAMES = tuple(isa.name for isa in LADDER)

_requested: str | None = None


def use(name: str) -> Isa:
    """Choose the rung of this process, by name or `auto`; returns it. Kernels that are in use keep theirs.

    Raises:
        IsaError: there is no such rung, or this machine does not have it.
    """
    global _requested
    isa = find(name)
    _requested = name
    return isa


def chosen() -> Isa:
    """The rung of this process: what `use` was called with, else $HEADRACE_CPU_ISA, else the best one.

    Raises:
        IsaError: like `use`.
    """
    return find(_requested if _requested is not None else os.environ.get(VARIABLE, "") or AUTO)


@functools.cache
def find(name: str) -> Isa:
    """The rung of this name as this machine has it; `auto` is the best one. Raises IsaError like `use`."""
    if name not in (AUTO, *NAMES):
        raise IsaError(f"{VARIABLE} is {name!r}; it must be one of {', '.join(map(repr, (AUTO, *NAMES)))}")
    features, best = host_features(), next(isa for isa in LADDER if not lacking(isa, host_features()))
    wanted = best if name == AUTO else next(isa for isa in LADDER if isa.name == name)
    if missing := lacking(wanted, features):
        raise IsaError(
            f"{VARIABLE} is {name!r}, but this machine lacks {', '.join(missing)}; its best instruction set is "
            f"{best.name!r}"
        )
    return replace(wanted, adds=(*wanted.adds, *(feature for feature in wanted.uses if features.get(feature))))


def available() -> list[Isa]:
    """The rungs of this machine, from the best to the last, without `none`."""
    return [find(isa.name) for isa in LADDER[:-1] if not lacking(isa, host_features())]


def lacking(isa: Isa, features: Mapping[str, bool]) -> list[str]:
    """What a machine with these features lacks for a rung; empty if it has the rung."""
    if isa.name == NONE:
        return []
    if architecture() != isa.architecture:
        return [f"a CPU of the kind {isa.architecture}"]
    missing = [feature for feature in (*isa.needs, *isa.adds) if not features.get(feature)]
    if not missing and isa.name == "amx" and not amx_is_permitted():
        return ["the permission of the system to use AMX"]
    return missing


@functools.cache
def host_features() -> Mapping[str, bool]:
    """The features of this CPU, as LLVM calls them; empty without llvmlite."""
    try:
        from llvmlite import binding
    except ImportError:
        return {}
    features = dict(binding.get_host_cpu_features())
    return features | {"neon": True} if architecture() == "aarch64" else features


def architecture() -> str:
    """The architecture of this CPU, as LLVM calls it."""
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(os.uname().machine, os.uname().machine)


@functools.cache
def amx_is_permitted() -> bool:
    """Ask Linux for permission to use AMX: its state is 8 KiB for each thread, which Linux allocates on request."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    if os.uname().sysname != "Linux":
        return False
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)

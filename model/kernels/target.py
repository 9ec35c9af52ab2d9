"""Compiling for an instruction set instead of for the CPU of this process.

numba has one code generator, made for the CPU that it runs on. While a kernel is compiled, another one takes its place,
so that a program that uses numba itself is not affected. Code that LLVM's vectors describe (vectors.py) is compiled
here without numba too, for any processor: the tests use it to look at machine code and to compile for ARM.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headrace.model.kernels.isa import Isa


@contextmanager
def compiling_for(isa: Isa) -> Iterator[None]:
    """Let numba compile for an instruction set; other threads that compile with numba wait."""
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    with global_compiler_lock:
        context = cpu_target.target_context
        before = context._internal_codegen
        context._internal_codegen = _code_generator(isa)
        try:
            yield
        finally:
            context._internal_codegen = before


@functools.cache
def _code_generator(isa: Isa) -> Any:
    """numba's code generator for an instruction set."""
    from numba.core.codegen import JITCPUCodegen

    class CodeGenerator(JITCPUCodegen):  # type: ignore[misc]
        def _get_host_cpu_name(self) -> str:
            return isa.cpu

        def _get_host_cpu_features(self) -> str:
            return isa.features

    return CodeGenerator("headrace")


def target_machine(isa: Isa, *, jit: bool) -> Any:
    """LLVM's target machine for an instruction set, which may be another architecture's unless `jit`."""
    from llvmlite import binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    triple = binding.get_process_triple() if jit else f"{isa.architecture}-unknown-linux-gnu"
    return binding.Target.from_triple(triple).create_target_machine(
        cpu=isa.cpu, features=isa.features, opt=3, jit=jit, reloc="default" if jit else "pic"
    )


def compile_module(module: Any, machine: Any) -> Any:
    """Optimise an `llvmlite.ir.Module` for a target machine; returns LLVM's module."""
    from llvmlite import binding

    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    compiled = binding.parse_assembly(str(module))
    compiled.verify()
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(3))
    builder.getModulePassManager().run(compiled, builder)
    return compiled

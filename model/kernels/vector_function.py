"""Functions of compiled code on virtual vectors (vectors.py).

In numba's code a `VectorFunction` is called as `function.intrinsic()`; `vector_module` is for compiling it without
numba (target.py). This module imports llvmlite, so import it only in functions that compile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from headrace.model.kernels.vectors import FLOAT, INT64, VectorBuilder


@dataclass(frozen=True)
class VectorFunction:
    """A function of compiled code, without a result: `body` writes it, given a builder and the parameters by position.

    Its name must differ from those of all other functions of a kernel with another body.
    """

    name: str
    parameters: Sequence[str]
    body: Callable[..., None]
    #: float32 parameters; all others are int64.
    floats: Sequence[str] = ()

    def add_to(self, module: Any, *, internal: bool = True) -> Any:
        """The function in an `llvmlite.ir.Module`, which gets it at the first call."""
        if self.name in module.globals:
            return module.globals[self.name]
        kinds = [FLOAT if name in self.floats else INT64 for name in self.parameters]
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), self.name)
        function.attributes.add("nounwind")
        function.attributes.add("noinline")  # inlined, it would have to share the registers with its caller
        if internal:
            function.linkage = "internal"
        builder = VectorBuilder(ir.IRBuilder(function.append_basic_block("entry")))
        self.body(builder, *function.args)
        builder.builder.ret_void()
        return function

    def intrinsic(self) -> Any:
        """A function for numba's compiled code that calls this one."""
        from numba import types
        from numba.extending import intrinsic

        kinds = [types.float32 if name in self.floats else types.int64 for name in self.parameters]

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
            builder.call(self.add_to(builder.module), values)
            return context.get_dummy_value()

        def typed(_: Any, *arguments: Any) -> Any:  # noqa: ARG001
            return types.void(*kinds), generate

        names = ["context", *self.parameters]  # numba reads the number of parameters from the signature
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        typed.__signature__ = inspect.Signature([inspect.Parameter(name, positional) for name in names])  # type: ignore[attr-defined]
        return intrinsic(typed)


def vector_module(functions: Sequence[VectorFunction]) -> Any:
    """An `llvmlite.ir.Module` of some functions, which can be called from outside, for `target.compile_module`."""
    module = ir.Module()
    for function in functions:
        function.add_to(module, internal=False)
    return module

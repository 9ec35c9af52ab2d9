"""Programs: several GEMMs of a CPU that follow each other, run as one call.

An op computes x @ weight + bias, with a layer norm before it and an activation function or a residual after it
(`ops.Op`). Between two calls from Python a core would wait for code and data that the weights have evicted from its
caches: tens of microseconds each time, during which memory, the bottleneck of most steps, is idle. In a program each
thread prefetches the beginning of the next op's weight while it multiplies the last block of the current one.

    thread   packs its rows, normed if requested | barrier | multiplies all rows by its blocks | barrier | next op

How a weight is stored, how rows are packed and how a block is multiplied depends on the type, see the `gemm_*` modules.
All of them sum the terms of a row in one fixed order, so a row's bits depend neither on the number of rows nor on the
number of threads (batch-invariant).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from headrace.model.kernels import object_cache
from headrace.model.kernels.intrinsics import (
    Int64Array,
    call_pointer,
    cast,
    entry_point,
    prefetch,
    vzeroupper,
)
from headrace.model.kernels.isa import Isa
from headrace.model.kernels.layer_norm import layer_norm
from headrace.model.kernels.object_cache import Kernel
from headrace.model.kernels.openmp import team, thread_functions
from headrace.model.kernels.ops import ARG, ARG_WORDS, OP, OP_WORDS, ProgramArguments

#: How much of the weight after a `call` op each thread prefetches while it waits for the others.
PREFETCHED_BYTES = 2**16


class MicroKernel(NamedTuple):
    """The functions of a backend, for compiled code. `program` are `ProgramArguments`, `op` and `next_op` are `Op`s."""

    #: (program, scratch): run by each thread before and after its ops.
    begin: Any
    end: Any
    #: (program, op, row, source): pack one row of x; `source` is its address, 0 for a padding row.
    pack: Any
    #: (program, op, next_op, partition, scratch): multiply all rows by one partition of the blocks.
    multiply: Any


@dataclass(frozen=True)
class GemmBackend:
    """A way to compute GEMMs: a weight layout, a row layout and a micro-kernel."""

    #: How the fingerprint of a model names this backend. Results are compared by it, so it never changes.
    fingerprint: str
    #: The instruction set that it is compiled for.
    isa: Isa
    #: The type of rows and results.
    dtype: torch.dtype
    #: Bytes of an element as it is multiplied.
    itemsize: int
    #: Rows of the weight in one step of the micro-kernel.
    ku: int
    #: Columns of a block.
    nr: int
    #: Rows of x in one packed panel.
    mr: int
    #: Scratch memory of a thread, without the row that a layer norm takes; a multiple of 64.
    scratch_bytes: int
    #: Whether the epilogue can write its result packed, as the next op reads it. This takes nr == ku.
    packs_output: bool
    #: Constants that the compiled code reads.
    constants: np.ndarray[Any, np.dtype[Any]]
    micro_kernel: Callable[[], MicroKernel]
    #: Bytes of an element of packed rows; 0 if they are those of the weight.
    row_itemsize: int = 0

    @functools.cached_property
    def kernel(self) -> Kernel:
        """The program runner for this backend, compiled or loaded at the first access."""
        name = f"program {self.fingerprint} {self.mr}x{self.nr}"
        return object_cache.load_or_compile(name, lambda: compile_program(self), self.isa)


class Program:
    """The memory that ops on M rows, each of at most `width` elements, need while they run."""

    def __init__(self, backend: GemmBackend, rows: int, width: int) -> None:
        self._kernel, self._threads = backend.kernel, torch.get_num_threads()
        padded_rows = -(-rows // backend.mr) * backend.mr
        scratch_bytes = backend.scratch_bytes + -(-width // 16) * 64
        row_bytes = -(-width // backend.ku) * backend.ku * (backend.row_itemsize or backend.itemsize)
        self._packed_rows = torch.empty(padded_rows * row_bytes, dtype=torch.uint8)
        self._scratch = torch.empty(self._threads * scratch_bytes, dtype=torch.uint8)
        self._row_scales = torch.empty(padded_rows)
        arguments = ProgramArguments(
            rows=rows,
            partitions=self._threads,
            scratch=self._scratch.data_ptr(),
            scratch_bytes=scratch_bytes,
            packed_rows=self._packed_rows.data_ptr(),
            row_scales=self._row_scales.data_ptr(),
            constants=backend.constants.ctypes.data,
        )
        self._arguments = np.array(arguments, dtype=np.int64)

    def run(self, ops: Int64Array) -> None:
        """Run ops, int64 [ops, OP_WORDS], contiguous, one after the other."""
        self._arguments[ARG.ops], self._arguments[ARG.op_count] = ops.ctypes.data, len(ops)
        team().run(self._kernel.address, self._arguments, self._threads)


def compile_program(backend: GemmBackend) -> Any:
    """Compile a C function of one pointer to `ProgramArguments`; returns a `numba.cfunc`."""
    import numba
    from numba import carray, types

    thread, threads = thread_functions()
    barrier = types.ExternalFunction("GOMP_barrier", types.void())
    int64s = cast(types.int64, types.CPointer(types.int64))
    begin, end, pack, multiply = backend.micro_kernel()
    clean_up = vzeroupper() if backend.isa.architecture == "x86_64" else None
    run, prefetch_line, step_bytes = call_pointer(), prefetch(), backend.ku * backend.nr * backend.itemsize
    norm, mr = layer_norm(bf16=backend.dtype == torch.bfloat16), backend.mr
    normed_row = backend.scratch_bytes

    @numba.njit(error_model="numpy")
    def pack_rows(program: Any, op: Any, partition: int, scratch: int) -> None:
        """Pack one partition of the rows, normed if requested; the last panel is filled up with zeros."""
        count = (program[ARG.rows] + mr - 1) // mr * mr
        for row in range(
            count * partition // program[ARG.partitions], count * (partition + 1) // program[ARG.partitions]
        ):
            source = op[OP.source] + row * op[OP.source_row_bytes]
            if row >= program[ARG.rows]:
                source = 0
            elif op[OP.norm_weight] != 0:
                source = norm(op, row, source, scratch + normed_row)
            pack(program, op, row, source)

    @numba.njit(error_model="numpy")
    def prefetch_weight(program: Any, op: Any, partition: int) -> None:
        """Prefetch the beginning of one partition of a weight."""
        start = op[OP.weight] + op[OP.n_blocks] * partition // program[ARG.partitions] * op[OP.k_steps] * step_bytes
        for line in range(0, min(op[OP.k_steps] * step_bytes, PREFETCHED_BYTES), 64):
            prefetch_line(start + line)

    @numba.njit(error_model="numpy")
    def work(program: Any) -> None:
        """What one thread of the team does: one partition, or several if the team is smaller than requested."""
        scratch = program[ARG.scratch] + thread() * program[ARG.scratch_bytes]
        begin(program, scratch)
        for i in range(program[ARG.op_count]):
            op = carray(int64s(program[ARG.ops] + i * OP_WORDS * 8), OP_WORDS)
            next_op = carray(int64s(program[ARG.ops] + min(i + 1, program[ARG.op_count] - 1) * OP_WORDS * 8), OP_WORDS)
            if op[OP.call] != 0:
                run(op[OP.call], op[OP.argument])
                prefetch_weight(program, next_op, thread())
            else:
                if op[OP.in_packed] == 0:
                    for partition in range(thread(), program[ARG.partitions], threads()):
                        pack_rows(program, op, partition, scratch)
                    barrier()
                for partition in range(thread(), program[ARG.partitions], threads()):
                    multiply(program, op, next_op, partition, scratch)
            barrier()
        end(program, scratch)
        if clean_up is not None:
            clean_up()

    return entry_point(work, ARG_WORDS, backend.isa.architecture)

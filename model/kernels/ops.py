"""The layout of an op and of a program's arguments: int64 words with a name each.

Both named tuples are used twice. Python builds one with named values, `Op(source=..., weight=...)`; compiled code
indexes the words with the tuple of positions, `op[OP.weight]`. numba treats `OP` and `ARG` as constants.
"""

from __future__ import annotations

from typing import NamedTuple


class Op(NamedTuple):
    """One op of a program, a GEMM: out = epilogue(norm(source) @ weight). Addresses are 0 where they are not used.

    If `call` is set, the op is a call instead: every thread calls that C function with `argument`.
    """

    source: int = 0  # address of the rows of x
    source_row_bytes: int = 0  # bytes from one row to the next
    norm_weight: int = 0  # address of float32 [K]; 0 for no layer norm
    norm_bias: int = 0  # address of float32 [K]
    norm_bias_row_bytes: int = 0  # bytes from the bias of one row to that of the next; 0 if all rows have the same
    epsilon_bits: int = 0  # the bits of a float64
    normed_out: int = 0  # address of a copy of the normed rows, contiguous
    weight: int = 0  # address of the packed weight
    width: int = 0  # K: elements of a row of x
    k_steps: int = 0  # K / KU, rounded up: steps along the rows of the weight
    n_blocks: int = 0  # blocks of NR columns
    bias: int = 0  # address of float32, one for each column of each block
    bias_row_bytes: int = 0  # bytes from the bias of one row to that of the next; 0 if all rows have the same
    bias_block_bytes: int = 0  # bytes from the bias of one block of columns to that of the next
    column_scales: int = 0  # address of float32, one for each column of each block; only for int8
    residual: int = 0  # address of the rows to add to
    out: int = 0  # address of the result
    out_row_bytes: int = 0  # bytes from one row of the result to the next
    columns: int = 0  # N: columns of the result, without the padding of the last block
    activation: int = 0  # the code of the activation function after the bias (epilogue.ACTIVATION_CODES)
    in_packed: int = 0  # 1: the rows at `source` are packed already
    packs_output: int = 0  # 1: write the result packed, as the next op reads it
    call: int = 0  # address of a C function of one pointer
    argument: int = 0  # what `call` is called with


class ProgramArguments(NamedTuple):
    """What all ops of a program share."""

    ops: int = 0  # address of the ops, contiguous
    op_count: int = 0
    rows: int = 0  # M
    partitions: int = 0  # into how many parts the rows and the blocks are split: the number of threads
    scratch: int = 0  # address of the threads' scratch memory
    scratch_bytes: int = 0  # of each thread
    packed_rows: int = 0  # address of the packed rows of x
    row_scales: int = 0  # address of float32 [M], the scales of the rows; only for int8
    constants: int = 0  # address of the backend's constants


OP_WORDS, ARG_WORDS = len(Op._fields), len(ProgramArguments._fields)
#: The position of each word.
OP, ARG = Op(*range(OP_WORDS)), ProgramArguments(*range(ARG_WORDS))

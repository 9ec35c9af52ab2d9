"""The ops of one pass whose rows are of several adapters: calls of `kernels/low_rank.py` before the GEMMs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from headrace.model.adapters.packed import AdapterRows
from headrace.model.kernels.intrinsics import Int64Array
from headrace.model.kernels.low_rank import (
    LOW_RANK,
    LOW_RANK_WORDS,
    SEGMENT,
    SEGMENT_WORDS,
    low_rank_kernel,
    scratch_bytes,
)
from headrace.model.kernels.ops import OP, OP_WORDS
from headrace.model.kernels.program import GemmBackend, Program


class PassOps:
    """The ops of one pass, without adapters as they are given.

    Attributes:
        ops: int64 [layers + 1, columns, OP_WORDS]; the order in memory is the order in which they run.
        column: of each op. If it is preceded by a call for adapters, that has the column before it.
        first: the column of the last op of a row, which is the first one of the next layer, or of its call.
    """

    def __init__(self, ops: Int64Array) -> None:
        self.ops, self.column = ops, list(range(ops.shape[1]))
        self.first = ops.shape[1] - 1
        self._memory: list[Tensor | Int64Array] = []

    def add_adapters(
        self,
        adapters: Sequence[AdapterRows],
        base: Int64Array,
        norm_biases: Mapping[tuple[int, int], Tensor],
        rows: int,
        width: int,
        backend: GemmBackend,
    ) -> None:
        """Insert the calls for adapters.

        Args:
            adapters: the rows of adapters, in order; all others are of the base.
            base, norm_biases: like those of a `PackedAdapter`, of the base.
            rows: of the pass.
            width: elements of the longest row.
            backend: of the GEMMs.
        """
        segments = _segments(adapters, base, rows)
        changed = (segments[..., SEGMENT.a] != 0) | (segments[..., SEGMENT.bias] != base[:, :, None, -1])
        used = [at for at in range(self.ops.shape[1]) if changed[:, at].any()]
        if used:
            self._insert(used, segments, rows, width, backend)
        self._set_norm_biases(adapters, norm_biases, rows)

    def _insert(self, used: list[int], segments: Int64Array, rows: int, width: int, backend: GemmBackend) -> None:
        given, threads, mr = self.ops, torch.get_num_threads(), backend.isa.mr
        self.column = [at + sum(1 for each in used if each <= at) for at in range(given.shape[1])]
        self.ops = np.zeros((len(given), given.shape[1] + len(used), OP_WORDS), np.int64)
        self.ops[:, self.column] = given
        self.first = self.column[-1] - (given.shape[1] - 1 in used)
        places = np.array([self.column[at] for at in used])
        block_bytes = (rows + mr) * backend.nr * 4
        biases = torch.empty(int(given[:, used, OP.n_blocks].max()) * block_bytes, dtype=torch.uint8)
        panels = int((-(-segments[0, 0, :, SEGMENT.rows] // mr)).sum())
        down_bytes = int(segments[..., SEGMENT.ranks].max()) * 16 * mr * 4
        down = torch.empty(panels * down_bytes, dtype=torch.uint8)
        scratch = torch.empty(threads, scratch_bytes(backend, width), dtype=torch.uint8)
        arguments = np.zeros((len(given), len(used), LOW_RANK_WORDS), np.int64)
        arguments[..., LOW_RANK.op] = _addresses(self.ops)[:, places]
        arguments[..., LOW_RANK.segments] = _addresses(segments)[:, used]
        arguments[..., LOW_RANK.segment_count], arguments[..., LOW_RANK.rows] = segments.shape[2], rows + mr
        arguments[..., LOW_RANK.biases], arguments[..., LOW_RANK.down] = biases.data_ptr(), down.data_ptr()
        arguments[..., LOW_RANK.down_bytes] = down_bytes
        arguments[..., LOW_RANK.scratch], arguments[..., LOW_RANK.scratch_bytes] = scratch.data_ptr(), scratch.shape[1]
        self.ops[:, places - 1, OP.call] = low_rank_kernel(backend.isa, backend.nr, backend.dtype).address
        self.ops[:, places - 1, OP.argument] = _addresses(arguments)
        self.ops[:, places, OP.bias] = biases.data_ptr()
        self.ops[:, places, OP.bias_row_bytes] = backend.nr * 4
        self.ops[:, places, OP.bias_block_bytes] = block_bytes
        self._memory += [segments, arguments, biases, down, scratch]

    def without_residual(self, row: int, at: int, like: Tensor, program: Program) -> Tensor:
        """Compute an op that adds to a residual once more, without the residual. Its source must be unchanged."""
        column = self.column[at]
        first, out = column - (column > 1 and self.ops[row, column - 1, OP.call] != 0), torch.empty_like(like)
        ops = self.ops[row, first : column + 1].copy()
        ops[-1, OP.residual], ops[-1, OP.out] = 0, out.data_ptr()
        program.run(ops)
        return out

    def _set_norm_biases(
        self, adapters: Sequence[AdapterRows], base: Mapping[tuple[int, int], Tensor], rows: int
    ) -> None:
        """Give the layer norms a bias for each row, where an adapter has its own."""
        for row, at in dict.fromkeys(place for each in adapters for place in each.adapter.norm_biases):
            biases = base[row, at].repeat(rows, 1)
            for each in adapters:
                biases[each.first : each.first + each.count] = each.adapter.norm_biases.get((row, at), base[row, at])
            op = self.ops[row, self.column[at]]
            op[OP.norm_bias], op[OP.norm_bias_row_bytes] = biases.data_ptr(), biases.stride(0) * 4
            self._memory.append(biases)


def _segments(adapters: Sequence[AdapterRows], base: Int64Array, rows: int) -> Int64Array:
    """All rows of a pass as `Segment`s, for each op: int64 [layers + 1, ops, segments, SEGMENT_WORDS]."""
    parts, at = [], 0
    for each in adapters:
        if each.first > at:
            parts.append((at, each.first - at, base))
        parts.append((each.first, each.count, each.adapter.segments))
        at = each.first + each.count
    if at < rows:
        parts.append((at, rows - at, base))
    made = np.empty((*base.shape[:2], len(parts), SEGMENT_WORDS), np.int64)
    for i, (first, count, words) in enumerate(parts):
        made[:, :, i, SEGMENT.first], made[:, :, i, SEGMENT.rows], made[:, :, i, SEGMENT.a :] = first, count, words
    return made


def _addresses(array: Int64Array) -> Int64Array:
    """The address of each row of the first two dimensions of a contiguous array."""
    rows, columns = array.shape[:2]
    offsets: Int64Array = np.arange(rows)[:, None] * array.strides[0] + np.arange(columns) * array.strides[1]
    return offsets + array.ctypes.data

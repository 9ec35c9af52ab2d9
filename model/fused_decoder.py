"""All blocks of a model as programs of compiled GEMMs (kernels/program.py).

    layer norm, q k v of the first layer
    each layer: attention | projection, added to x | layer norm, feed-forward | projection, added to x
                | layer norm, q k v of the next layer

A pass is one call, attention included. If activations are captured, or torch computes the attention, the ops between
two attentions are one call. Both ways run the same compiled code, so a row has the same bits either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from headrace.model.activations import ActivationCapture
from headrace.model.attention import CachedAttention
from headrace.model.block import Attention, Block
from headrace.model.kernels.attention import LayerCalls
from headrace.model.kernels.intrinsics import Int64Array
from headrace.model.kernels.ops import OP, OP_WORDS
from headrace.model.kernels.packed_weight import PackedWeight
from headrace.model.kernels.program import Program

#: The ops of a layer in the order of the program; the last one belongs to the next layer.
ATTENTION, PROJECTION, FEED, FEED_PROJECTION, QKV = range(5)


class FusedDecoder:
    """The blocks of a model, ready to run on any number of rows.

    Must not be copied with `copy.deepcopy`: its ops contain the addresses of tensors.
    """

    def __init__(self, blocks: Sequence[Block], weights: Mapping[int, Sequence[PackedWeight]]) -> None:
        self._blocks, self._weights = list(blocks), weights
        norms = {FEED: [block.ln_2 for block in blocks], QKV: [block.ln_1 for block in blocks]}
        # Layer norms are computed in float32.
        self._norms = {at: [tuple(map(_floats, (norm.weight, norm.bias))) for norm in norms[at]] for at in norms}
        #: The ops without what changes from pass to pass, [layers + 1, 5, OP_WORDS]. In the first row only QKV is used,
        #: and the last row has no QKV.
        self._ops = np.zeros((len(blocks) + 1, 5, OP_WORDS), dtype=np.int64)
        for at, of_layers in weights.items():
            ops = self._ops[:-1, at] if at == QKV else self._ops[1:, at]
            ops[:] = [weight.op for weight in of_layers]
            if at in norms:
                ops[:, OP.norm_weight] = [weight.data_ptr() for weight, _ in self._norms[at]]
                ops[:, OP.norm_bias] = [bias.data_ptr() for _, bias in self._norms[at]]
                ops[:, OP.epsilon_bits] = np.array([norm.epsilon for norm in norms[at]]).view(np.int64)

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> FusedDecoder | None:
        """The decoder for these blocks; None if torch computes any of their GEMMs or activation functions."""
        if any(getattr(block.c_fc, "then", None) is not None for block in blocks):
            return None
        names = {PROJECTION: "c_proj", FEED: "c_fc", FEED_PROJECTION: "mlp_proj", QKV: "c_attn"}
        gemms = {at: [getattr(getattr(block, names[at]), "gemm", None) for block in blocks] for at in names}
        packed = {at: [gemm for gemm in gemms[at] if isinstance(gemm, PackedWeight)] for at in names}
        return cls(blocks, packed) if all(len(packed[at]) == len(blocks) for at in names) else None

    def __call__(self, x: Tensor, attend: Attention, captures: Sequence[ActivationCapture]) -> Tensor:
        """Run all blocks in place: the residual stream [M, E] after the embeddings becomes that after the last block.

        Raises:
            ValueError: x has another type or width, or its rows are not contiguous.
        """
        rows, width = x.shape
        self._weights[QKV][0].check(x)
        if not x.is_contiguous():
            raise ValueError(f"rows must be contiguous; strides are {x.stride()}")
        first = {at: self._weights[at][0] for at in self._weights}
        backend = first[QKV].backend
        qkv = x.new_empty(rows, first[QKV].out)
        fed = x.new_empty(-(-rows // backend.mr) * backend.mr, first[FEED].out)
        ops = self._ops_of_pass(x, qkv, fed)
        # Packed, a last block that is not full would leave elements unset; captures read `fed` unpacked.
        if backend.packs_output and fed.shape[1] % backend.nr == 0 and not captures:
            ops[:, FEED, OP.packs_output] = ops[:, FEED_PROJECTION, OP.in_packed] = 1
        program = Program(backend, rows, max(width, fed.shape[1]))
        q, k, v = self._blocks[0].heads(qkv)
        if not captures and isinstance(attend, CachedAttention):
            attended = torch.empty_like(x)
            calls = attend.layer_calls(q, k, v, attended.view(q.shape))
            if calls is not None:
                self._run_whole(ops, calls, attended, program)
                return x
        normed = torch.empty_like(x)
        if captures:
            ops[0, QKV, OP.normed_out] = normed.data_ptr()
        program.run(ops[0, QKV:])
        for capture in captures:
            capture.record(ln_1=normed, q=q, k=k, v=v)
        for layer, block in enumerate(self._blocks):
            attended = attend(layer, q, k, v).reshape(rows, width).contiguous()
            ops[layer + 1, PROJECTION, OP.source] = attended.data_ptr()
            program.run(ops[layer + 1, PROJECTION : QKV + (layer + 1 < len(self._blocks))])
            for capture in captures:
                if layer == 0:
                    capture.record(attn=block.c_proj(attended), mlp=block.mlp_proj(fed[:rows]), block_0=x)
                capture.record_hidden(layer + 1, x)
        return x

    def _ops_of_pass(self, x: Tensor, qkv: Tensor, fed: Tensor) -> Int64Array:
        """The ops with the addresses of this pass, except those of the attention."""
        ops, size = self._ops.copy(), x.itemsize
        for at, source, out in ((PROJECTION, x, x), (FEED, x, fed), (FEED_PROJECTION, fed, x), (QKV, x, qkv)):
            ops[:, at, OP.source], ops[:, at, OP.source_row_bytes] = source.data_ptr(), source.shape[1] * size
            ops[:, at, OP.out], ops[:, at, OP.out_row_bytes] = out.data_ptr(), out.shape[1] * size
        ops[:, [PROJECTION, FEED_PROJECTION], OP.residual] = x.data_ptr()
        return ops

    def _run_whole(self, ops: Int64Array, calls: LayerCalls, attended: Tensor, program: Program) -> None:
        """Run all layers as one program; attention writes to `attended`."""
        arguments = calls.arguments.ctypes.data + np.arange(len(self._blocks)) * calls.arguments.strides[0]
        ops[1:, ATTENTION, OP.call], ops[1:, ATTENTION, OP.argument] = calls.address, arguments
        ops[1:, PROJECTION, OP.source] = attended.data_ptr()
        program.run(ops.reshape(-1, OP_WORDS)[QKV:-1])


def _floats(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()

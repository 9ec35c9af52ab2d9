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
from headrace.model.adapters.lora import Adapter, side_by_side
from headrace.model.adapters.packed import AdapterRows, PackedAdapter
from headrace.model.adapters.pass_ops import PassOps
from headrace.model.attention import CachedAttention
from headrace.model.block import Attention, Block
from headrace.model.kernels.attention import LayerCalls
from headrace.model.kernels.intrinsics import Int64Array
from headrace.model.kernels.low_rank import LowRank
from headrace.model.kernels.ops import OP, OP_WORDS
from headrace.model.kernels.packed_weight import PackedWeight, pad_columns
from headrace.model.kernels.program import Program

#: The ops of a layer in the order of the program; the last one belongs to the next layer.
ATTENTION, PROJECTION, FEED, FEED_PROJECTION, QKV = range(5)
#: The linear layers that the ops compute, as `families.base.decoder_shapes` names them.
LINEARS = {PROJECTION: "attn.c_proj", FEED: "mlp.c_fc", FEED_PROJECTION: "mlp.c_proj", QKV: "attn.c_attn"}
#: The layer norms before them.
NORMS = {FEED: "ln_2", QKV: "ln_1"}


class FusedDecoder:
    """The blocks of a model, ready to run on any number of rows.

    Must not be copied with `copy.deepcopy`: its ops contain the addresses of tensors.
    """

    def __init__(self, blocks: Sequence[Block], weights: Mapping[int, Sequence[PackedWeight]]) -> None:
        self._blocks, self._weights = list(blocks), weights
        norms = {FEED: [block.ln_2 for block in blocks], QKV: [block.ln_1 for block in blocks]}
        # Layer norms are computed in float32.
        self._norms = {at: [tuple(map(_floats, (norm.weight, norm.bias))) for norm in norms[at]] for at in norms}
        #: Those of them that adapters may replace, by the row and the column of the op after the norm.
        self._norm_biases = {(_row(at, i), at): pair[1] for at in norms for i, pair in enumerate(self._norms[at])}
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
        #: Of rows without an adapter, like `PackedAdapter.segments`.
        self._base_segments = np.zeros((len(blocks) + 1, 5, 4), dtype=np.int64)
        self._base_segments[..., -1] = self._ops[..., OP.bias]

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> FusedDecoder | None:
        """The decoder for these blocks; None if torch computes any of their GEMMs or activation functions."""
        if any(getattr(block.c_fc, "then", None) is not None for block in blocks):
            return None
        names = {PROJECTION: "c_proj", FEED: "c_fc", FEED_PROJECTION: "mlp_proj", QKV: "c_attn"}
        gemms = {at: [getattr(getattr(block, names[at]), "gemm", None) for block in blocks] for at in names}
        packed = {at: [gemm for gemm in gemms[at] if isinstance(gemm, PackedWeight)] for at in names}
        return cls(blocks, packed) if all(len(packed[at]) == len(blocks) for at in names) else None

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """Pack an adapter of these blocks."""
        segments, norm_biases = self._base_segments.copy(), {}
        tensors: list[Tensor] = []
        for at, name in LINEARS.items():
            for layer, weight in enumerate(self._weights[at]):
                words = segments[_row(at, layer), at]
                if parts := adapter.matrices.get(f"h.{layer}.{name}.weight"):
                    packed = LowRank.of(*side_by_side(parts, weight.out), weight.backend)
                    words[:3] = packed.a.data_ptr(), packed.ranks, packed.b.data_ptr()
                    tensors += packed
                if (bias := adapter.biases.get(f"h.{layer}.{name}.bias")) is not None:
                    tensors.append(pad_columns(bias, len(weight.biases)))
                    words[-1] = tensors[-1].data_ptr()
                if (bias := adapter.biases.get(f"h.{layer}.{NORMS.get(at)}.bias")) is not None:
                    norm_biases[_row(at, layer), at] = bias
        final = adapter.biases.get("ln_f.bias")
        return PackedAdapter(adapter.digest, adapter.rank, segments, norm_biases, final, tuple(tensors))

    def __call__(
        self,
        x: Tensor,
        attend: Attention,
        captures: Sequence[ActivationCapture],
        adapters: Sequence[AdapterRows] = (),
    ) -> Tensor:
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
        if backend.packs_output and fed.shape[1] % backend.nr == 0 and not captures and not adapters:
            ops[:, FEED, OP.packs_output] = ops[:, FEED_PROJECTION, OP.in_packed] = 1
        longest = max(width, fed.shape[1])
        program, made = Program(backend, rows, longest), PassOps(ops)
        if adapters:
            made.add_adapters(adapters, self._base_segments, self._norm_biases, rows, longest, backend)
        q, k, v = self._blocks[0].heads(qkv)
        if not captures and isinstance(attend, CachedAttention):
            attended = torch.empty_like(x)
            calls = attend.layer_calls(q, k, v, attended.view(q.shape))
            if calls is not None:
                self._run_whole(made, calls, attended, program)
                return x
        ops, normed = made.ops, torch.empty_like(x)
        if captures:
            ops[0, made.column[QKV], OP.normed_out] = normed.data_ptr()
        program.run(ops[0, made.first :])
        for capture in captures:
            capture.record(ln_1=normed, q=q, k=k, v=v)
        for layer in range(len(self._blocks)):
            attended = attend(layer, q, k, v).reshape(rows, width).contiguous()
            ops[layer + 1, made.column[PROJECTION], OP.source] = attended.data_ptr()
            program.run(ops[layer + 1, 1 : None if layer + 1 < len(self._blocks) else made.first])
            for capture in captures:
                if layer == 0:
                    attn, mlp = (made.without_residual(1, at, x, program) for at in (PROJECTION, FEED_PROJECTION))
                    capture.record(attn=attn, mlp=mlp, block_0=x)
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

    def _run_whole(self, made: PassOps, calls: LayerCalls, attended: Tensor, program: Program) -> None:
        """Run all layers as one program; attention writes to `attended`."""
        ops = made.ops
        arguments = calls.arguments.ctypes.data + np.arange(len(self._blocks)) * calls.arguments.strides[0]
        ops[1:, ATTENTION, OP.call], ops[1:, ATTENTION, OP.argument] = calls.address, arguments
        ops[1:, made.column[PROJECTION], OP.source] = attended.data_ptr()
        program.run(ops.reshape(-1, OP_WORDS)[made.first : made.first - ops.shape[1]])


def _row(at: int, layer: int) -> int:
    """The row of a layer's op."""
    return layer if at == QKV else layer + 1


def _floats(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()

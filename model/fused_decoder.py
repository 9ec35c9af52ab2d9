"""All blocks of a model as chains of products (model/kernels/program.py).

    norm, q k v of the first layer
    each layer: attention | projection onto x | norm, feed-forward | projection onto x | norm, q k v of the next layer

A pass of decoding rows and short prompts is one call, attention included. Beside longer prompts attention is torch's in
part, and what lies between two attentions is a call. The same code computes both, so a row has the same bits in either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headrace.model.kernels import program as chain
from headrace.model.kernels.attention import Calls
from headrace.model.kernels.intrinsics import Numbers
from headrace.model.kernels.program import FIELDS, Streamed, Workspace
from headrace.model.kv_cache import CachedAttention

if TYPE_CHECKING:
    from headrace.model.activations import Trace
    from headrace.model.gpt2 import Attention, Block

#: What a row of the table stands for: the parts of a layer, and the first product of the next.
ATTENTION, PROJECTION, FEED, FEED_PROJECTION, QKV = range(5)


class Passes:
    """The blocks, ready to be run on any number of rows."""

    def __init__(self, blocks: Sequence[Block], products: Mapping[int, Sequence[Streamed]]) -> None:
        self._blocks, self._products = list(blocks), products
        norms = {FEED: [block.ln_2 for block in blocks], QKV: [block.ln_1 for block in blocks]}
        # Norms are computed in float32.
        self._norms = {at: [tuple(map(_floats, (norm.weight, norm.bias))) for norm in norms[at]] for at in norms}
        #: What does not change from pass to pass, [layers + 1, 5, FIELDS]; of the first row only QKV is run, which the
        #: last has not.
        self._table = np.zeros((len(blocks) + 1, 5, FIELDS), dtype=np.int64)
        for at, of_layers in products.items():
            rows = self._table[:-1, at] if at == QKV else self._table[1:, at]
            rows[:] = [product.numbers for product in of_layers]
            if at in norms:
                rows[:, chain.NORM_WEIGHT] = [weight.data_ptr() for weight, _ in self._norms[at]]
                rows[:, chain.NORM_BIAS] = [bias.data_ptr() for _, bias in self._norms[at]]
                rows[:, chain.EPSILON] = np.array([norm.epsilon for norm in norms[at]]).view(np.int64)

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> Passes | None:
        """None where products are computed by torch."""
        names = {PROJECTION: "c_proj", FEED: "c_fc", FEED_PROJECTION: "mlp_proj", QKV: "c_attn"}
        products = {at: [getattr(getattr(block, names[at]), "product", None) for block in blocks] for at in names}
        streamed = {at: [product for product in products[at] if isinstance(product, Streamed)] for at in names}
        return cls(blocks, streamed) if all(len(streamed[at]) == len(blocks) for at in names) else None

    def __deepcopy__(self, _: dict[int, object]) -> Passes:
        """Itself: a copy would hold addresses of the original's tensors."""
        return self

    def __call__(self, x: Tensor, attend: Attention, traces: Sequence[Trace]) -> Tensor:
        """The residual stream [M, E] after the embeddings, end to end -> after the last block, in the same memory."""
        rows, width = x.shape
        self._products[QKV][0].check(x)
        if not x.is_contiguous():
            raise ValueError(f"rows must lie end to end; strides are {x.stride()}")
        first = {at: self._products[at][0] for at in self._products}
        kind = first[QKV].kind
        qkv, fed = x.new_empty(rows, first[QKV].out), x.new_empty(-(-rows // kind.group) * kind.group, first[FEED].out)
        table = self._placed(x, qkv, fed)
        if kind.hands_on and not traces:  # `fed` is nobody else's then
            table[:, FEED, chain.HAND_ON] = table[:, FEED_PROJECTION, chain.READY] = 1
        workspace = Workspace(kind, rows, max(width, fed.shape[1]))
        q, k, v = qkv.view(rows, 3, self._blocks[0].n_head, -1).unbind(1)  # [M, H, D] each
        attended = torch.empty_like(x)
        calls = attend.calls(q, k, v, attended.view(q.shape)) if isinstance(attend, CachedAttention) else None
        if calls is not None and not traces:
            self._run_whole(table, calls, attended, workspace)
            return x
        normed = torch.empty_like(x)
        if traces:
            table[0, QKV, chain.NORMED] = normed.data_ptr()
        workspace.run(table[0, QKV:])
        for layer, block in enumerate(self._blocks):
            for trace in traces if layer == 0 else ():
                trace.record(ln_1=normed, q=q, k=k, v=v)
            attended = attend(layer, q, k, v).reshape(rows, width).contiguous()
            table[layer + 1, PROJECTION, chain.SOURCE] = attended.data_ptr()
            workspace.run(table[layer + 1, PROJECTION : QKV + (layer + 1 < len(self._blocks))])
            for trace in traces:
                if layer == 0:
                    trace.record(attn=block.c_proj(attended), mlp=block.mlp_proj(fed[:rows]), block_0=x)
                trace.record_hidden(layer + 1, x)
        return x

    def _placed(self, x: Tensor, qkv: Tensor, fed: Tensor) -> Numbers:
        """The table with the places of this pass; what attention gives comes later."""
        table, size = self._table.copy(), x.itemsize
        for at, source, out in ((PROJECTION, x, x), (FEED, x, fed), (FEED_PROJECTION, fed, x), (QKV, x, qkv)):
            table[:, at, chain.SOURCE], table[:, at, chain.SOURCE_ROW] = source.data_ptr(), source.shape[1] * size
            table[:, at, chain.OUT], table[:, at, chain.OUT_ROW] = out.data_ptr(), out.shape[1] * size
        table[:, [PROJECTION, FEED_PROJECTION], chain.RESIDUAL] = x.data_ptr()
        return table

    def _run_whole(self, table: Numbers, calls: Calls, attended: Tensor, workspace: Workspace) -> None:
        """All layers in one call; attention writes to `attended`."""
        arguments = calls.arguments.ctypes.data + np.arange(len(self._blocks)) * calls.arguments.strides[0]
        table[1:, ATTENTION, chain.CALL], table[1:, ATTENTION, chain.ARGUMENT] = calls.address, arguments
        table[1:, PROJECTION, chain.SOURCE] = attended.data_ptr()
        workspace.run(table.reshape(-1, FIELDS)[QKV:-1])


def _floats(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()

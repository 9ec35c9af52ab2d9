"""Named tensors at the checkpoints of a forward pass. A pass that nobody traces looks once a layer at an empty list."""

from __future__ import annotations

import torch
from torch import Tensor

#: Checkpoint 11 is taken at this temperature.
PROBS_TEMPERATURE = 0.8


class Trace:
    """Collects the tensors of one sequence, over as many passes as its prompt and its new tokens take.

    Names are those of the checkpoints; what belongs to tokens after the prompt is kept apart, since the checkpoints are
    about the prompt.

    Args:
        scale: what attention multiplies its scores by; fused kernels never show them, so they are made from q and k.
        prompt_length: T, the rows that make up the prompt.
    """

    def __init__(self, scale: float, prompt_length: int) -> None:
        self.scale = scale
        self.prompt_length = prompt_length
        self.rows = slice(None)
        self._pieces: dict[str, list[Tensor]] = {}
        self._hidden: dict[int, list[Tensor]] = {}
        self._pending: list[tuple[list[Tensor], Tensor]] = []
        self._whole: dict[str, Tensor] = {}

    def at(self, rows: slice) -> Trace:
        """Say which packed rows of the next pass are this sequence's. What a pass that failed left is dropped."""
        self.rows = rows
        self._pending.clear()
        return self

    def commit(self) -> None:
        """The pass is through: its rows count."""
        for pieces, tensor in self._pending:
            pieces.append(tensor)
        self._pending.clear()

    def record(self, **tensors: Tensor) -> None:
        """Keep copies of this sequence's rows of packed tensors [M, ...]."""
        self.append(**{name: tensor[self.rows] for name, tensor in tensors.items()})

    def append(self, **tensors: Tensor) -> None:
        """Keep copies of further rows that are this sequence's alone."""
        for name, tensor in tensors.items():
            self._pending.append((self._pieces.setdefault(name, []), tensor.clone()))

    def record_hidden(self, depth: int, hidden: Tensor) -> None:
        """Keep the residual stream [M, E]: 0 after the embeddings, i after block i - 1."""
        self._pending.append((self._hidden.setdefault(depth, []), hidden[self.rows].clone()))

    def keep(self, **tensors: Tensor) -> None:
        """Keep copies of tensors that have no rows to be joined."""
        self._whole.update({name: tensor.clone() for name, tensor in tensors.items()})

    def finish(self) -> dict[str, Tensor]:
        """All tensors by name, those of rows joined along them: `ln_1` [T, E], `q` [T, H, D], `hidden` [layers, T, E].

        `k_new` and `v_new` are the rows that tokens after the prompt added, [new, H, D].
        """
        count = self.prompt_length
        tensors = {name: torch.cat(pieces) for name, pieces in self._pieces.items()}
        new = {f"{name}_new": tensors[name][count:] for name in ("k", "v")}
        for name in ("embeddings", "ln_1", "q", "k", "v", "attn", "mlp", "block_0"):
            tensors[name] = tensors[name][:count]
        q, k = tensors["q"].transpose(0, 1), tensors["k"].transpose(0, 1)  # [H, T, D]
        scores = q @ k.transpose(1, 2) * self.scale
        hidden = torch.stack([torch.cat(pieces)[:count] for _, pieces in sorted(self._hidden.items())])
        return {**tensors, **new, **self._whole, "scores": scores, "hidden": hidden}


def probabilities(last_logits: Tensor) -> Tensor:
    """Checkpoint 11: [V] -> [V] at `PROBS_TEMPERATURE`.

    In float64: torch's float32 softmax of 50,257 numbers is off by up to 3e-5, and the checkpoint allows 1e-6.
    """
    return torch.softmax(last_logits.double() / PROBS_TEMPERATURE, dim=-1).float()

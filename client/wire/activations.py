"""The thirteen checkpoints: which activations a worker captures, and how closely they must agree with a reference.

This module does not import numpy, so that submitting a job does not need it. `client.wire.comparison` compares.
"""

from __future__ import annotations

from typing import NamedTuple


class Checkpoint(NamedTuple):
    """One of the thirteen checkpoints."""

    name: str
    #: Names of the tensors that are compared with those of a reference.
    compared: tuple[str, ...]
    #: The largest absolute difference that is allowed in float32.
    tolerance: float


#: Checkpoint number -> the checkpoint. 0 and 12 check a whole job from end to end.
CHECKPOINTS: dict[int, Checkpoint] = {
    0: Checkpoint("worker ready and taking jobs", (), 0.0),
    1: Checkpoint("first layer norm", ("embeddings", "ln_1"), 1e-5),
    2: Checkpoint("queries, keys, values", ("q", "k", "v"), 1e-4),
    3: Checkpoint("cache", (), 0.0),
    4: Checkpoint("scaled scores", ("scores",), 1e-4),
    5: Checkpoint("attention output", ("attn",), 1e-4),
    6: Checkpoint("feed-forward output", ("mlp",), 1e-4),
    7: Checkpoint("output of block 0", ("block_0",), 1e-4),
    8: Checkpoint("logits", ("logits",), 1e-3),
    9: Checkpoint("logits of the last position", ("last_logits",), 1e-3),
    10: Checkpoint("next token", ("next_token",), 0.0),
    11: Checkpoint("probabilities at 0.8", ("probs",), 1e-6),
    12: Checkpoint("tokens end to end", ("tokens",), 0.0),
}

#: Tensors that a worker captures in addition to the compared ones. Those of checkpoint 3 are compared with each other;
#: `hidden` is the input of block 0 and the output of every block: it shows in which layer a difference begins.
_ALSO_CAPTURED: dict[int, tuple[str, ...]] = {
    3: ("k", "v", "cache_k", "cache_v", "cache_rest", "k_new", "v_new", "cache_k_end", "cache_v_end"),
    7: ("hidden",),
}

#: Checkpoint number -> names of all tensors that a worker captures for it.
CHECKPOINT_TENSORS: dict[int, tuple[str, ...]] = {
    number: (*checkpoint.compared, *_ALSO_CAPTURED.get(number, ())) for number, checkpoint in CHECKPOINTS.items()
}

#: Names of all captured tensors, each once, in the order of the checkpoints.
TENSOR_NAMES: tuple[str, ...] = tuple(dict.fromkeys(name for names in CHECKPOINT_TENSORS.values() for name in names))

"""A lower bound for the time of a workload on this machine, from its memory bandwidth and its arithmetic throughput.

Every schedule has to do two things (a roofline model).

**Bytes read.** The pass over a prompt gives its first new token, and each further token takes another pass, because it
depends on the token before it. A workload therefore takes at least as many passes as the most new tokens of any prompt,
and exactly as many if all prompts run together. Each pass reads every matrix once: `12 * width**2` weights in a block
of GPT-2 (3 for queries, keys and values, fewer where heads share keys and values; 1 for the output of attention, 4 + 4
for the feed-forward layer), and
`vocabulary * width` in the head. In addition, each token after the first reads the keys and values of all earlier
positions, `2 * layers * width` numbers each. Keys and values that are computed in the same pass are not counted.

**Operations.** Every token that enters the model takes a multiplication and an addition with each weight of the blocks;
these are `prompt + new - 1` tokens of each row, because the last token never enters. Each new token takes the same with
the head. At position `t` attention multiplies `t + 1` keys by the query and `t + 1` values by their weights, which are
`4 * width * (t + 1)` operations in a layer. Norms, GELU, softmax, sampling and writes are left out.

The limit is the longer of the two times, as if reading and computing overlapped perfectly. It is a
lower bound for this machine in this precision, not a promise that a program could reach it. One caveat: the rate of
reading is that of an array larger than most caches; weights that stay in a large cache can be read faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.workloads import Item

#: Precision -> bytes of a weight, and of an element of the cache.
BYTES = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (1, 2)}


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model that determine its cost."""

    layers: int
    width: int
    vocabulary: int
    #: Width of the keys of a position; None: that of the model.
    key_width: int | None = None

    @property
    def keys(self) -> int:
        """Numbers in the keys of a position, and in its values."""
        return self.key_width or self.width

    @property
    def block_weights(self) -> int:
        return self.layers * self.width * (10 * self.width + 2 * self.keys)

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.width


@dataclass(frozen=True)
class Rates:
    """Peak rates of a machine: bytes read per second, and operations (half a multiply-add) per second."""

    bytes_per_s: float
    operations_per_s: float

    def best(self, other: Rates) -> Rates:
        """The higher of two measurements of each rate."""
        return Rates(max(self.bytes_per_s, other.bytes_per_s), max(self.operations_per_s, other.operations_per_s))


def bytes_read(shape: Shape, items: Sequence[Item], sizes: tuple[int, int]) -> int:
    """Bytes that any schedule reads for the workload; `sizes` are bytes of a weight and of an element of the cache."""
    passes = max(item.new_tokens for item in items)
    weights = passes * (shape.block_weights + shape.head_weights)
    # The second token reads `prompt` positions, the third one position more, and so on for new_tokens - 1 tokens.
    positions = sum(sum(range(len(i.prompt), len(i.prompt) + i.new_tokens - 1)) for i in items)
    return sizes[0] * weights + sizes[1] * positions * 2 * shape.layers * shape.keys


def operations(shape: Shape, items: Sequence[Item]) -> int:
    """Multiplications and additions that any schedule does for the workload."""
    blocks = sum(len(i.prompt) + i.new_tokens - 1 for i in items) * 2 * shape.block_weights
    head = sum(i.new_tokens for i in items) * 2 * shape.head_weights
    positions = sum(sum(range(1, len(i.prompt) + i.new_tokens)) for i in items)
    return blocks + head + positions * 4 * shape.layers * shape.width


def limit_s(shape: Shape, items: Sequence[Item], sizes: tuple[int, int], rates: Rates) -> float:
    """The least number of seconds in which this machine can compute the workload."""
    reading = bytes_read(shape, items, sizes) / rates.bytes_per_s
    return max(reading, operations(shape, items) / rates.operations_per_s)


class Machine:
    """Measures the rates, in a separate process like a contender."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._large = torch.ones(2**28)  # 1 GiB

    def rates(self, dtype: str) -> Rates:
        """The best of several tries: the sum of a large array, and a GEMM of large square matrices."""
        import torch

        if dtype == "int8":
            square = torch.randint(-127, 128, (4096, 4096), dtype=torch.int8)
        else:
            square = torch.randn(4096, 4096).to(getattr(torch, dtype))
        tall = square[:2048].clone()
        multiply = torch._int_mm if dtype == "int8" else torch.nn.functional.linear
        reading = _shortest(self._large.sum, 5)
        multiplying = _shortest(lambda: multiply(tall, square), 5)
        return Rates(self._large.nbytes / reading, 2 * tall.numel() * len(square) / multiplying)


def _shortest(compute: Callable[[], object], tries: int) -> float:
    compute()
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        compute()
        times.append(time.perf_counter() - began)
    return min(times)

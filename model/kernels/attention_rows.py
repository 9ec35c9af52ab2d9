"""Attention of rows over one head in virtual vectors: the same bits on every instruction set.

For a query q of a row that reads the positions 0 to T - 1, with their keys k and values v:

score_t = sum over d of (q_d * scale) * k_td      16 partial sums, one for each lane, folded as by `VectorBuilder.sum`
weight_t = e**(score_t - the largest score)       a polynomial, see vector_math.py
total = sum over t of weight_t                    16 partial sums, folded likewise
out_d = (sum over t of weight_t * v_td) / total   one chain of FMAs in the order of t

Rows of a tile read the same keys and values, which are then loaded once for all of them. The elements of a head fill
vectors: 16 float32, or 32 bfloat16 as 16 words, whose lower halves are one vector and whose upper halves the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from headrace.model.kernels.isa import Isa
from headrace.model.kernels.vector_function import VectorFunction
from headrace.model.kernels.vector_math import exponential
from headrace.model.kernels.vectors import FLOAT, HALVES, INT64, INTEGERS, LANES, VECTOR, Value, VectorBuilder


@dataclass(frozen=True)
class Head:
    """How the elements of a head of a row fill vectors."""

    width: int
    bf16: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of a head of a row."""
        return self.width * (2 if self.bf16 else 4)

    @property
    def vectors(self) -> int:
        """The number of vectors; the lanes of the last one that have no element are 0."""
        words = self.width // 32 if self.bf16 else 0
        return 2 * words - (-(self.width - 32 * words) // LANES)

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Index of the first vector, offset in bytes and number of elements of what one load reads."""
        at, index = 0, 0
        while at < self.width:
            count = 32 if self.bf16 and self.width - at >= 32 else min(LANES, self.width - at)
            yield index, at * (2 if self.bf16 else 4), count
            at, index = at + count, index + (2 if count == 32 else 1)

    def load(self, v: VectorBuilder, address: Value, piece: tuple[int, int, int]) -> list[Value]:
        """The vectors of one piece: two if it has 32 elements."""
        _, offset, count = piece
        if count == 32:
            words = v.load(address, offset, INTEGERS, 2)
            upper = v.builder.and_(words, v.integers(-0x10000))
            return [v.numbers(v.builder.shl(words, v.integers(16))), v.numbers(upper)]
        loaded = v.read(v.plus(address, offset), _rest(count), HALVES if self.bf16 else VECTOR)
        return [v.widen(loaded) if self.bf16 else loaded]

    def store(self, v: VectorBuilder, vectors: Sequence[Value], address: Value, piece: tuple[int, int, int]) -> None:
        """Write the vectors of one piece, rounded to the type of the elements."""
        _, offset, count = piece
        if count == 32:
            lower, upper = (v.builder.zext(v.narrow(each), INTEGERS) for each in vectors)
            v.store(v.builder.or_(lower, v.builder.shl(upper, v.integers(16))), address, offset, 2)
            return
        rounded = v.narrow(vectors[0]) if self.bf16 else vectors[0]
        v.write(rounded, v.plus(address, offset), _rest(count))


def _rest(count: int) -> Value | None:
    """The number of elements as `VectorBuilder.read` takes it: None for a whole vector."""
    return None if count == LANES else INT64(count)


def query(head: Head) -> VectorFunction:
    """query(q, target, scale): q * scale as float32 vectors; `scale` is a float32."""

    def body(v: VectorBuilder, q: Value, target: Value, scale: Value) -> None:
        factor = v.broadcast(scale)
        for piece in head.pieces():
            for i, vector in enumerate(head.load(v, q, piece), piece[0]):
                v.store(v.multiply(vector, factor), target, 64 * i)

    return VectorFunction("attention_query", ("q", "target", "scale"), body, floats=("scale",))


def scores(head: Head, rows: int, isa: Isa) -> VectorFunction:
    """scores(queries, k, groups, out, out_row_bytes, soon): the scores of `rows` queries with 16 * groups keys.

    Queries are those of `query`, one after another. Prefetches as many keys at `soon`.
    """

    def body(v: VectorBuilder, queries: Value, k: Value, groups: Value, out: Value, stride: Value, soon: Value) -> None:
        factor = _factors(v, head, queries, held=rows if rows * head.vectors <= _registers(isa) - 8 else 0)
        outs = [out]
        for _ in range(rows - 1):
            outs.append(v.builder.add(outs[-1], stride))

        def group(k: Value, soon: Value, *outs: Value) -> list[Value]:
            def partial(position: int) -> list[Value]:
                for line in range(0, head.row_bytes, 64):
                    v.prefetch(soon, position * head.row_bytes + line)
                return _products(v, head, rows, factor, v.plus(k, position * head.row_bytes))

            for row, found in enumerate(_folded(v, partial)):
                v.store(found, outs[row])
            moved = [v.plus(address, LANES * head.row_bytes) for address in (k, soon)]
            return [*moved, *(v.plus(each, 64) for each in outs)]

        v.repeat(groups, [k, soon, *outs], group)

    parameters = ("queries", "k", "groups", "out", "out_row_bytes", "soon")
    return VectorFunction(f"attention_scores_{rows}", parameters, body)


def score(head: Head) -> VectorFunction:
    """score(query, k, out): the score of one query with one key."""

    def body(v: VectorBuilder, queries: Value, k: Value, out: Value) -> None:
        v.store(v.sum(_products(v, head, 1, _factors(v, head, queries), k)[0]), out)

    return VectorFunction("attention_score", ("query", "k", "out"), body)


def _factors(v: VectorBuilder, head: Head, queries: Value, held: int = 0) -> Callable[[int, int], Value]:
    """A function for the i-th vector of a row's query: those of the first `held` rows are kept in registers."""
    kept = [v.load(queries, 64 * at) for at in range(held * head.vectors)]

    def factor(row: int, i: int) -> Value:
        return kept[row * head.vectors + i] if row < held else v.load(queries, 64 * (row * head.vectors + i))

    return factor


def _products(v: VectorBuilder, head: Head, rows: int, factor: Callable[[int, int], Value], k: Value) -> list[Value]:
    """The partial sums of the scores of each query with one key."""
    sums: list[Value] = [None] * rows
    for piece in head.pieces():
        for i, key in enumerate(head.load(v, k, piece), piece[0]):
            for row in range(rows):
                element = factor(row, i)
                sums[row] = v.multiply(key, element) if i == 0 else v.fma(key, element, sums[row])
    return sums


def _folded(v: VectorBuilder, partial: Callable[[int], list[Value]]) -> list[Value]:
    """For each row a vector of 16 sums, of the partial sums of 16 positions.

    Each position is folded by the additions of `VectorBuilder.sum`, two positions in each addition.
    """

    def merged(distance: int, positions: Sequence[int]) -> list[Value]:
        if len(positions) == 1:
            return partial(positions[0])
        half = len(positions) // 2
        firsts, seconds = merged(2 * distance, positions[:half]), merged(2 * distance, positions[half:])
        # A vector holds a run of 2 * distance lanes for each of its positions.
        low = [lane for lane in range(2 * LANES) if lane % (2 * distance) < distance]
        high = [lane + distance for lane in low]
        masks = [ir.Constant(INTEGERS, lanes) for lanes in (_interleaved(low, distance), _interleaved(high, distance))]
        pairs = zip(firsts, seconds, strict=True)
        return [v.add(*(v.builder.shuffle_vector(a, b, mask) for mask in masks)) for a, b in pairs]

    # Positions are computed in their order, because memory is read fastest so; their sums end up in other lanes.
    order = ir.Constant(INTEGERS, [4 * (position % 4) + position // 4 for position in range(LANES)])
    undefined = ir.Constant(VECTOR, ir.Undefined)
    return [v.builder.shuffle_vector(found, undefined, order) for found in merged(1, range(LANES))]


def _interleaved(lanes: list[int], distance: int) -> list[int]:
    """The order in which the lanes of two vectors become one.

    Distances of 8 and 4 exchange quarters of 4 lanes; shorter ones stay within each quarter, as registers do.
    """
    if distance >= 4:
        return lanes
    first, second = lanes[: LANES // 2], lanes[LANES // 2 :]
    return [lane for at in range(0, 8, 2) for part in (first, second) for lane in part[at : at + 2]]


def softmax() -> VectorFunction:
    """softmax(scores, length, total): replace float32 scores by their weights; writes the sum of the weights."""

    def body(v: VectorBuilder, scores: Value, length: Value, total: Value) -> None:
        def at(index: Value) -> Value:
            return v.builder.add(scores, v.builder.shl(index, INT64(2)))

        def larger(index: Value, count: Value | None, top: Value) -> list[Value]:
            found = v.read(at(index), count)
            if count is not None:
                found = v.builder.select(v.first(count), found, v.constant(float("-inf")))
            return [v.maximum(top, found)]

        def weigh(index: Value, count: Value | None, sums: Value) -> list[Value]:
            weight = exponential(v, v.subtract(v.read(at(index), count), top))
            v.write(weight, at(index), count)
            return [v.add(sums, weight if count is None else v.keep(v.first(count), weight))]

        (tops,) = v.over(length, [v.constant(float("-inf"))], larger)
        top = v.broadcast(v.largest(tops))
        (sums,) = v.over(length, [v.constant(0.0)], weigh)
        v.store(v.sum(sums), total)

    return VectorFunction("attention_softmax", ("scores", "length", "total"), body)


def weighted_sums(head: Head, rows: int, isa: Isa) -> VectorFunction:
    """weighted_sums(weights, weights_row_bytes, v, count, sums, soon): add `count` weighted values to rows of sums.

    Sums are the float32 vectors of each row, one row after another. Prefetches as many values at `soon`.
    """
    parts = _parts(head, _registers(isa) // rows)

    def body(
        v: VectorBuilder, weights: Value, stride: Value, values: Value, count: Value, sums: Value, soon: Value
    ) -> None:
        starts = [weights]
        for _ in range(rows - 1):
            starts.append(v.builder.add(starts[-1], stride))
        for part in parts:
            places = [
                64 * (row * head.vectors + index + i)
                for index, _, elements in part
                for i in range(2 if elements == 32 else 1)
                for row in range(rows)
            ]
            step = functools.partial(position, part)
            chains = [v.load(sums, place) for place in places]
            found = v.repeat(count, [values, soon, *starts, *chains], functools.partial(step, v))[2 + rows :]
            for place, chain in zip(places, found, strict=True):
                v.store(chain, sums, place)

    def position(
        part: list[tuple[int, int, int]], v: VectorBuilder, values: Value, soon: Value, *carried: Value
    ) -> list[Value]:
        starts, chains, following = carried[:rows], iter(carried[rows:]), []
        if part is parts[0]:
            for line in range(0, head.row_bytes, 64):
                v.prefetch(soon, line)
        factors = [v.broadcast(v.load(start, kind=FLOAT)) for start in starts]
        for piece in part:
            for value in head.load(v, values, piece):
                following += [v.fma(factor, value, next(chains)) for factor in factors]
        moved = [v.plus(address, head.row_bytes) for address in (values, soon)]
        return [*moved, *(v.plus(start, 4) for start in starts), *following]

    parameters = ("weights", "weights_row_bytes", "v", "count", "sums", "soon")
    return VectorFunction(f"attention_weighted_sums_{rows}", parameters, body)


def _parts(head: Head, most: int) -> list[list[tuple[int, int, int]]]:
    """The pieces of a head in parts of at most `most` vectors, or of one piece."""
    parts: list[list[tuple[int, int, int]]] = []
    room = 0
    for piece in head.pieces():
        needs = 2 if piece[2] == 32 else 1
        if needs > room:
            parts.append([])
            room = max(most, needs)
        parts[-1].append(piece)
        room -= needs
    return parts


def _registers(isa: Isa) -> int:
    """How many vectors of sums the registers of an instruction set hold beside what is multiplied."""
    return 24 if isa.has("avx512f") else 5


def tile_rows(isa: Isa) -> int:
    """The rows that share the keys and values which are loaded."""
    return 4 if isa.has("avx512f") else 2


def finish(head: Head) -> VectorFunction:
    """finish(sums, total, out): the sums of one row divided by the float32 at `total`, in the type of the head."""

    def body(v: VectorBuilder, sums: Value, total: Value, out: Value) -> None:
        divisor = v.broadcast(v.load(total, kind=FLOAT))
        for piece in head.pieces():
            index, _, elements = piece
            found = [v.load(sums, 64 * (index + i)) for i in range(2 if elements == 32 else 1)]
            head.store(v, [v.divide(each, divisor) for each in found], out, piece)

    return VectorFunction("attention_finish", ("sums", "total", "out"), body)


def functions(head: Head, isa: Isa) -> dict[str, Any]:
    """All of them for compiled code, by what they compute; those for `tile_rows` rows end in `_of_tile`."""
    rows = tile_rows(isa)
    made = {
        "query": query(head),
        "score": score(head),
        "scores": scores(head, 1, isa),
        "scores_of_tile": scores(head, rows, isa),
        "softmax": softmax(),
        "weighted_sums": weighted_sums(head, 1, isa),
        "weighted_sums_of_tile": weighted_sums(head, rows, isa),
        "finish": finish(head),
    }
    return {name: function.intrinsic() for name, function in made.items()}

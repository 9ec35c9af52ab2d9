"""Top-k and top-p for compiled code, without sorting.

They need no order among the logits, only the least one that is kept. A logit's bits, as an unsigned integer in the
order of the numbers, are its key. The least key is found DIGIT bits at a time: the count (top-k) or the weight (top-p)
of all keys with the same digit is summed, and the digit at which the sum is reached is chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Weights of a block that are summed together, in this many partial sums.
BLOCK, LANES = 512, 8
#: Bits of a key that are looked at together: three times 11 bits, the last time 10.
DIGIT = 11
BUCKETS = 2**DIGIT


def block_sums() -> Any:
    """Build block_sum(weights, start), the sum of one block, and sum_all(weights, width), which adds up the blocks."""
    import numba

    @numba.njit(error_model="numpy")
    def block_sum(weights: Any, start: int) -> Any:
        a = b = c = d = e = f = g = h = 0.0
        for i in range(start, start + BLOCK, LANES):
            a, b, c, d = a + weights[i], b + weights[i + 1], c + weights[i + 2], d + weights[i + 3]
            e, f, g, h = e + weights[i + 4], f + weights[i + 5], g + weights[i + 6], h + weights[i + 7]
        return ((a + e) + (c + g)) + ((b + f) + (d + h))

    @numba.njit(error_model="numpy")
    def sum_all(weights: Any, width: int) -> Any:
        total = 0.0
        for start in range(0, width, BLOCK):
            total += block_sum(weights, start)
        return total

    return block_sum, sum_all


def least_key() -> Any:
    """Build find_least; see its docstring."""
    import numba

    @numba.njit(error_model="numpy")
    def digit_reached(buckets: Any, size: int, above: Any, limit: Any) -> Any:
        """The bucket at which the sum from the largest one on, and `above`, reaches `limit`; and the sum before it."""
        bucket = size - 1
        while bucket > 0 and above + buckets[bucket] < limit:
            above += buckets[bucket]
            bucket -= 1
        return bucket, above

    @numba.njit(error_model="numpy")
    def find_least(keys: Any, ids: Any, width: int, weights: Any, buckets: Any, limit: Any, count: bool) -> Any:
        """The least key that is kept if keys are taken from the largest on until their sum reaches `limit`.

        What is summed is 1 for each key if `count`, else its weight. Also returns the sum of all larger keys. The
        memory at `ids` is overwritten with the tokens whose keys begin with the digits found so far.
        """
        for bucket in range(BUCKETS):
            buckets[bucket] = 0.0
        for i in range(width):
            buckets[keys[i] >> np.uint32(21)] += 1.0 if count else weights[i]
        found, above = digit_reached(buckets, BUCKETS, 0.0, limit)
        least, left = np.uint32(found) << np.uint32(21), 0
        for i in range(width):
            ids[left] = i
            left += (keys[i] >> np.uint32(21)) == np.uint32(found)
        for shift, size in ((10, BUCKETS), (0, BUCKETS // 2)):
            for bucket in range(size):
                buckets[bucket] = 0.0
            for n in range(left):
                i = ids[n]
                buckets[(keys[i] >> np.uint32(shift)) & np.uint32(size - 1)] += 1.0 if count else weights[i]
            found, above = digit_reached(buckets, size, above, limit)
            least |= np.uint32(found) << np.uint32(shift)
            held, left = left, 0
            for n in range(held):
                i = ids[n]
                ids[left] = i
                left += ((keys[i] >> np.uint32(shift)) & np.uint32(size - 1)) == np.uint32(found)
        return least, above

    return find_least


def filters(sum_all: Any) -> Any:
    """Build keep_top_k and keep_top_p, which set the weights of all other tokens to 0."""
    import numba

    find_least = least_key()

    @numba.njit(error_model="numpy")
    def keep_top_k(keys: Any, ids: Any, width: int, weights: Any, buckets: Any, k: int) -> None:
        """Set the weights of all but the k largest logits, and ties with the k-th, to 0."""
        least, _ = find_least(keys, ids, width, weights, buckets, np.float64(k), True)
        for i in range(width):
            weights[i] = weights[i] if keys[i] >= least else 0.0

    @numba.njit(error_model="numpy")
    def keep_top_p(keys: Any, ids: Any, width: int, weights: Any, buckets: Any, p: Any) -> None:
        """Set all weights to 0 but those of the fewest most likely tokens that reach p; of equal ones the first."""
        limit = p * sum_all(weights, width)
        least, above = find_least(keys, ids, width, weights, buckets, limit, False)
        for i in range(width):
            if keys[i] == least and above < limit:
                above += weights[i]
            elif keys[i] <= least:
                weights[i] = 0.0

    return keep_top_k, keep_top_p

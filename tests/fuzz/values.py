"""Untrusted values: of the wrong type, too many, too deep, too large, or invalid Unicode."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

#: Characters that programs treat badly: halves of surrogate pairs, NUL, ends of lines, marks of direction, marks
#: without width, the last code points, and what templates and shells read.
HOSTILE = (
    "\ud800", "\ud83d", "\udbff", "\udc80", "\udfff", "\0", "\x1b", "\x7f", "\x85", "\u2028", "\u2029", "\u200b",
    "\u200f", "\u202e", "\u2066", "\u2069", "\ufeff", "\ufffd", "\ufffe", "\U0010ffff", "\U0001f600", "e\u0301", "%00",
    "%ff", "\r\n", "\\", "\"", "/", "..",
)  # fmt: skip
HOSTILE_TEXT = st.lists(st.sampled_from(HOSTILE) | st.sampled_from("ab"), min_size=1, max_size=6).map("".join)
#: Any code points, including lone surrogates, and often those of `HOSTILE`.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20) | HOSTILE_TEXT


def nested(depth: int, leaf: Any, key: str | None) -> Any:
    """A value in `depth` lists, or objects of one key."""
    for _ in range(depth):
        leaf = [leaf] if key is None else {key: leaf}
    return leaf


def repeated(unit: Any, count: int) -> Any:
    """A long text, or a long list."""
    return unit * count


#: json.loads fails at a depth near Python's recursion limit of 1,000; these depths still pass.
DEEP = st.builds(
    nested, st.sampled_from([2, 30, 300, 900]), st.sampled_from([0, "x", None]), st.sampled_from([None, "a"])
)
GIANT = st.one_of(
    st.builds(repeated, st.text(min_size=1, max_size=3), st.sampled_from([100, 5_000, 70_000, 500_000])),
    st.builds(
        repeated, st.sampled_from([" ", "a", "\n", "\u00e9", "\U0001f600", "a "]), st.sampled_from([16_000, 65_536])
    ),
    st.builds(
        repeated,
        st.lists(st.sampled_from([0, 5, -1, "a", None, 1.5]), min_size=1, max_size=3),
        st.sampled_from([10, 1_000, 20_000, 200_000]),
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 130),
    st.sampled_from([2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400, -(10**4000)]),
    st.floats(),
    st.sampled_from([0.0, 1.0, 1e-7, 1e308, float("inf"), float("-inf"), float("nan")]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, ANY_TEXT)

#: Any value that json.loads can return.
JSON = st.one_of(
    SCALARS,
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4), max_leaves=6
    ),
    DEEP,
    GIANT,
)


def objects(good: dict[str, st.SearchStrategy[Any]], needed: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of the fields of `good`: most of them valid, some arbitrary, some with unknown fields."""
    invalid = st.dictionaries(st.sampled_from(sorted(good)), JSON, max_size=2)
    unknown = st.dictionaries(
        ANY_TEXT | st.builds(repeated, st.just("max_token"), st.sampled_from([1, 9, 90_000])), JSON, max_size=1
    )
    right = st.fixed_dictionaries(
        {name: good[name] for name in needed}, optional={name: good[name] for name in good if name not in needed}
    )
    return st.one_of(
        right,
        st.builds(lambda *parts: {k: v for part in parts for k, v in part.items()}, right, invalid),
        st.builds(lambda *parts: {k: v for part in parts for k, v in part.items()}, right, invalid, unknown),
    )

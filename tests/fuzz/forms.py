"""Fuzz target: forms of texts (`structured_outputs`), as clients read them and as workers compile them."""

from __future__ import annotations

import functools
from typing import Any

import tiktoken
from hypothesis import strategies as st

from headrace.client.jobs.request_checks import check_request
from headrace.client.wire.constraints import KINDS
from headrace.client.wire.errors import InvalidRequest, JobFailed
from headrace.client.wire.requests import parse_request
from headrace.model.tokenizer import END_OF_TEXT, PATTERN, TiktokenTokenizer
from headrace.worker.engine.grammars import Grammars
from tests.fuzz.harness import Target, check_message
from tests.fuzz.values import ANY_TEXT, JSON, objects

#: Forms that are compiled quickly, with some that no text has, or that are long.
FORMS = st.sampled_from(
    [
        {"choice": ["a", "ab", ""]},
        {"choice": ["x" * 40]},
        {"regex": "[a-c]+"},
        {"regex": "(a|b){3}\\d?"},
        {"regex": "long enough"},
        {"regex": "é|東"},
        {"regex": "(.*a.{30})|(.*b.{31})"},
        {"json": {"type": "integer", "minimum": 0, "maximum": 99}},
        {"json": '{"enum": ["a", 5, null]}'},
        {"json_object": True},
        {"grammar": 'start: "a" | "b" start'},
    ]
)
WORDS = st.sampled_from(["a", "b", "é", "\U0001f600", "\0", " ", "\n", "\\d", "\\", "/", '"', ":", "start", "x"])
MARKS = st.sampled_from(
    [*"()[]{}|*+?^$.,-&~<!=:", "{2}", "{9,}", "{0,1000}", "{99999999999}", "(?i)", "(?=", "\\1", "\\b", "[^", "start: "]
)
PIECES = st.lists(WORDS | MARKS, max_size=12).map("".join)
NAMES = (
    "type properties required items prefixItems enum const anyOf allOf oneOf not $ref $defs pattern format minLength "
    "maxLength minimum exclusiveMaximum multipleOf minItems maxItems additionalProperties patternProperties "
    "uniqueItems x-guidance %json"
)
KEYWORDS = st.sampled_from(NAMES.split())
TYPES = st.sampled_from(["string", "integer", "number", "object", "array", "null", "boolean"])
SCHEMAS = st.recursive(
    TYPES | st.integers(-2, 9) | PIECES | st.sampled_from([1e300, 10**30, 0.001, "#", "#/$defs/a", "http://a"]) | JSON,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYWORDS | st.just("a"), inner, max_size=3)
        | st.tuples(TYPES, st.dictionaries(KEYWORDS, inner, max_size=3)).map(lambda of: {"type": of[0], **of[1]})
    ),
    max_leaves=6,
)
VALUES = objects(
    {
        "choice": st.lists(ANY_TEXT, max_size=4),
        "regex": PIECES,
        "json": SCHEMAS,
        "json_object": st.booleans(),
        "grammar": st.lists(PIECES, max_size=4).map("\n".join),
    }
)
ONE = st.one_of(
    st.builds(lambda value: {"regex": value}, PIECES),
    st.builds(lambda value: {"json": value}, SCHEMAS),
    st.builds(lambda lines: {"grammar": "start: " + "\n".join(lines)}, st.lists(PIECES, min_size=1, max_size=4)),
)


@functools.cache
def byte_tokenizer() -> TiktokenTokenizer:
    """A token for each byte, and one that ends a text."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    return TiktokenTokenizer(encoding)


@functools.cache
def _grammars() -> Grammars:
    return Grammars(byte_tokenizer(), 257)


def check_form(form: Any) -> None:
    """A form is refused by the name of its entry, or a worker compiles it or fails its job with a code."""
    try:
        request = parse_request({"prompt": "x", "structured_outputs": form})
        check_request(request, 2**20)
    except InvalidRequest as error:
        check_message(str(error), error.field)
        assert error.field.startswith("structured_outputs"), error.field
        return
    if request.structured_outputs is None:
        return
    try:
        grammar = _grammars().get(request.structured_outputs)
    except JobFailed as error:
        assert error.code in ("invalid_request", "grammar_too_complex"), repr(error)
        check_message(str(error), *(f"structured_outputs.{kind}: " for kind in KINDS))
        return
    assert not grammar.matcher().is_error()


TARGETS = [Target("form", ONE | FORMS | VALUES | JSON, check_form, full_cases=6_000)]

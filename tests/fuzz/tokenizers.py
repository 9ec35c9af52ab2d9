"""Tokenizer files that others write: read, or refused by name."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from headrace.model import ModelError, load_tokenizer
from headrace.model.tokenizer import END_OF_TEXT, byte_alphabet
from headrace.model.tokenizers.library import LibraryTokenizer
from tests.fuzz.files import folder
from tests.fuzz.harness import Target, check_message
from tests.fuzz.values import ANY_TEXT, JSON, objects

BYTES = byte_alphabet()
TOKENS = st.sampled_from(["ab", "bc", "abc", "Ġa", END_OF_TEXT, "a", "ð", "\ud800", "", " ", "a b", "é"]) | ANY_TEXT
VOCABULARY = {char: i for i, char in enumerate(BYTES)} | {"ab": 256, "abc": 257}
VOCABULARIES = st.one_of(
    st.just(VOCABULARY),
    st.dictionaries(TOKENS, st.integers(255, 262) | JSON, max_size=4).map(lambda more: {**VOCABULARY, **more}),
    st.dictionaries(TOKENS, st.integers(258, 262) | st.sampled_from([2**31 - 1, 2**31, 2**40]), max_size=4).map(
        lambda more: {**VOCABULARY, **more}
    ),
    st.sampled_from([3, 20_000]).map(lambda n: {**VOCABULARY, **{f"<{i}>": 258 + i for i in range(n)}}),
    JSON,
)
MERGES = st.lists(
    st.sampled_from(
        ["a b", "ab c", "b c", "a bc", "c ab", "ab ab", "#version: 0.2", "", "a", "a b c", " ", "é x", "\ud800 a"]
    )
    | ANY_TEXT,
    max_size=5,
) | st.just(["a b", "ab c"])
ADDED = st.none() | JSON | st.lists(objects({"content": TOKENS, "id": st.integers(250, 270) | JSON}), max_size=3)
STEPS = {
    "normalizer": [
        {"type": "Lowercase"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""},
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Sequence", "normalizers": []},
    ],
    "pre_tokenizer": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    ],
    "post_processor": [
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [2**31], "tokens": ["<s>"]}},
        },
    ],
    "decoder": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": "a", "start": 9, "stop": 9},
        {"type": "BPEDecoder", "suffix": "b"},
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": "a", "start": 1, "stop": 2}]},
        {
            "type": "Sequence",
            "decoders": [{"type": "ByteFallback"}, {"type": "WordPiece", "prefix": "b", "cleanup": True}],
        },
        {"type": "Replace", "pattern": {"Regex": "a|"}, "content": "x"},
    ],
    "truncation": [{"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}],
    "padding": [
        {
            "strategy": {"Fixed": 2**40},
            "direction": "Left",
            "pad_to_multiple_of": 2**20,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        }
    ],
}
STEP_VALUES = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in STEPS.items()})
MODELS = st.one_of(
    st.just({"type": "BPE", "vocab": VOCABULARY, "merges": ["a b"]}),
    st.builds(
        lambda dropout, unk, fallback: {
            "type": "BPE",
            "vocab": {"a": 0, "<0xE2>": 1, "<0x82>": 2, "b": 3, "ab": 4},
            "merges": [["a", "b"]],
            "dropout": dropout,
            "unk_token": unk,
            "byte_fallback": fallback,
        },
        st.sampled_from([None, 0.5, 2, "x"]),
        st.sampled_from([None, "a", "absent"]),
        st.booleans(),
    ),
    st.builds(
        lambda unk, score: {"type": "Unigram", "unk_id": unk, "vocab": [["a", 0.0], ["b", score], ["▁", -1.0]]},
        st.sampled_from([None, 0, 2, 9]),
        st.sampled_from([0.0, -1e308, "x"]),
    ),
    st.builds(
        lambda unk, longest: {
            "type": "WordPiece",
            "unk_token": unk,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": longest,
            "vocab": {"a": 0, "##a": 1, "b": 2},
        },
        st.sampled_from(["a", "absent"]),
        st.sampled_from([0, 100, 2**70]),
    ),
    st.just({"type": "WordLevel", "unk_token": "absent", "vocab": {"a": 0}}),
    JSON,
)
NAMED_TOKENS = st.dictionaries(
    st.sampled_from(["bos_token", "eos_token", "pad_token", "additional_special_tokens", "extra_special_tokens"]),
    TOKENS | objects({"content": TOKENS}) | JSON,
    max_size=3,
)
BESIDE = st.fixed_dictionaries(
    {},
    optional={
        "added_tokens.json": st.dictionaries(TOKENS, st.integers(250, 270) | JSON, max_size=3) | JSON,
        "special_tokens_map.json": NAMED_TOKENS | JSON,
        "tokenizer_config.json": st.builds(
            lambda *parts: {name: value for part in parts for name, value in part.items()},
            NAMED_TOKENS | TOKENS.map(lambda text: {"bos_token": text, "add_bos_token": True}),
            st.dictionaries(
                st.sampled_from(["add_bos_token", "add_prefix_space", "chat_template", "tokenizer_class"]),
                st.booleans() | JSON,
                max_size=2,
            ),
            st.just({})
            | st.dictionaries(
                st.just("added_tokens_decoder"),
                st.dictionaries(st.sampled_from(["258", "0", "x", "9" * 30]), objects({"content": TOKENS}) | JSON),
            ),
        )
        | JSON,
        "config.json": st.dictionaries(st.sampled_from(["model_type", "vocab_size", "tokenizer_class"]), JSON),
    },
)


def tokenizer_json(model: Any, added: Any, **fields: Any) -> dict[str, bytes]:
    """The files of a directory with a tokenizer.json."""
    return {"tokenizer.json": json.dumps({"model": model, "added_tokens": added, **fields}).encode()}


VOCABULARY_FILES = st.one_of(
    st.tuples(VOCABULARIES, MERGES).map(
        lambda v: {
            "vocab.json": json.dumps(v[0]).encode(),
            "merges.txt": "\n".join(v[1]).encode(errors="surrogatepass"),
        }
    ),
    st.tuples(st.binary(max_size=20) | st.just(b"[" * 100_000), st.binary(max_size=20)).map(
        lambda v: {"vocab.json": v[0], "merges.txt": v[1]}
    ),
    st.tuples(
        VOCABULARIES, MERGES.map(lambda m: [x.split(" ") for x in m]) | MERGES | st.lists(JSON, max_size=3), ADDED
    ).map(lambda v: tokenizer_json({"type": "BPE", "vocab": v[0], "merges": v[1]}, v[2])),
    st.tuples(MODELS, ADDED, st.dictionaries(st.sampled_from(sorted(STEPS)), JSON, max_size=2), STEP_VALUES).map(
        lambda v: tokenizer_json(v[0], v[1], **{**v[2], **v[3]})
    ),
    st.tuples(VOCABULARIES, BESIDE).map(
        lambda v: {
            "vocab.json": json.dumps(v[0]).encode(),
            "merges.txt": b"\xef\xbb\xbf#version: 0.2\r\na b\r\n",
            **{name: json.dumps(value).encode() for name, value in v[1].items()},
        }
    ),
    st.tuples(st.lists(TOKENS, max_size=5), NAMED_TOKENS, st.booleans()).map(
        lambda v: {
            "vocab.txt": "\n".join([*v[0], "a", "##b", "[UNK]"]).encode(errors="surrogatepass"),
            "tokenizer_config.json": json.dumps(
                {"tokenizer_class": "BertTokenizer", "do_lower_case": v[2], **v[1]}
            ).encode(),
        }
    ),
    JSON.map(lambda v: {"tokenizer.json": json.dumps(v).encode()}),
)
SAMPLES = ("", "abc abcab", " \u00e9\U0001f600 <1>", "a" * 300 + " " * 300)


def check_vocabulary(files: dict[str, bytes]) -> None:
    """A vocabulary encodes and decodes, or is refused with a ModelError that names its directory.

    The text of tokens that arrive one at a time is that of all tokens.
    """
    with folder(files) as path:
        try:
            tokenizer = load_tokenizer(path)
        except ModelError as error:
            check_message(str(error), str(path))
            return
        for text in SAMPLES:
            try:
                ids = tokenizer.encode(text)
            except (ModelError, ValueError) as error:
                check_message(str(error), "tokenizer")
                continue
            assert all(token >= 0 for token in ids)
            for skip in (False, True):
                decoder = tokenizer.decoder(skip_special_tokens=skip)
                pieces = [decoder.push(token) for token in ids]
                whole = "".join(pieces) + decoder.flush()
                whole.encode()
                if isinstance(tokenizer, LibraryTokenizer) and all(token < tokenizer.vocab_size for token in ids):
                    assert whole == tokenizer.reference_text(ids, skip_special_tokens=skip)
        assert len({tokenizer.token_name(token) for token in range(300)}) == 300


TARGETS = [Target("vocabulary", VOCABULARY_FILES, check_vocabulary, full_cases=6_000, test_cases=40)]

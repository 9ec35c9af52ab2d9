"""Tokenizers of many kinds, made small: as tokenizer.json, and as vocab.json with the files beside it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Peer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordLevelTrainer, WordPieceTrainer

from headrace.model.tokenizer import END_OF_TEXT
from tests.unit.model.strings import SENTENCES

CORPUS = [*SENTENCES, "the king and the queen of the old castle", "hello hello hell the Therefore"] * 3
SPECIALS = [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]


def written(folder: Path, name: str, value: Any) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    (folder / name).write_text(text, encoding="utf-8", newline="")


@functools.cache
def trained() -> str:
    """A byte-level BPE, as tokenizer.json."""
    made = Peer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made.to_str()


def byte_level(change: Callable[[Peer], object] = lambda made: None) -> Peer:
    made = Peer.from_str(trained())
    change(made)
    return made


def raw_changed(**fields: Any) -> Peer:
    raw = json.loads(trained())
    raw["model"] |= fields
    return Peer.from_str(json.dumps(raw))


def added(made: Peer) -> None:
    made.add_special_tokens(SPECIALS)
    made.add_tokens(
        [
            AddedToken("<tool>", lstrip=True, rstrip=True),
            AddedToken("hell", single_word=True),
            AddedToken("the"),
            AddedToken("é"),
            AddedToken(" the"),
        ]
    )


def pipeline(made: Peer) -> None:
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|."), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    )
    added(made)
    ids = [(token, made.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")]
    made.post_processor = processors.TemplateProcessing("<|im_start|> $A <|im_end|>", None, ids)


def llama() -> Peer:
    made = Peer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(CORPUS[:2], BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False))
    raw = json.loads(made.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]  # the bytes are ordinary tokens
    return Peer.from_str(json.dumps(raw))


def unigram() -> Peer:
    made = Peer(Unigram())
    made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def word_piece() -> Peer:
    made = Peer(WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(CORPUS, WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    ids = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ids)
    return made


def word_level() -> Peer:
    made = Peer(WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(CORPUS, WordLevelTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False))
    return made


JSON_FILES: dict[str, Callable[[], Peer]] = {
    "byte_level": byte_level,
    "added_tokens": lambda: byte_level(added),
    "pipeline": lambda: byte_level(pipeline),
    "ignore_merges": lambda: raw_changed(ignore_merges=True),
    "llama": llama,
    "unigram": unigram,
    "word_piece": word_piece,
    "word_level": word_level,
}


def two_files(folder: Path, *, line: str = "\n", start: str = "#version: 0.2\n", **files: Any) -> None:
    """vocab.json and merges.txt, with other files beside them."""
    model = json.loads(trained())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    written(folder, "vocab.json", model["vocab"])
    written(folder, "merges.txt", (start + "".join(f"{merge}\n" for merge in merges)).replace("\n", line))
    for name, value in files.items():
        written(folder, f"{name}.json", value)


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": content, **plain, **flags}


LEGACY = {
    "added_tokens": {"<|im_start|>": 500, "<tool>": 501, "the": 502, "hell": 503},
    "special_tokens_map": {
        "eos_token": "<|im_end|>",
        "pad_token": token("<pad>", lstrip=True),
        "additional_special_tokens": ["<|im_start|>", "<s>"],
    },
}
NEWER = {
    "tokenizer_config": {
        "added_tokens_decoder": {
            "500": token("<|im_start|>", special=True),
            "501": token("<tool>", rstrip=True),
            "502": token("<|im_end|>", special=True, lstrip=True),
        },
        "eos_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": True,
        "errors": "replace",
    },
    "added_tokens": {"ignored": 700},
}
TWO_FILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "crlf": {"line": "\r\n"},
    "legacy": LEGACY,
    "newer": NEWER,
    "ends": {"tokenizer_config": {"add_bos_token": True, "bos_token": "<s>", "unk_token": None, "pad_token": "<pad>"}},
    "prefix": {"tokenizer_config": {"add_prefix_space": True, "additional_special_tokens": ["</s>", "the"]}},
    "extra": {"tokenizer_config": {"extra_special_tokens": {"image_token": "<tool>"}, "tool_token": "[MASK]"}},
}


VOCAB_TXT: dict[str, dict[str, Any]] = {
    "bert": {},
    "bert_cased": {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    "bert_ends": {"pad_token": "<pad>", "sep_token": "<sep>", "additional_special_tokens": ["<tool>"]},
}


def vocab_txt(folder: Path, settings: dict[str, Any]) -> None:
    """vocab.txt, as Chinese GPT-2 models bring it."""
    vocabulary = word_piece().get_vocab()
    written(folder, "vocab.txt", "".join(f"{text}\n" for text in sorted(vocabulary, key=vocabulary.__getitem__)))
    written(folder, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **settings})

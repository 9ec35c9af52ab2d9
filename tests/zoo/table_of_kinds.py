"""The zoo's table: tokenizers of other kinds than GPT-2's, and directories without one that can be computed."""

from __future__ import annotations

from pathlib import Path

from tests.zoo import vocabularies, weights
from tests.zoo.entry import Entry
from tests.zoo.table_of_tokenizers import of_json, of_merges
from tests.zoo.vocabularies import write_json


def word_piece_list(folder: Path) -> None:
    """vocab.txt and a tokenizer_class, as Chinese GPT-2 models have them, and no tokenizer.json."""
    made = vocabularies.word_piece()
    tokens = ["[PAD]", "[CLS]", "[MASK]", *sorted(made.get_vocab(), key=made.get_vocab().__getitem__)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    weights.gpt2(folder, len(tokens))


def without_merges(folder: Path) -> None:
    of_merges(folder)
    (folder / "merges.txt").unlink()


def sentence_piece(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    weights.gpt2(folder, 320)


KINDS = (
    Entry(
        "unigram",
        lambda f: of_json(f, vocabularies.unigram(), eos_token="</s>", bos_token=None),
        "Unigram with Metaspace",
        prompts=("  two  spaces", "☃ snow"),
        quick=True,
    ),
    Entry(
        "word-piece",
        lambda f: of_json(f, vocabularies.word_piece(), eos_token="[SEP]", bos_token=None),
        "WordPiece",
        prompts=("UPPER, lower!", "☃ snow"),
    ),
    Entry(
        "word-level",
        lambda f: of_json(f, vocabularies.word_level(), eos_token="</s>", bos_token=None),
        "WordLevel",
        prompts=("the unknown river",),
    ),
    Entry(
        "byte-fallback",
        lambda f: of_json(f, vocabularies.with_bytes(), eos_token="</s>", bos_token="<s>"),
        "SentencePiece's BPE with bytes for unknown characters",
        prompts=("☃ snow", " two  spaces", "Ça coule"),
    ),
    Entry("vocab-txt", word_piece_list, "vocab.txt of BertTokenizer, without tokenizer.json"),
    Entry("without-merges", without_merges, "vocab.json without merges.txt", text_refused=r"vocab\.json", quick=True),
    Entry("sentence-piece", lambda f: sentence_piece(f, "spiece.model"), "spiece.model", text_refused=r"spiece\.model"),
    Entry(
        "tokenizer-model",
        lambda f: sentence_piece(f, "tokenizer.model"),
        "tokenizer.model",
        text_refused=r"tokenizer\.model",
    ),
    Entry("no-tokenizer", lambda f: weights.gpt2(f, 320), "no file of a tokenizer", text_refused=r"tokenizer"),
)

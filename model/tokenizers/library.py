"""Any tokenizer that Hugging Face's tokenizers computes: it is the library that wrote its files."""

from __future__ import annotations

import json
import threading

import tokenizers

from headrace.model.hub import shorten
from headrace.model.tokenizers.base import ID_NAME, Described, IncrementalDecoder, Tokenizer
from headrace.model.tokenizers.gpt2 import byte_alphabet
from headrace.model.tokenizers.pieces import Chain, PieceDecoder, is_byte_level


class LibraryTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's library.

    Args:
        library: whose truncation and padding are off.
        digest: SHA-256 of what it was made of.
        described: what the files say about it.
        parses_special_tokens: the default of `encode`.

    Raises:
        ValueError: its decoder cannot be computed a token at a time.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, digest: str, described: Described, *, parses_special_tokens: bool = True
    ) -> None:
        super().__init__(described)
        self.digest = digest
        self._library = library
        self._lock = threading.Lock()  # the library cannot encode while another thread changes its setting
        added = library.get_added_tokens_decoder()
        self._tokens = {i: text for text, i in library.get_vocab(with_added_tokens=False).items()}
        # Not their `content`: a normalizer changes an added token with `normalized`, also in what is decoded.
        self._tokens |= {i: library.id_to_token(i) or token.content for i, token in added.items()}
        self.vocab_size = max(self._tokens, default=-1) + 1
        self.added_tokens = len(added)
        # By their text, as the library skips them: a special token that a normalizer changes is not skipped.
        special = {token.content for token in added.values() if token.special}
        self.special_ids = frozenset(i for i, text in self._tokens.items() if text in special)
        self.parses_special_tokens = parses_special_tokens
        self.bos_token_id, self.eos_token_id = self._named("bos_token"), self._named("eos_token")
        # The library's `to_str` would hold a number for each hole between the ids, which a hostile file makes huge.
        decoder = None if library.decoder is None else json.loads(library.decoder.__getstate__())
        self._chain = None if is_byte_level(decoder) else Chain(decoder)
        self._to_byte = {ord(char): byte for byte, char in enumerate(byte_alphabet())}
        self._bytes: dict[int, bytes] = {}
        self._names_taken: dict[str, int] = {}
        kind = type(library.model).__name__
        self.kind = f"byte-level {kind}" if self._chain is None else kind

    def _named(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._library.token_to_id(text)

    def _encode(self, text: str, parse: bool, add: bool) -> list[int]:
        with self._lock:
            if self._library.encode_special_tokens is parse:
                self._library.encode_special_tokens = not parse
            try:
                return list(self._library.encode(text, add_special_tokens=add).ids)
            except BaseException as error:
                raise _as_value_error(error) from None

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token inside a text. Raises ValueError for an id that is not a token."""
        if (data := self._bytes.get(token_id)) is None:
            data = self._bytes[token_id] = self.piece(token_id, False)
        return data

    def piece(self, token_id: int, first: bool) -> bytes:
        """The bytes of one token. Raises ValueError for an id that is not a token."""
        if (token := self._tokens.get(token_id)) is None:
            raise ValueError(f"{token_id} is not a token id of this vocabulary of {self.vocab_size}")
        if self._chain is not None:
            return self._chain.bytes_of(token, first)
        try:
            return token.translate(self._to_byte).encode("latin-1") if self._is_bytes(token) else token.encode()
        except UnicodeEncodeError:
            return b""

    def _is_bytes(self, token: str) -> bool:
        return all(ord(char) in self._to_byte for char in token)

    def known_piece(self, token_id: int, first: bool) -> bytes:
        if first and self._chain is not None and token_id in self._tokens:
            return self.piece(token_id, True)
        return self.known_bytes(token_id)

    def decoder(
        self, rest: bytes = b"", *, skip_special_tokens: bool = False, inside: bool = False
    ) -> IncrementalDecoder:
        """A decoder for tokens that arrive one at a time."""
        if self._chain is None:
            return super().decoder(rest, skip_special_tokens=skip_special_tokens, inside=inside)
        return _Pieces(self, self._tokens, PieceDecoder(self._chain, inside=inside), skip=skip_special_tokens)

    def reference_text(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids as the library itself decodes them. Raises ValueError if it cannot."""
        try:
            return str(self._library.decode(token_ids, skip_special_tokens=skip_special_tokens))
        except BaseException as error:
            raise _as_value_error(error) from None

    def _name(self, token_id: int) -> str:
        """A name that no other token has: the id, if a token before it has the same text."""
        if not self._names_taken:
            for i in sorted(self._tokens, reverse=True):
                self._names_taken[super()._name(i)] = i
        name = super()._name(token_id)
        return name if self._names_taken.get(name, token_id) == token_id else f"{ID_NAME}{token_id}"


class _Pieces(IncrementalDecoder):
    """An incremental decoder whose text comes from a chain of steps instead of bytes."""

    def __init__(self, tokenizer: Tokenizer, tokens: dict[int, str], decoder: PieceDecoder, *, skip: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens=skip)
        self._tokens, self._pieces = tokens, decoder

    @property
    def rest(self) -> bytes:
        """No token after these continues a character of theirs."""
        return b""

    def push(self, token_id: int) -> str:
        """The text that this token completes. An id beyond the vocabulary (of a padded embedding) adds nothing."""
        if token_id in self._skipped or (token := self._tokens.get(token_id)) is None:
            return ""
        return self._pieces.push(token)

    def flush(self) -> str:
        """The text that was held back, called at the end."""
        return self._pieces.flush()


def _as_value_error(error: BaseException) -> BaseException:
    """An error of the library; its panics are no subclass of Exception."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return ValueError(f"the model's tokenizer cannot encode the text ({shorten(str(error))})")
    return error

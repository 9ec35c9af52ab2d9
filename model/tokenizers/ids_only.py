"""A model whose tokenizer cannot be computed: prompts and results are token ids."""

from __future__ import annotations

import hashlib

from headrace.model.tokenizers.base import Described, NoTokenizer, Tokenizer


class TokenIdsOnly(Tokenizer):
    """No text: `encode` raises NoTokenizer, and every decoded text is empty.

    Args:
        reason: names the file and the way out.
        described: what the other files say.
    """

    kind = "none (token ids only)"
    vocab_size = added_tokens = 0
    special_ids = frozenset[int]()
    parses_special_tokens = False
    bos_token_id = eos_token_id = None

    def __init__(self, reason: str, described: Described | None = None) -> None:
        described = described or Described()
        super().__init__(Described(described.special_tokens, described.chat_template, (*described.notes, reason)))
        self.reason = reason
        self.digest = hashlib.sha256(b"none").hexdigest()

    def _encode(self, text: str, parse: bool, add: bool) -> list[int]:  # noqa: ARG002
        raise NoTokenizer(self.reason)

    def decode(self, token_ids: object, *, skip_special_tokens: bool = False) -> str:  # noqa: ARG002
        """The empty text."""
        return ""

    def token_bytes(self, token_id: int) -> bytes:
        """Raises ValueError: no token has a text."""
        raise ValueError(f"the text of token id {token_id} is not known: {self.reason}")

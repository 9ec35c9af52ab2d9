"""What the files beside a vocabulary say about it."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.model.tokenizers.base import Described, Tokenizer
from headrace.model.tokenizers.files import GPT2_DEFAULTS, Files, content
from headrace.model.tokenizers.gpt2 import own_tokenizer


def describe(files: Files, *, default: Mapping[str, str], notes: tuple[str, ...] = ()) -> Described:
    """What the files beside a vocabulary say about it. Raises ModelError, which names the file."""
    named = {name: content(token) for name, token in files.special_tokens(default=default).items()}
    return Described(named, files.chat_template(), notes)


def gpt2s(files: Files, notes: tuple[str, ...] = ()) -> Tokenizer:
    """GPT-2's own vocabulary in a directory. With a chat template its texts hold special tokens, so they are read."""
    described = describe(files, default=GPT2_DEFAULTS, notes=notes)
    return own_tokenizer().described_by(described, parses_special_tokens=described.chat_template is not None)

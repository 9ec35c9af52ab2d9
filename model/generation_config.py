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
    # What a GGUF file has instead of a config.json is in the file itself.
    own = folder.name if folder.is_file() else "config.json"
    files = {GENERATION_CONFIG: read_generation_config(folder), own: raw_config}
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
            f"{_path(folder, found)}: eos_token_id is a list of {len(ids)} ids; it may have at most {MAX_EOS_IDS}"
        )
    for item in ids:
        if not _is_whole(item):
            raise ModelError(
                f"{_path(folder, found)}: eos_token_id is {short_repr(value)}; it must be a token id, a list of token "
                "ids, or null for none"
            )
    return ids


def _bos_id(folder: Path, found: _Found) -> int | None:
    if found.value is not None and not _is_whole(found.value):
        raise ModelError(
            f"{_path(folder, found)}: bos_token_id is {short_repr(found.value)}; it must be a token id, or null for "
            "none"
        )
    begin: int | None = found.value
    return begin


def _path(folder: Path, found: _Found) -> Path:
    return folder if folder.is_file() else folder / found.source


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


#: Parameter in generation_config.json -> its name in requests, whether it is a whole number, and its range.
SAMPLING = {
    "temperature": ("temperature", False, 0, 2),
    "top_k": ("top_k", True, -1, 2**63 - 1),
    "top_p": ("top_p", False, 1e-9, 1),
    "min_p": ("min_p", False, 0, 1),
    "repetition_penalty": ("repetition_penalty", False, 0.01, 100),
    "max_new_tokens": ("max_tokens", True, 1, 1_000_000),
}

#: Values that change nothing, as transformers writes them into many files.
_NEUTRAL: dict[str, tuple[int, ...]] = {
    "temperature": (1,),
    "top_k": (0, -1),
    "top_p": (1,),
    "min_p": (0,),
    "repetition_penalty": (1,),
}


def sampling_defaults(folder: Path) -> dict[str, int | float]:
    """The parameters that generation_config.json sets, by their names in requests; nulls set nothing.

    As in vLLM, `do_sample` is not read: it says nothing that `temperature` does not say.

    Raises:
        ModelError: a value is out of the range of requests, or the file cannot be read.
    """
    given, found = read_generation_config(folder), dict[str, int | float]()
    for name, (parameter, whole, least, most) in SAMPLING.items():
        value = given.get(name)
        if value is None:
            continue
        if whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        is_number = _is_whole(value) or (not whole and isinstance(value, float))
        if not is_number or not least <= value <= most:
            kind = "whole number" if whole else "number"
            raise ModelError(
                f"{folder / GENERATION_CONFIG}: {name} is {short_repr(value)}; it must be a {kind} from {least:g} to "
                f"{most:g}. Correct it, or set HEADRACE_GENERATION_CONFIG=none"
            )
        found[parameter] = value
    return found


def unapplied_defaults(folder: Path) -> tuple[str, ...]:
    """A sentence for the load line about sampling parameters of generation_config.json; none if it sets none."""
    given = read_generation_config(folder)
    wanted = {name: given[name] for name in SAMPLING if given.get(name) is not None}
    set_ones = [f"{name} {short_repr(value)}" for name, value in wanted.items() if value not in _NEUTRAL.get(name, ())]
    if not set_ones:
        return ()
    return (
        f"{', '.join(set_ones)} of {GENERATION_CONFIG} {'was' if len(set_ones) == 1 else 'were'} ignored: requests "
        "decide, unless HEADRACE_GENERATION_CONFIG=auto",
    )

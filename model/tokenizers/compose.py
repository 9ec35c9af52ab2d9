"""A tokenizer from vocab.json, merges.txt and the files beside them, composed as transformers 5 composes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from headrace.model.hub import short_repr, shorten
from headrace.model.tokenizers.files import GPT2_DEFAULTS, NAMED, Files, content
from headrace.model.trusted_files import ModelError

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
Merges = list[tuple[str, str]]


def read_merges(path: Path, text: str) -> Merges:
    """The pairs of merges.txt. A byte order mark, CR before LF and empty lines are no part of a merge."""
    merges = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.removesuffix("\r")
        if line and not line.startswith("#version"):
            parts = line.split(" ")
            if len(parts) != 2:
                raise ModelError(f"{path}: line {number}, {short_repr(line)}, must be two tokens with a space between")
            merges.append((parts[0], parts[1]))
    return merges


def check_vocabulary(path: Path, vocabulary: Any, merges: Merges) -> dict[str, int]:
    """The map of tokens to ids. Raises ModelError, which names the file."""
    if not isinstance(vocabulary, dict) or not all(type(i) is int and 0 <= i < 2**31 for i in vocabulary.values()):
        raise ModelError(f"{path}: the vocabulary must map tokens to ids, whole numbers below 2**31")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ModelError(f"{path}: two tokens of the vocabulary have the same id")
    for left, right in merges:
        if left + right not in vocabulary or left not in vocabulary or right not in vocabulary:
            raise ModelError(
                f"{path}: merge {short_repr(f'{left} {right}')} makes a token that is not in the vocabulary"
            )
    return vocabulary


def compose(
    path: Path, files: Files, vocabulary: dict[str, int], merges: Merges, added: Mapping[int, AddedToken] | None = None
) -> Tokenizer:
    """GPT-2's pipeline on a vocabulary of its own, as the class GPT2Tokenizer of transformers composes it.

    Args:
        path: of the vocabulary, for messages.
        files: those beside the vocabulary.
        vocabulary: token -> id.
        merges: in the order in which they are tried.
        added: the added tokens by their ids; None: those of added_tokens.json.

    Raises:
        ModelError: a file names the reason.
    """
    prefix = flag(files, "add_prefix_space")
    try:
        made = Tokenizer(
            BPE(vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
        )
    except Exception as error:
        raise ModelError(f"{path}: tokenizers does not accept this vocabulary ({shorten(str(error))})") from None
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    named = add_all(path, files, made, vocabulary, GPT2_DEFAULTS, added)
    _add_ends(files, made, named)
    return made


def add_all(
    path: Path,
    files: Files,
    made: Tokenizer,
    vocabulary: Mapping[str, int],
    defaults: Mapping[str, str],
    added: Mapping[int, AddedToken] | None = None,
) -> dict[str, Any]:
    """Add the tokens that the files name, in transformers' order. Returns the named special ones, as written."""
    named, extra = files.special_tokens(default=defaults), files.extra_special_tokens()
    if "added_tokens_decoder" in files.settings:
        by_id = _decoder_of_settings(files)
    elif added is not None:
        by_id = dict(added)
    else:
        early = files.extra_special_tokens(early=True)
        by_id = _added_tokens_json(files, {content(t) for t in (*named.values(), *early)})
    by_content = {token.content: token for token in by_id.values()}
    tokens = [by_id[i] for i in sorted(by_id)]
    written = {content(t) for t in (*files.special_tokens(default={}).values(), *extra)}
    rows = files.config.get("vocab_size")
    for key, value in named.items():
        text = content(value)
        if text not in written and text not in vocabulary and isinstance(rows, int) and len(vocabulary) >= rows:
            continue  # a default, for which the embedding has no row
        if text not in by_content and text not in {t.content for t in tokens}:
            tokens.append(_special(value))
        elif key in NAMED and text in by_content and not by_content[text].special:
            by_content[text].special = True
    for value in extra:
        if content(value) not in {t.content for t in tokens}:
            tokens.append(_special(value))
    add(path, made, tokens)
    return named


def add(path: Path, made: Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Add tokens in order. Raises ModelError, which names the file."""
    try:
        made.add_tokens(list(tokens))
    except Exception as error:
        raise ModelError(f"{path}: tokenizers does not accept its added tokens ({shorten(str(error))})") from None


def flag(files: Files, name: str) -> bool:
    """A setting of tokenizer_config.json that is true or false."""
    value = files.settings.get(name)
    if value is not None and not isinstance(value, bool):
        path = files.folder / "tokenizer_config.json"
        raise ModelError(f"{path}: {name} is {short_repr(value)} and must be true or false")
    return bool(value)


def _add_ends(files: Files, made: Tokenizer, named: Mapping[str, Any]) -> None:
    """Let the tokenizer put the tokens of the beginning and the end around a text, where the settings say so."""
    ends = []
    for name in ("bos", "eos"):
        text = content(named[f"{name}_token"]) if f"{name}_token" in named else None
        token_id = None if text is None else made.token_to_id(text)
        ends.append(f"{text}:0" if flag(files, f"add_{name}_token") and token_id is not None else "")
    bos, eos = ends
    used = {end[:-2]: made.token_to_id(end[:-2]) for end in ends if end}
    surround(files.folder / "tokenizer_config.json", made, [part for part in (bos, "$A:0", eos) if part], used)


def surround(path: Path, made: Tokenizer, parts: list[str], used: Mapping[str, int | None]) -> None:
    """Let a tokenizer put special tokens around a text. Raises ModelError, which names the file."""
    try:
        made.post_processor = processors.TemplateProcessing(parts, None, list(used.items()))
    except Exception as error:
        raise ModelError(f"{path}: its special tokens cannot be put around a text ({shorten(str(error))})") from None


def token_of(path: Path, key: str, raw: Any) -> AddedToken:
    """An added token as the files write it. Raises ModelError, which names the file."""
    if not isinstance(raw, dict) or not isinstance(raw.get("content"), str):
        raise ModelError(f"{path}: {key} is {short_repr(raw)} and must be an object with content")
    flags = {name: raw[name] for name in _FLAGS if name in raw}
    if wrong := [name for name, value in flags.items() if not isinstance(value, bool)]:
        raise ModelError(f"{path}: {wrong[0]} of {key} is {short_repr(flags[wrong[0]])} and must be true or false")
    return AddedToken(raw["content"], **flags)


def _special(value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {name: bool(value[name]) for name in _FLAGS if name in value}
    return AddedToken(value["content"], **{**flags, "special": True})


def _decoder_of_settings(files: Files) -> dict[int, AddedToken]:
    path, raw = files.folder / "tokenizer_config.json", files.settings["added_tokens_decoder"]
    if not isinstance(raw, dict) or not all(key.isdecimal() and len(key) < 11 for key in raw):
        raise ModelError(f"{path}: added_tokens_decoder must map ids to tokens")
    return {int(key): token_of(path, f"added_tokens_decoder[{key}]", value) for key, value in raw.items()}


def _added_tokens_json(files: Files, special: set[str]) -> dict[int, AddedToken]:
    raw = files.json("added_tokens.json")
    if not all(type(i) is int and 0 <= i < 2**31 for i in raw.values()):
        raise ModelError(f"{files.folder / 'added_tokens.json'}: must map tokens to ids, whole numbers below 2**31")
    return {
        i: AddedToken(text, rstrip=False, lstrip=False, normalized=text not in special, special=text in special)
        for text, i in raw.items()
    }

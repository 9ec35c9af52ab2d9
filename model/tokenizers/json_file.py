"""A tokenizer as its tokenizer.json writes it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers

from headrace.model.hub import shorten
from headrace.model.tokenizers import compose
from headrace.model.tokenizers.base import END_OF_TEXT, Described, Tokenizer
from headrace.model.tokenizers.described import describe, gpt2s
from headrace.model.tokenizers.files import GPT2_CLASSES, Files, defaults_of
from headrace.model.tokenizers.gpt2 import is_gpt2s
from headrace.model.tokenizers.ids_only import TokenIdsOnly
from headrace.model.tokenizers.library import LibraryTokenizer
from headrace.model.trusted_files import ModelError

#: Model types for which transformers 5 rebuilds the tokenizer from vocabulary and merges.
_REBUILT = ("gpt2", "gpt_neo")


def from_tokenizer_json(files: Files) -> Tokenizer:
    """The tokenizer of a directory with tokenizer.json. Raises ModelError, which names the file."""
    path = files.folder / "tokenizer.json"
    data, raw = files.vocabulary_json("tokenizer.json")
    if _is_plain_gpt2(raw):
        return gpt2s(files)
    library = parse(path, data)
    _check_ids(path, library)
    notes = (*_settle(library, raw), *_differences(files, path, raw, library))
    described = describe(files, default=defaults_of(files.tokenizer_class), notes=notes)
    if (
        not {"bos_token", "eos_token"} & described.special_tokens.keys()
        and library.token_to_id(END_OF_TEXT) is not None
    ):
        named = {**described.special_tokens, "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        described = Described(named, described.chat_template, notes)
    try:
        counts = {name: part for name, part in raw.items() if name not in ("version", "truncation", "padding")}
        return LibraryTokenizer(library, digest_of(counts), described)
    except ValueError as error:
        reason = f"{path}: its decoder {error} cannot be computed one token at a time, so prompts must be token ids"
        return TokenIdsOnly(reason, described)


def digest_of(raw: Any) -> str:
    """SHA-256 of a JSON value: the same for equal values, however they are written."""
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def parse(path: Path, data: bytes) -> tokenizers.Tokenizer:
    """The library's tokenizer of the bytes of a file. Raises ModelError, which names the file."""
    try:
        return tokenizers.Tokenizer.from_str(data.decode().removeprefix("\ufeff"))
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(f"{path}: tokenizers cannot read it ({shorten(str(error))})") from None
        raise


def _check_ids(path: Path, library: tokenizers.Tokenizer) -> None:
    vocabulary = library.get_vocab(with_added_tokens=False)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ModelError(f"{path}: two tokens of the vocabulary have the same id")


def _settle(library: tokenizers.Tokenizer, raw: dict[str, Any]) -> tuple[str, ...]:
    """Switch off what is for batches in training. Returns what was ignored."""
    notes = []
    for name in ("truncation", "padding"):
        if raw.get(name) is not None:
            notes.append(f"{name} of tokenizer.json was ignored: it is for batches in training")
    library.no_truncation()
    library.no_padding()
    if getattr(library.model, "dropout", None):
        library.model.dropout = None
        notes.append("dropout of tokenizer.json was ignored: it is for training")
    known = {token.content: i for i, token in library.get_added_tokens_decoder().items()}
    for token in raw.get("added_tokens") or []:
        if (got := known.get(token["content"])) is not None and got != token["id"]:
            notes.append(
                f"added token {shorten(token['content'])!r} has id {token['id']} in tokenizer.json, and tokenizers "
                f"gives it {got}"
            )
            break
    return tuple(notes)


def _byte_level(part: Any, **fields: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") == "ByteLevel"
        and all(part.get(name, default) == default for name, default in fields.items())
    )


def _changed_options(model: dict[str, Any]) -> list[str]:
    """Options of a BPE model that are not as transformers sets them for GPT-2."""
    names = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk")
    return [f"model.{name}" for name in (*names, "byte_fallback", "ignore_merges") if model.get(name)]


def _merges(model: dict[str, Any]) -> Any:
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]


def _is_plain_gpt2(raw: dict[str, Any]) -> bool:
    """Whether a tokenizer.json says what tiktoken computes for GPT-2's own vocabulary."""
    model, added = raw.get("model"), raw.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(vocabulary := model.get("vocab"), dict):
        return False
    if len(vocabulary) != 50_257 or not isinstance(added, list) or len(added) != 1:
        return False
    end = {"id": 50_256, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False}
    if not isinstance(added[0], dict) or added[0] != {**end, "special": True, "normalized": added[0].get("normalized")}:
        return False
    pipeline = [raw.get(name) for name in ("normalizer", "truncation", "padding")]
    return (
        pipeline == [None] * 3
        and not _changed_options(model)
        and _byte_level(raw.get("pre_tokenizer"), add_prefix_space=False, use_regex=True)
        and _byte_level(raw.get("decoder"))
        and (raw.get("post_processor") is None or _byte_level(raw["post_processor"]))
        and isinstance(model.get("merges"), list)
        and all(isinstance(m, str) or (isinstance(m, list) and len(m) == 2) for m in model["merges"])
        and is_gpt2s(vocabulary, _merges(model))
    )


def _differences(files: Files, path: Path, raw: dict[str, Any], library: tokenizers.Tokenizer) -> tuple[str, ...]:
    """A sentence if AutoTokenizer would not compute what the file says."""
    named = files.tokenizer_class
    if files.config.get("model_type", "gpt2") not in _REBUILT or (named is not None and named not in GPT2_CLASSES):
        return ()
    model = raw["model"]
    if model.get("type", "BPE") != "BPE":
        ignored = [f"model {model.get('type')}"]
    else:
        ignored = _changed_options(model)
        ignored += [name for name in ("normalizer",) if raw.get(name) is not None]
        prefix = files.settings.get("add_prefix_space") or False
        if not _byte_level(raw.get("pre_tokenizer"), use_regex=True, add_prefix_space=prefix):
            ignored.append("pre_tokenizer")
        ignored += [] if _byte_level(raw.get("decoder")) else ["decoder"]
        ignored += [] if _same_added(files, path, model, library) else ["added_tokens"]
    if not ignored:
        return ()
    return (
        f"tokenizer.json counts as it is written; AutoTokenizer of transformers 5 computes {', '.join(ignored)} "
        "otherwise for this model, and gives other ids, unless tokenizer_class in tokenizer_config.json is "
        "PreTrainedTokenizerFast",
    )


def _same_added(files: Files, path: Path, model: dict[str, Any], library: tokenizers.Tokenizer) -> bool:
    own = library.get_added_tokens_decoder()
    try:
        other = compose.compose(path, files, model["vocab"], _merges(model), own).get_added_tokens_decoder()
    except (ModelError, TypeError):
        return False
    default = {i: token for i, token in other.items() if i not in own and token.content == END_OF_TEXT}
    return {i: repr(token) for i, token in other.items() if i not in default} == {
        i: repr(token) for i, token in own.items()
    }

"""Compose the content of tokenizer.json from the metadata of a GGUF file, as the file's model was trained.

Source: llama.cpp's src/llama-vocab.cpp says how its names for pre-tokenizers split text; transformers composes the rest
alike in integrations/gguf.
"""

from __future__ import annotations

import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from headrace.model.hub import short_repr
from headrace.model.trusted_files import ModelError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
#: Names of pre-tokenizers that split like GPT-2's. Older files have none.
_LIKE_GPT2 = frozenset(
    {"", "default", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "roberta-bpe", "mpt", "olmo", "jais"}
)
#: Those that make every digit a token of its own first.
_SINGLE_DIGITS = frozenset({"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"})
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class TokenizerFields:
    """The metadata that describe a tokenizer, checked when they are looked up.

    Raises:
        ModelError: an entry is missing or of the wrong type.
    """

    def __init__(self, path: Path, found: Mapping[str, Any]) -> None:
        self.path, self._found = path, found

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The entry `tokenizer.ggml.NAME`."""
        value = self._found.get(f"tokenizer.ggml.{name}", default)
        if value is not None and type(value) is not kind:
            raise self.wrong(name, value, f"it must be of the type {kind.__name__}")
        return value

    def wrong(self, name: str, value: Any, what: str) -> ModelError:
        """An error that names the file, the entry and its value."""
        return ModelError(f"{self.path}: metadata tokenizer.ggml.{name} is {short_repr(value)}; {what}")

    def texts(self, name: str) -> list[str]:
        """A list of texts, which must be there."""
        value = self.get(name, list, [])
        if not value or not all(isinstance(each, str) for each in value):
            raise self.wrong(name, value, "it must be a list of texts")
        return list(value)

    def token_id(self, name: str) -> int | None:
        """The id of a special token: `bos`, `eos`, `unknown`, `padding`; None if the file names none."""
        value: int | None = self.get(f"{name}_token_id", int)
        if value is not None and value >= len(self.texts("tokens")):
            raise self.wrong(f"{name}_token_id", value, "it must be the id of a token")
        return value

    def types(self, count: int) -> list[int]:
        """For each token its kind; ordinary, if the file has no kinds."""
        value = self._found.get("tokenizer.ggml.token_type")
        if value is None:
            return [_NORMAL] * count
        if not isinstance(value, array.array) or value.typecode in "fd" or len(value) != count:
            raise self.wrong("token_type", value, f"it must be a list of {count} numbers")
        return [int(each) for each in value]

    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json: special tokens by their text, and the chat template."""
        tokens = self.texts("tokens")
        found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name, short in _SPECIAL.items():
            if (token_id := self.token_id(short)) is not None:
                found[name] = tokens[token_id]
        template = self._found.get("tokenizer.chat_template")
        return found | ({"chat_template": template} if isinstance(template, str) else {})


def compose(fields: TokenizerFields) -> dict[str, Any]:
    """The content of tokenizer.json.

    Raises:
        ModelError: the tokenizer is not byte-level BPE, or splits text in a way that is not known here.
    """
    kind = fields.get("model", str)
    if kind != "gpt2":
        raise fields.wrong("model", kind, "only 'gpt2' (byte-level BPE) can be read; prompts of token ids work")
    tokens = fields.texts("tokens")
    vocabulary: dict[str, int] = {}
    for token_id, token in enumerate(tokens):
        if vocabulary.setdefault(token, token_id) != token_id:
            raise fields.wrong("tokens", token, f"the token occurs twice, as {vocabulary[token]} and {token_id}")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(fields, tokens)),
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(fields),
        "post_processor": _post_processor(fields, tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [_merge(fields, merge) for merge in fields.get("merges", list, [])],
        },
    }


def _merge(fields: TokenizerFields, merge: Any) -> list[str]:
    parts = merge.split(" ") if isinstance(merge, str) else []
    if len(parts) != 2:
        raise fields.wrong("merges", merge, "a merge must be two tokens with a space between them")
    return parts


def _added(fields: TokenizerFields, tokens: list[str]) -> Iterator[dict[str, Any]]:
    """The tokens that are found in text before it is split: control tokens, and those that a user defined."""
    named = {fields.token_id(short) for short in _SPECIAL.values()}
    for token_id, (token, kind) in enumerate(zip(tokens, fields.types(len(tokens)), strict=True)):
        special = kind == _CONTROL or token_id in named
        if token and (special or kind == _USER_DEFINED):
            yield {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }


def _pre_tokenizer(fields: TokenizerFields) -> dict[str, Any]:
    name = fields.get("pre", str, "")
    spaced = bool(fields.get("add_space_prefix", bool, False))
    like_gpt2 = {"type": "ByteLevel", "add_prefix_space": spaced, "trim_offsets": True, "use_regex": True}
    if name in _LIKE_GPT2:
        return like_gpt2
    if name in _SINGLE_DIGITS:
        return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, like_gpt2]}
    known = ", ".join(map(repr, sorted({*_LIKE_GPT2, *_SINGLE_DIGITS} - {""})))
    raise fields.wrong("pre", name, f"only {known} can be read; prompts of token ids work")


def _post_processor(fields: TokenizerFields, tokens: list[str]) -> dict[str, Any]:
    """Adds the tokens that belong to the beginning and the end of every prompt, if the file asks for them."""
    ends: list[int | None] = [
        fields.token_id(short) if fields.get(f"add_{short}_token", bool, False) else None for short in ("bos", "eos")
    ]
    if ends == [None, None]:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    specials = {tokens[each]: each for each in ends if each is not None}

    def template(sequences: str) -> list[dict[str, Any]]:
        first, last = (
            [{"SpecialToken": {"id": tokens[each], "type_id": 0}}] if each is not None else [] for each in ends
        )
        middle = [{"Sequence": {"id": name, "type_id": 0}} for name in sequences]
        return [*first, *middle, *last]

    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("AB"),
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]} for token, token_id in specials.items()
        },
    }

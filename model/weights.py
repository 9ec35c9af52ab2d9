"""Load a GPT-2 from a directory in the Hugging Face format.

Names and shapes are checked before a tensor is read. Pickled weights are never read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.model.config import GPT2Config
from headrace.model.gpt2 import GPT2
from headrace.model.hub import (
    MAX_CONFIG_BYTES,
    ModelError,
    find_model,
    read_json,
    short_repr,
    shorten,
    weight_files,
)
from headrace.model.kernels.attention import decode_kernel
from headrace.model.kernels.gemm_int8_amx import KU, int8_amx_works
from headrace.model.linear import packed_weight_type

#: The types that can be requested -> the type of the activations.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.bfloat16}

#: Fields of a GPT-2 config that change the computation, and the values that are supported.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def load_model(
    name_or_path: str | Path, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
) -> GPT2:
    """Load a GPT-2: 'demo', a released size, a hub id, or a directory.

    Args:
        device: 'auto' is CUDA if there is a CUDA device.
        dtype: 'auto' is float32 on a CPU and bfloat16 on a GPU that has it. 'int8' quantizes the matrices (see
            model/kernels/gemm_int8_amx.py) and computes everything else in bfloat16; it needs a CPU with Intel AMX.

    Raises:
        ModelError: the model cannot be found, cannot be downloaded or is not a GPT-2, or its weights do not match
            config.json.
    """
    folder = find_model(name_or_path)
    config = read_config(folder / "config.json")
    device = _device(device)
    wanted, int8 = _dtype(dtype, device), str(dtype) == "int8"
    if int8:
        _check_widths(folder / "config.json", config)
    files = weight_files(folder)
    with ThreadPoolExecutor(3, thread_name_prefix="headrace-load") as pool:
        places = _places(folder, files, config)  # before compiling, so that wrong shapes are reported at once
        digest = pool.submit(_digest, files)
        # Compiled while the files are read; numba compiles one function at a time.
        gemm = pool.submit(_need_int8, device) if int8 else pool.submit(packed_weight_type, device.type, wanted)
        pool.submit(decode_kernel, config.head_dim, wanted, device.type)
        weights = {name: tensor.to(device, None if int8 else wanted) for name, tensor in _read(places)}
        gemm.result()  # otherwise GPT2 would compile the kernel a second time
        return GPT2(config, weights, digest=digest.result(), int8=int8)


def read_config(path: Path) -> GPT2Config:
    """The shape that config.json describes.

    Raises:
        ModelError: the file is missing, not JSON, not a GPT-2, or describes an unsupported variant.
    """
    raw = read_json(path, MAX_CONFIG_BYTES)
    for name, allowed in _FIXED.items():
        if raw.get(name, allowed[0]) not in allowed:
            raise ModelError(
                f"{path}: {name} is {short_repr(raw[name])}; only {' or '.join(map(repr, allowed))} is supported"
            )
    sizes: dict[str, int] = {}
    for name, default in {"n_layer": 0, "n_head": 0, "n_embd": 0, "n_positions": 1024, "vocab_size": 50257}.items():
        value = raw.get(name, default)
        if type(value) is not int or not 1 <= value <= 1_000_000:
            raise ModelError(f"{path}: {name} is {short_repr(value)}; it must be a whole number from 1 to 1,000,000")
        sizes[name] = value
    if sizes["n_embd"] % sizes["n_head"]:
        raise ModelError(f"{path}: n_embd {sizes['n_embd']} is not a multiple of n_head {sizes['n_head']}")
    inner, epsilon = raw.get("n_inner"), raw.get("layer_norm_epsilon", 1e-5)
    if inner is not None and (type(inner) is not int or not 1 <= inner <= 1_000_000):
        raise ModelError(
            f"{path}: n_inner is {short_repr(inner)}; it must be null or a whole number from 1 to 1,000,000"
        )
    if not isinstance(epsilon, float) or not (math.isfinite(epsilon) and epsilon > 0):
        raise ModelError(f"{path}: layer_norm_epsilon is {short_repr(epsilon)}; it must be a small positive number")
    return GPT2Config(**sizes, n_inner=inner, layer_norm_epsilon=epsilon)


def check_weights(folder: Path, config: GPT2Config) -> None:
    """Check names and shapes of all tensors in a model's directory; none is read.

    Raises:
        ModelError: a file is missing or broken, or a tensor does not fit the config.
    """
    _places(folder, weight_files(folder), config)


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a GPT-2; linear weights are [in, out]."""
    return dict(_shapes(config))


def _shapes(config: GPT2Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    e = config.n_embd
    yield "wte.weight", (config.vocab_size, e)
    yield "wpe.weight", (config.n_positions, e)
    for i in range(config.n_layer):
        for name, shape in _layer_shapes(config).items():
            yield f"h.{i}.{name}", shape
    yield "ln_f.weight", (e,)
    yield "ln_f.bias", (e,)


def _layer_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    e, inner = config.n_embd, config.inner
    return {
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
    }


def _shape_of(name: str, config: GPT2Config) -> tuple[int, ...] | None:
    """The shape of one tensor, None if the model has no tensor of this name.

    The names of all tensors are never listed: config.json can declare more layers than memory could hold names for.
    """
    if match := re.fullmatch(r"h\.(0|[1-9]\d{0,6})\.([a-z_.0-9]+)", name):
        return _layer_shapes(config).get(match[2]) if int(match[1]) < config.n_layer else None
    e = config.n_embd
    outer = {"wte.weight": (config.vocab_size, e), "wpe.weight": (config.n_positions, e)}
    return outer.get(name) or ((e,) if name in ("ln_f.weight", "ln_f.bias") else None)


def _places(folder: Path, files: list[Path], config: GPT2Config) -> dict[str, tuple[Path, str]]:
    """Check all names and shapes. Returns for each tensor the file and its name in the file."""
    places: dict[str, tuple[Path, str]] = {}
    for path in files:
        for key, shape in _headers(path):
            name = key.removeprefix("transformer.")
            if name in places:
                raise ModelError(f"{path}: tensor {key} occurs twice")
            expected = _shape_of(name, config)
            if expected is not None and shape != expected:
                raise ModelError(
                    f"{path}: tensor {key} has shape {short_repr(list(shape))}; config.json requires {list(expected)}"
                )
            if expected is not None or name == "lm_head.weight":
                places[name] = (path, key)
            elif not _is_mask_buffer(name):
                raise ModelError(
                    f"{path}: tensor {shorten(key)} does not belong to a GPT-2 with {config.n_layer} layers"
                )
    missing = next((name for name, _ in _shapes(config) if name not in places), None)
    if missing is not None:
        count = 4 + len(_layer_shapes(config)) * config.n_layer - len(places.keys() - {"lm_head.weight"})
        raise ModelError(f"{folder}: tensor {missing} is missing ({count} in all)")
    return places


def _read(places: Mapping[str, tuple[Path, str]]) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors one at a time."""
    if "lm_head.weight" in places:
        _check_tied(places)
    for name, place in places.items():
        if name != "lm_head.weight":
            yield name, _tensor(*place)


def _check_tied(places: Mapping[str, tuple[Path, str]]) -> None:
    head, embedding = _tensor(*places["lm_head.weight"]), _tensor(*places["wte.weight"])
    if not torch.equal(head, embedding):
        path, key = places["lm_head.weight"]
        raise ModelError(f"{path}: tensor {key} differs from wte.weight; GPT-2's head is its token embedding")


def _is_mask_buffer(name: str) -> bool:
    """Old files contain the causal mask as `h.N.attn.bias` and `h.N.attn.masked_bias`, which are not weights."""
    return name.startswith("h.") and name.endswith((".attn.bias", ".attn.masked_bias"))


def _headers(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                yield key, tuple(file.get_slice(key).get_shape())
    except (SafetensorError, OSError, ValueError) as error:
        raise _broken(path, error) from error


def _tensor(path: Path, key: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
    except (
        SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        AttributeError,
    ) as error:  # AttributeError: a type that torch does not have
        raise _broken(path, error) from error
    if not tensor.is_floating_point():
        raise ModelError(f"{path}: tensor {key} is of type {tensor.dtype}; weights must be floating point")
    return tensor


def _broken(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path}: not a complete safetensors file ({shorten(str(error))}); copy it again")


def _digest(files: list[Path]) -> str:
    """The weights' part of the fingerprint: SHA-256 of the file, or of the digests of the shards in order."""
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
        raise ModelError(f"device {device} is requested, but torch finds no CUDA device; use 'cpu' or 'auto'")
    return chosen


def _check_widths(path: Path, config: GPT2Config) -> None:
    for name, width in {"n_embd": config.n_embd, "n_inner": config.inner}.items():
        if width % KU:
            raise ModelError(
                f"{path}: {name} is {width}; in int8 it must be a multiple of {KU}; use HEADRACE_DTYPE=bfloat16"
            )


def _need_int8(device: torch.device) -> None:
    if not int8_amx_works(device.type):
        raise ModelError(
            f"dtype 'int8' on {device}: it needs Linux, numba, and a CPU with int8 matrix instructions ("
            "Intel AMX, in Xeons since Sapphire Rapids); use HEADRACE_DTYPE=bfloat16"
        )


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        half = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if half else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}; it must be 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[dtype]

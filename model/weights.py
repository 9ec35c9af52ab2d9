"""Load a GPT-2 from a directory in the Hugging Face format.

Names and shapes are checked before a tensor is read. Pickled weights are never read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.model.config import ModelConfig
from headrace.model.decoder import Decoder
from headrace.model.hub import (
    MAX_CONFIG_BYTES,
    find_model,
    read_json,
    short_repr,
    shorten,
    weight_files,
)
from headrace.model.kernels.attention import decode_kernel
from headrace.model.kernels.gemm_int8 import int8_works
from headrace.model.kernels.gemm_int8_amx import KU, MAX_WIDTH
from headrace.model.linear import packed_weight_type
from headrace.model.trusted_files import ModelError, check_not_shared
from headrace.model.weight_file import WeightFile, open_weights

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
    name_or_path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    allow_shared: bool = False,
) -> Decoder:
    """Load a GPT-2: 'demo', a released size, a hub id, or a directory.

    Args:
        device: 'auto' is CUDA if there is a CUDA device.
        dtype: 'auto' is float32 on a CPU and bfloat16 on a GPU that has it. 'int8' quantizes the matrices (see
            model/kernels/gemm_int8.py) and computes everything else in bfloat16; it needs a CPU with AVX2.
        allow_shared: accept a directory or files that every user of the machine can write.

    The weights are copied into memory of this process, so later changes of the files have no effect.

    Raises:
        ModelError: the model cannot be found, cannot be downloaded or is not a GPT-2, its weights do not match
            config.json, everybody can write its files, or they change while they are read.
    """
    folder = find_model(name_or_path)
    config = read_config(folder / "config.json")
    device = _device(device)
    wanted, int8 = _dtype(dtype, device), str(dtype) == "int8"
    if int8:
        _check_widths(folder / "config.json", config)
    files = weight_files(folder)
    if not allow_shared:
        check_not_shared(folder, [folder / "config.json", *files])
    with ThreadPoolExecutor(2, thread_name_prefix="headrace-load") as pool, _opened(files) as opened:
        places = _places(folder, opened, config)  # before compiling, so that wrong shapes are reported at once
        # Compiled while the files are read; numba compiles one function at a time.
        gemm = pool.submit(_need_int8, device) if int8 else pool.submit(packed_weight_type, device.type, wanted)
        pool.submit(decode_kernel, config.head_dim, wanted, device.type)
        weights = {name: tensor.to(device, None if int8 else wanted) for name, tensor in _read(opened, places)}
        gemm.result()  # otherwise Decoder would compile the kernel a second time
        return Decoder(config, GivenOnce(weights), digest=_digest(opened), int8=int8)


class GivenOnce(Mapping[str, Tensor]):
    """Tensors that leave the mapping when they are looked up, so that each is freed as soon as it has been packed."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors.pop(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@contextmanager
def _opened(files: list[Path]) -> Iterator[list[WeightFile]]:
    """All weight files of a model. All are open before the first is read, so that they are of one version."""
    with ExitStack() as stack:
        yield [stack.enter_context(open_weights(path)) for path in files]


def read_config(path: Path) -> ModelConfig:
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
    layers, heads, width, positions, vocabulary = sizes.values()
    return ModelConfig(layers, heads, width, positions, vocabulary, inner, epsilon)


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Check names and shapes of all tensors in a model's directory; none is read.

    Raises:
        ModelError: a file is missing or broken, or a tensor does not fit the config.
    """
    with _opened(weight_files(folder)) as opened:
        _places(folder, opened, config)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a GPT-2; linear weights are [in, out]."""
    return dict(_shapes(config))


def _shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    e = config.n_embd
    yield "wte.weight", (config.vocab_size, e)
    yield "wpe.weight", (config.n_positions, e)
    for i in range(config.n_layer):
        for name, shape in _layer_shapes(config).items():
            yield f"h.{i}.{name}", shape
    yield "ln_f.weight", (e,)
    yield "ln_f.bias", (e,)


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
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


def _shape_of(name: str, config: ModelConfig) -> tuple[int, ...] | None:
    """The shape of one tensor, None if the model has no tensor of this name.

    The names of all tensors are never listed: config.json can declare more layers than memory could hold names for.
    """
    if match := re.fullmatch(r"h\.(0|[1-9]\d{0,6})\.([a-z_.0-9]+)", name):
        return _layer_shapes(config).get(match[2]) if int(match[1]) < config.n_layer else None
    e = config.n_embd
    outer = {"wte.weight": (config.vocab_size, e), "wpe.weight": (config.n_positions, e)}
    return outer.get(name) or ((e,) if name in ("ln_f.weight", "ln_f.bias") else None)


def _places(folder: Path, files: list[WeightFile], config: ModelConfig) -> dict[str, tuple[Path, str]]:
    """Check all names and shapes. Returns for each tensor the file and its name in the file."""
    places: dict[str, tuple[Path, str]] = {}
    for file in files:
        for key, place in file.tensors.items():
            name = key.removeprefix("transformer.")
            if name in places:
                raise ModelError(f"{file.path}: tensor {key} occurs twice")
            expected = _shape_of(name, config)
            if expected is not None and place.shape != expected:
                raise ModelError(
                    f"{file.path}: tensor {key} has shape {short_repr(list(place.shape))}; "
                    f"config.json requires {list(expected)}"
                )
            if expected is not None or name == "lm_head.weight":
                if not place.dtype.is_floating_point:
                    raise ModelError(
                        f"{file.path}: tensor {key} is of type {place.dtype}; weights must be floating point"
                    )
                places[name] = (file.path, key)
            elif not _is_mask_buffer(name):
                raise ModelError(
                    f"{file.path}: tensor {shorten(key)} does not belong to a GPT-2 with {config.n_layer} layers"
                )
    missing = next((name for name, _ in _shapes(config) if name not in places), None)
    if missing is not None:
        count = 4 + len(_layer_shapes(config)) * config.n_layer - len(places.keys() - {"lm_head.weight"})
        raise ModelError(f"{folder}: tensor {missing} is missing ({count} in all)")
    return places


def _read(files: list[WeightFile], places: Mapping[str, tuple[Path, str]]) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors one at a time, in the order of the files."""
    wanted = frozenset(key for _, key in places.values())
    both: dict[str, Tensor] = {}  # head and embedding, until they have been compared
    for file in files:
        for key, tensor in file.read(wanted):
            name = key.removeprefix("transformer.")
            if name in ("lm_head.weight", "wte.weight") and "lm_head.weight" in places:
                both[name] = tensor
            if len(both) == 2:
                _check_tied(both.pop("lm_head.weight"), both.pop("wte.weight"), places)
            if name != "lm_head.weight":
                yield name, tensor


def _check_tied(head: Tensor, embedding: Tensor, places: Mapping[str, tuple[Path, str]]) -> None:
    if not torch.equal(head, embedding):
        path, key = places["lm_head.weight"]
        raise ModelError(f"{path}: tensor {key} differs from wte.weight; GPT-2's head is its token embedding")


def _is_mask_buffer(name: str) -> bool:
    """Old files contain the causal mask as `h.N.attn.bias` and `h.N.attn.masked_bias`, which are not weights."""
    return name.startswith("h.") and name.endswith((".attn.bias", ".attn.masked_bias"))


def _digest(files: list[WeightFile]) -> str:
    """The weights' part of the fingerprint: SHA-256 of the file, or of the digests of the shards in order."""
    digests = [file.digest for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device} is requested, but torch finds no CUDA device; use 'cpu' or 'auto'")
    return chosen


def _check_widths(path: Path, config: ModelConfig) -> None:
    for name, width in {"n_embd": config.n_embd, "n_inner": config.inner}.items():
        if width % KU or width > MAX_WIDTH:
            raise ModelError(
                f"{path}: {name} is {width}; in int8 it must be a multiple of {KU} of at most {MAX_WIDTH}; use "
                "HEADRACE_DTYPE=bfloat16"
            )


def _need_int8(device: torch.device) -> None:
    if not int8_works(device.type):
        raise ModelError(
            f"dtype 'int8' on {device}: it needs Linux, numba, and an x86-64 CPU with AVX2 that "
            "HEADRACE_CPU_ISA does not rule out; use HEADRACE_DTYPE=bfloat16"
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

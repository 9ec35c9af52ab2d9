"""Load a model from a directory in the Hugging Face format, or from a GGUF file.

Names and shapes are checked before a tensor is read. Pickled weights are never read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from headrace.model.config import ModelConfig
from headrace.model.decoder import Decoder
from headrace.model.families import FAMILIES, config_of
from headrace.model.families.base import EMBEDDING_NAME, HEAD_NAME, Stored, decoder_shapes, layer_shapes
from headrace.model.gguf_file import raw_config
from headrace.model.gguf_weights import open_container
from headrace.model.hub import config_path, find_model, ignored_beside_weights, likely_cause, weight_files
from headrace.model.kernels.attention import decode_kernel
from headrace.model.kernels.gemm_int8 import int8_works
from headrace.model.kernels.gemm_int8_amx import MAX_WIDTH
from headrace.model.linear import packed_weight_type
from headrace.model.trusted_files import ModelError, check_not_shared
from headrace.model.weight_file import WeightFile
from headrace.model.weight_names import Source, Sources, find_sources

#: The types that can be requested -> the type of the activations.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.bfloat16}


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    allow_shared: bool = False,
) -> Decoder:
    """Load a model: 'demo', a released size of GPT-2, a hub id, a directory, or a GGUF file.

    Args:
        device: 'auto' is CUDA if there is a CUDA device.
        dtype: 'auto' is float32 on a CPU and bfloat16 on a GPU that has it. 'int8' quantizes the matrices (see
            model/kernels/gemm_int8.py) and computes everything else in bfloat16; it needs a CPU with AVX2.
        allow_shared: accept a directory or files that every user of the machine can write.

    The weights are copied into memory of this process, so later changes of the files have no effect.

    Raises:
        ModelError: the model cannot be found, cannot be downloaded or is of no supported family, its weights do not
            match config.json, everybody can write its files, or they change while they are read.
    """
    folder = find_model(name_or_path)
    config = read_config(config_path(folder))
    device = _device(device)
    wanted, int8 = _dtype(dtype, device), str(dtype) == "int8"
    if int8:
        _check_widths(config_path(folder), config)
    files = weight_files(folder)
    if not allow_shared:
        check_not_shared(folder, [config_path(folder), *files])
    with ThreadPoolExecutor(2, thread_name_prefix="headrace-load") as pool, _opened(files) as opened:
        sources = find_sources(folder, opened, config)  # before compiling, so that wrong shapes are reported at once
        # Compiled while the files are read; numba compiles one function at a time.
        gemm = pool.submit(_need_int8, device) if int8 else pool.submit(packed_weight_type, device.type, wanted)
        pool.submit(decode_kernel, config.head_dim, wanted, device.type)
        weights = {name: tensor.to(device, None if int8 else wanted) for name, tensor in _read(opened, sources, config)}
        gemm.result()  # otherwise Decoder would compile the kernel a second time
        digest = _digest(opened)
        notes = [*sources.notes, *ignored_beside_weights(folder)]
        return Decoder(config, GivenOnce(weights), digest=digest, int8=int8, notes=notes)


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
        yield [stack.enter_context(open_container(path)) for path in files]


def read_config(path: Path) -> ModelConfig:
    """The shape that config.json describes.

    Raises:
        ModelError: the file is missing, not JSON, not of a supported family, or describes an unsupported variant.
    """
    if not os.path.exists(path):
        raise ModelError(f"{path}: there is no such file{likely_cause(path.parent)}")
    return config_of(path, raw_config(path))


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Check names and shapes of all tensors in a model's directory; none is read.

    Raises:
        ModelError: a file is missing or broken, or a tensor does not fit the config.
    """
    with _opened(weight_files(folder)) as opened:
        find_sources(folder, opened, config)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the decoder; linear weights are [in, out]."""
    return dict(decoder_shapes(config))


def _read(files: list[WeightFile], sources: Sources, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors one at a time, in the order of the files, and make them the decoder's."""
    names = {source.key: name for name, source in sources.tensors.items()}
    copy = sources.head_copy
    both: dict[str, Tensor] = {}  # the embedding and its copy, until they have been compared
    fused = FusedTensors(config)
    for file in files:
        for key, tensor in file.read(frozenset(names) if copy is None else frozenset({*names, copy.key})):
            name = names.get(key, HEAD_NAME)
            if copy is not None and (key == copy.key or name == EMBEDDING_NAME):
                both[name] = tensor
            if copy is not None and len(both) == 2:
                _check_copy(both.pop(HEAD_NAME), both.pop(EMBEDDING_NAME), copy)
            if key in names:
                yield from fused.complete(sources.tensors[name].stored, tensor)
    for layer in range(config.n_layer):
        for name, shape in FAMILIES[config.family].missing_layer_tensors(config).items():
            yield f"h.{layer}.{name}", torch.zeros(shape)


class FusedTensors:
    """Joins the tensors of the files that become parts of one tensor of the decoder."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._parts: dict[str, dict[int, Tensor]] = {}

    def complete(self, stored: Stored, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensor of the decoder to which a tensor of the files belongs, if this was its last part."""
        tensor = stored.convert(tensor)
        if stored.column is None:
            yield stored.target, tensor
            return
        parts = self._parts.setdefault(stored.target, {})
        parts[stored.column] = tensor
        width = layer_shapes(self._config)[stored.target.split(".", 2)[2]][-1]
        if sum(part.shape[-1] for part in parts.values()) == width:
            del self._parts[stored.target]
            yield stored.target, torch.cat([parts[column] for column in sorted(parts)], dim=-1)


def _check_copy(head: Tensor, embedding: Tensor, copy: Source) -> None:
    if not torch.equal(head, embedding):
        raise ModelError(
            f"{copy.path}: tensor {copy.key} differs from {EMBEDDING_NAME}, and tie_word_embeddings is true; write "
            "false in config.json if the head was trained apart from the token embedding, else remove the tensor"
        )


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
        if width > MAX_WIDTH:
            raise ModelError(
                f"{path}: {name} is {width}; in int8 it must be at most {MAX_WIDTH}; use HEADRACE_DTYPE=bfloat16"
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

"""Reads the weights of a GGUF file, unpacked to float32 by the code of the `gguf` package.

Like a safetensors file (model/weight_file.py) it is opened once, read once from its beginning to its end, and its
digest is that of the very bytes that were unpacked.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from headrace.model.gguf_file import broken, config_of
from headrace.model.gguf_header import Header, read_header
from headrace.model.hub import missing_package, short_repr
from headrace.model.trusted_files import ModelError, open_file
from headrace.model.weight_file import TensorPlace, WeightFile

if TYPE_CHECKING:
    import numpy as np

#: The types that can be unpacked, by their names in the `gguf` package.
TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
)
#: The names of llama.cpp -> those of Hugging Face, of tensors outside and inside the layers.
_OUTER = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "output": "lm_head"}
_INNER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


class _Packed(NamedTuple):
    """Where a tensor is in the file, how it is packed, and whether it is stored the other way round."""

    start: int
    size: int
    type_name: str
    shape: tuple[int, ...]
    transposed: bool


class GGUFWeights(WeightFile):
    """An open GGUF file. `tensors` have the names and shapes of a Hugging Face file, and are all float32.

    Raises:
        ModelError: the file is not GGUF, not complete, or has a model or a type that cannot be computed.
    """

    format = "GGUF"

    def __init__(self, path: Path, file: FileIO) -> None:
        super()._begin(path, file)
        try:
            parsed = read_header(file)
            #: What config.json would say.
            self.config: dict[str, Any] = config_of(path, parsed)
            self._packed = _places(path, parsed, conv1d=self.config["model_type"] == "gpt2")
        except ValueError as error:
            raise broken(path, error) from None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
        self._header = parsed.data
        needed = max((each.start + each.size for each in self._packed.values()), default=len(parsed.data))
        if needed > self._opened.st_size:
            raise self._broken(f"it has {self._opened.st_size} bytes and needs {needed}")
        self.tensors = {
            name: TensorPlace(torch.float32, packed.shape[::-1] if packed.transposed else packed.shape, 0, 0)
            for name, packed in self._packed.items()
        }

    def read(self, wanted: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the whole file once; yield the wanted tensors, unpacked. Raises ModelError like `WeightFile.read`."""
        self._file.seek(len(self._header))
        self._sha256.update(self._header)
        at = len(self._header)
        with ThreadPoolExecutor(1, thread_name_prefix="headrace-digest") as pool:
            pending: Future[None] = pool.submit(lambda: None)
            for name, packed in self._packed.items():
                pending.result()
                self._skip(packed.start - at)
                at = packed.start + packed.size
                if name not in wanted:
                    self._skip(packed.size)
                    continue
                data = torch.empty(packed.size, dtype=torch.uint8)
                self._fill(data)
                pending = pool.submit(self._sha256.update, data.numpy().data)
                yield name, _unpack(data.numpy(), packed)
            pending.result()
            self._skip(self._opened.st_size - at)
        self._check_unchanged()


@contextmanager
def open_container(path: Path) -> Iterator[WeightFile]:
    """Open a safetensors or a GGUF file. Raises ModelError like `WeightFile` and `GGUFWeights`."""
    with open_file(path) as file:
        yield GGUFWeights(path, file) if path.suffix.lower() == ".gguf" else WeightFile(path, file)


def _unpack(data: np.ndarray, packed: _Packed) -> Tensor:
    """The float32 tensor in the bytes of a packed one."""
    rows = data.reshape(*packed.shape[:-1], -1)
    values = torch.from_numpy(_gguf().dequantize(rows, _gguf().GGMLQuantizationType[packed.type_name]))
    values = values.view(packed.shape)
    return values.t() if packed.transposed else values


def _places(path: Path, parsed: Header, *, conv1d: bool) -> dict[str, _Packed]:
    """The tensors in the order of their bytes. Raises ValueError if they overlap or begin at odd places."""
    places: dict[str, _Packed] = {}
    begin, end = len(parsed.data), len(parsed.data)
    for name, info in sorted(parsed.tensors.items(), key=lambda item: item[1].offset):
        type_name = _type_name(path, name, info.type_code)
        block, size = _gguf().GGML_QUANT_SIZES[_gguf().GGMLQuantizationType[type_name]]
        if info.shape[-1] % block:
            raise ValueError(f"the rows of tensor {short_repr(name)} are not whole blocks of {type_name}")
        count = size
        for length in (*info.shape[:-1], info.shape[-1] // block):
            count *= length
        start = begin + info.offset
        if info.offset % parsed.alignment or not end <= start < end + parsed.alignment:
            raise ValueError(f"tensor {short_repr(name)} does not begin where the one before it ends")
        known, transposed = _known_name(name, conv1d)
        if known in places:
            raise ValueError(f"tensor {short_repr(name)} occurs twice")
        places[known] = _Packed(start, count, type_name, info.shape, transposed and len(info.shape) == 2)
        end = start + count
    return places


def _type_name(path: Path, name: str, code: int) -> str:
    names: dict[int, str] = {int(each): each.name for each in _gguf().GGMLQuantizationType}
    if (found := names.get(code, str(code))) not in TYPES:
        raise ModelError(
            f"{path}: tensor {short_repr(name)} is of the type {found}; only {', '.join(TYPES)} can be unpacked "
            "(write the file again with llama-quantize --allow-requantize)"
        )
    return found


def _known_name(name: str, conv1d: bool) -> tuple[str, bool]:
    """The name in a Hugging Face file, and whether that stores the tensor transposed; an unknown name as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER and kind in ("weight", "bias"):
        return f"{_OUTER[stem]}.{kind}", False
    match = re.fullmatch(r"blk\.(0|[1-9]\d{0,6})\.([a-z_]+)", stem)
    if match is None or match[2] not in _INNER or kind not in ("weight", "bias"):
        return name, False
    known = _INNER[match[2]]
    # GPT-2's files have [in, out], as in its class Conv1D; llama.cpp stores [out, in] for every architecture.
    return f"h.{match[1]}.{known}.{kind}", conv1d and kind == "weight" and ".c_" in known


@functools.cache
def _gguf() -> Any:
    """The package, imported when it is needed."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModelError(f"a GGUF file cannot be unpacked: {missing_package('gguf')}") from None
    return gguf

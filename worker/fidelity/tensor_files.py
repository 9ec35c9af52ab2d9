"""What `headrace validate` needs around `client.wire.activations`: several prompts, half precision, files. numpy only.

Ours come out of the path that serves jobs (`Job.checkpoints`), the others from `worker.fidelity.references`
or from a file.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from headrace.client.wire.activations import CHECKPOINTS
from headrace.client.wire.comparison import CheckpointResult, Tensors, worst

#: A tensor larger than this is no checkpoint: the logits of GPT-2 XL at 1,024 tokens have a tenth.
MAX_TENSOR_BYTES = 2**31
#: deflate makes nothing smaller than this; a member of an archive that claims more lies.
DEFLATE = 1032

_BROKEN = (zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError, TypeError)


@dataclass(frozen=True)
class Loss:
    """What a precision costs, over all positions of all prompts, where the reference computes in float32."""

    positions: int
    #: Kullback-Leibler divergence of the distribution of the next token from the reference's, in nats, on average.
    divergence: float
    #: Share of positions at which the likeliest token is the same.
    agreement: float


def loss(ours: Sequence[Tensors], theirs: Sequence[Tensors]) -> Loss | None:
    """From the logits, [T, V] for each prompt; None if there are none."""
    divergences, same = [], []
    for mine, other in zip(ours, theirs, strict=True):
        if "logits" in mine and "logits" in other:
            p, q = (_log_softmax(tensors["logits"]) for tensors in (other, mine))
            divergences += (np.exp(p) * (p - q)).sum(-1).tolist()
            same += (p.argmax(-1) == q.argmax(-1)).tolist()
    return Loss(len(same), float(np.mean(divergences)), float(np.mean(same))) if same else None


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    scores: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return scores


def table(prompts: Sequence[Sequence[CheckpointResult]]) -> list[CheckpointResult]:
    """The worst of all prompts for each checkpoint."""
    return [worst(rows) for rows in zip(*prompts, strict=True)]


def half_tolerances(exact: Sequence[Tensors], half: Sequence[Tensors]) -> dict[int, float]:
    """Tolerances for half precision: twice what transformers in that type differs from itself in float32."""
    tolerances = {}
    for number, (_, names, tolerance) in CHECKPOINTS.items():
        if tolerance:
            gaps = [float(np.abs(a[n] - b[n]).max()) for a, b in zip(exact, half, strict=True) for n in names if n in a]
            tolerances[number] = max(tolerance, 2 * max(gaps))
    return tolerances


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors that another implementation wrote, by our names: a safetensors, npz or npy file (`logits.npy`).

    Raises:
        ValueError: the file is none of these, cannot be read, or holds no tensor with a name of ours.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    known = {name for _, names, _ in CHECKPOINTS.values() for name in names} | {"hidden"}
    try:
        if not path.is_file():  # a pipe would be waited on for ever
            raise ValueError("there is no such file")
        if path.suffix == ".safetensors":
            found = dict(load_file(path))
        elif path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                names = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
                found = {name: _read_member(archive, member) for name, member in names.items() if name in known}
        elif path.suffix == ".npy":
            with path.open("rb") as file:
                found = {path.stem: _read_npy(file, path.stat().st_size)}
        else:
            raise ValueError("its name must end in .safetensors, .npz or .npy")
        for name in known & found.keys():
            if found[name].dtype.kind not in "fiub":
                raise ValueError(f"{name} holds {found[name].dtype}, no numbers that can be compared")
    # What zipfile and numpy raise at files that are not what they claim to be is written down nowhere.
    except (OSError, ValueError, LookupError, RuntimeError, EOFError, SafetensorError, *_BROKEN) as error:
        raise ValueError(f"{path} cannot be read as tensors: {str(error)[:200]}") from None
    if not known & found.keys():
        held = ", ".join(sorted(found))[:200] or "none of them"
        raise ValueError(f"{path} holds {held}; expected some of {', '.join(sorted(known))}")
    return {name: tensor for name, tensor in found.items() if name in known}


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    size = member.file_size
    if size > DEFLATE * max(1, member.compress_size):
        raise ValueError(f"{member.filename} claims {size} bytes")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # what numpy writes
        raise ValueError(f"{member.filename} is compressed in another way than numpy does it")
    with archive.open(member) as file:
        return _read_npy(file, size)


def _read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """An array in numpy's format out of a file of `size` bytes: numpy takes the memory before it reads."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of numpy's format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_order, dtype = read(file)
    count = math.prod(shape)
    if dtype.hasobject or count < 0 or not 0 <= count * dtype.itemsize <= min(size, MAX_TENSOR_BYTES):
        raise ValueError(f"its header claims {len(shape)} dimensions of {dtype} that the file does not hold")
    data = file.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise ValueError("it ends too early")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if column_order else "C")

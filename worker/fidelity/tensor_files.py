"""Helpers of `headrace validate` around `client.wire.activations`. Uses numpy only.

They combine the results of several prompts, derive the tolerances of lower precisions, and read tensors from files that
other implementations wrote.
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

#: The largest tensor that is read. The logits of GPT-2 XL at 1,024 tokens have a tenth of this size.
MAX_TENSOR_BYTES = 2**31
#: The largest ratio that deflate can compress by. An archive member that claims a larger one is malformed.
DEFLATE = 1032

_BROKEN = (zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError, TypeError)


@dataclass(frozen=True)
class Loss:
    """The accuracy that a precision costs, over all positions of all prompts, compared with float64."""

    positions: int
    #: Mean Kullback-Leibler divergence of the next token's distribution from the reference's, in nats.
    divergence: float
    #: Fraction of positions with the same most likely token.
    agreement: float


def loss(ours: Sequence[Tensors], theirs: Sequence[Tensors]) -> Loss | None:
    """Compute the loss from the logits, [T, V] for each prompt. Returns None if no prompt has logits on both sides."""
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
    """Return the worst row of all prompts for each checkpoint."""
    return [worst(rows) for rows in zip(*prompts, strict=True)]


def half_tolerances(exact: Sequence[Tensors], half: Sequence[Tensors]) -> dict[int, float]:
    """Return tolerances for a lower precision: twice the error that transformers has in that precision."""
    tolerances = {}
    for number, (_, names, tolerance) in CHECKPOINTS.items():
        if tolerance:
            gaps = [float(np.abs(a[n] - b[n]).max()) for a, b in zip(exact, half, strict=True) for n in names if n in a]
            tolerances[number] = max(tolerance, 2 * max(gaps))
    return tolerances


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors that another implementation wrote.

    The file is a safetensors, npz or npy file (`logits.npy`) and uses the names of the checkpoint tensors.

    Raises:
        ValueError: the file has another format, cannot be read, or holds no checkpoint tensor.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    known = {name for _, names, _ in CHECKPOINTS.values() for name in names} | {"hidden"}
    try:
        if not path.is_file():  # reading a pipe could block forever
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
                raise ValueError(
                    f"{name} has dtype {found[name].dtype}, which cannot be compared; use floats, integers or booleans"
                )
    # zipfile and numpy do not document which exceptions they raise for malformed files.
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
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the methods that numpy writes
        raise ValueError(f"{member.filename} uses a compression method that numpy does not write")
    with archive.open(member) as file:
        return _read_npy(file, size)


def _read_npy(file: IO[bytes], size: int) -> np.ndarray:
    """Read an array in numpy's format from a file of `size` bytes.

    numpy's own reader allocates what the header claims before it reads, so the claim is checked first.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of numpy's format is not supported")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, column_order, dtype = read(file)
    count = math.prod(shape)
    if dtype.hasobject or count < 0 or not 0 <= count * dtype.itemsize <= min(size, MAX_TENSOR_BYTES):
        raise ValueError(f"its header claims an array of {len(shape)} dimensions of {dtype} that does not fit the file")
    data = file.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise ValueError("it is truncated")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if column_order else "C")

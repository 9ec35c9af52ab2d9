"""The process that reads a pickled checkpoint and writes its tensors as safetensors.

It is started for one file, with limits for memory, time and the size of its output, and ends afterwards. torch.load
with weights_only=True builds tensors, numbers, texts and containers of them, and calls no function that a file names.
As a second wall, this process can open no socket, start no process, and write no file from Python.

Arguments: descriptor of the checkpoint, its size in bytes, path of the file to write. Standard output: one JSON object.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.model.weight_names import WRAPPERS

#: Where checkpoints keep the tensors, if not at the top.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
#: Prefixes that names may have; Lightning and trl add them.
_PREFIXES = ("model.", "pretrained_model.")
_FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.")
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class Refused(Exception):
    """The checkpoint cannot be converted; the message continues the name of the file."""


def main() -> None:
    """Convert one file, and report what it was or why it was refused."""
    descriptor, size, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    _limit(size)
    sys.addaudithook(_forbid)
    try:
        with open(descriptor, "rb") as file:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
        report = _convert(loaded, size, out)
    except Refused as error:
        report = {"refused": str(error)}
    except MemoryError:
        report = {"refused": "it needs more memory than three times its size"}
    except Exception as error:
        report = {"refused": _reason(error)}
    sys.stdout.write(json.dumps(report))


def _limit(size: int) -> None:
    used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")  # noqa: SIM115
    for what, limit in (
        (resource.RLIMIT_AS, used + 3 * size + 2**29),
        (resource.RLIMIT_CPU, 60 + size // 2**23),
        (resource.RLIMIT_FSIZE, 4 * size + 2**24),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (limit if hard == resource.RLIM_INFINITY else min(limit, hard),) * 2)


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event.startswith(_FORBIDDEN):
        raise PermissionError(f"{event} is forbidden here")


def _reason(error: Exception) -> str:
    """What weights_only refuses, by its name; the text of the library otherwise."""
    said = str(error)
    if match := re.search(r"nsupported (?:global: |class |operand )?(?:GLOBAL )?([\w.]+)", said):
        return (
            f"it holds {match[1]}, which is not a tensor and could run code, so it is not read; save the tensors alone "
            "with torch.save(model.state_dict(), ...)"
        )
    return f"torch.load(weights_only=True) does not accept it ({type(error).__name__}: {' '.join(said.split())[-200:]})"


def _convert(loaded: Any, size: int, out: str) -> dict[str, Any]:
    arguments = loaded.get("model_args") if isinstance(loaded, dict) else None
    state = _state(loaded)
    notes: list[str] = []
    state = _unwrapped(state, notes)
    state = {name: tensor for name, tensor in state.items() if not _is_mask(name, tensor)}
    _check(state, size)
    head_differs = _share(state, notes)
    if isinstance(arguments, dict):
        state = _from_nanogpt(state, notes)
    written = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    try:
        save_file(written, out, metadata={"format": "pt"})
    except Exception as error:  # of the operating system, in the library's words
        raise Refused(f"its tensors cannot be written ({error})") from None
    plain = {key: value for key, value in (arguments or {}).items() if isinstance(value, int | float | bool | None)}
    return {"notes": notes, "head_differs": head_differs, "model_args": plain if isinstance(arguments, dict) else None}


def _unwrapped(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The tensors without what torch.compile, DataParallel and others put into their names."""
    found: dict[str, Tensor] = {}
    removed: dict[str, None] = {}
    leading = [each for each in _PREFIXES if any(name.startswith(f"{each}transformer.") for name in state)]
    for name, tensor in state.items():
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        removed |= dict.fromkeys(part for part in name.split(".") if part in WRAPPERS)
        plain = ".".join(parts)
        for prefix in leading:
            if plain.startswith(prefix):
                plain = plain.removeprefix(prefix)
                removed[prefix] = None
        if plain in found:
            raise Refused(f"its tensor {name[:100]} occurs twice")
        found[plain] = tensor
    notes += [f"{each.rstrip('.')}. was removed from the names of tensors" for each in removed]
    return found


def _state(loaded: Any) -> dict[str, Tensor]:
    """The tensors by their names."""
    for found in (loaded, *(loaded.get(name) for name in _WRAPPERS if isinstance(loaded, dict))):
        if isinstance(found, Mapping) and any(isinstance(value, Tensor) for value in found.values()):
            state = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
            if any(isinstance(value, Mapping) for value in found.values()) and found is loaded:
                continue
            return state
    kind = type(loaded).__name__
    raise Refused(f"it holds no tensors by name (but a {kind}); save them with torch.save(model.state_dict(), ...)")


def _is_mask(name: str, tensor: Tensor) -> bool:
    """Old files contain the causal mask, which is not a weight."""
    return name.endswith(".attn.masked_bias") or (name.endswith((".attn.bias", ".attention.bias")) and tensor.dim() > 1)


def _check(state: Mapping[str, Tensor], size: int) -> None:
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
            raise Refused(f"its tensor {name[:100]} is {tensor.layout} of {tensor.dtype}; save dense, real numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise Refused(f"its tensor {name[:100]} has {tensor.numel()} elements and fewer are stored")
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > 2 * size + 2**20:
        raise Refused("its tensors are larger than the file, because many share what is stored")


def _share(state: dict[str, Tensor], notes: list[str]) -> bool:
    """Leave out a head that is the token embedding. Returns whether there is another head."""
    head = state.get("lm_head.weight")
    embedding = state.get("transformer.wte.weight", state.get("wte.weight"))
    if head is None or embedding is None:
        return False
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        return True
    del state["lm_head.weight"]
    notes.append("the head is the token embedding, and was stored once")
    return False


def _from_nanogpt(state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """nanoGPT stores linear weights as [out, in]; with bias=False it has no biases, which are zeros."""
    found: dict[str, Tensor] = {}
    added = 0
    for name, tensor in state.items():
        if name.endswith(_CONV1D):
            if tensor.dim() != 2:
                raise Refused(f"its tensor {name[:100]} has {tensor.dim()} dimensions and needs 2")
            tensor = tensor.t()
        found[name] = tensor
        bias = name.removesuffix("weight") + "bias"
        if name.endswith((*_CONV1D, "ln_1.weight", "ln_2.weight", "ln_f.weight")) and bias not in state:
            found[bias] = torch.zeros(tensor.shape[-1], dtype=tensor.dtype)
            added += 1
    if added:
        notes.append(f"{added} biases that the model does not have were written as zeros")
    return found


if __name__ == "__main__":
    main()

"""Writes GGUF files as the converter of llama.cpp writes them, with the writer of the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from headrace.model.tokenizer import byte_alphabet

NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
TOKENS = [*byte_alphabet(), "ab", "abc", "Ġa", "12", "<|endoftext|>", "<|user|>", "két szó"]
MERGES = ["a b", "ab c", "Ġ a", "1 2"]
TYPES = [1] * (len(TOKENS) - 3) + [3, 4, 4]
END = TOKENS.index("<|endoftext|>")


def write_gguf(
    path: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], *, arch: str = "gpt2", kind: str = "F32",
    pre: str | None = "gpt-2", vocabulary: int | None = None, **more: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Write a model's weights, by their names in a Hugging Face file. Returns them as the file has them."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(1e-5)
    if arch == "starcoder":
        writer.add_head_count_kv(1)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    padding = (vocabulary or len(TOKENS)) - len(TOKENS)
    writer.add_token_list(TOKENS + [f"[PAD{len(TOKENS) + i}]" for i in range(padding)])
    writer.add_token_types(TYPES + [5] * padding)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(END)
    writer.add_bos_token_id(END)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    written = {name: _add(writer, name, tensor, kind, arch) for name, tensor in weights.items()}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def _add(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: str, arch: str) -> torch.Tensor:
    name = name.removeprefix("transformer.")
    stem, suffix = name.rsplit(".", 1)
    prefix = ""
    if stem.startswith("h."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"blk.{layer}."
    turned = arch == "gpt2" and suffix == "weight" and ".c_" in stem
    values = np.ascontiguousarray((tensor.t() if turned else tensor).float().numpy())
    wanted = gguf.GGMLQuantizationType[kind if values.ndim == 2 and stem != "wpe" else "F32"]
    packed = pack(values, wanted)
    writer.add_tensor(f"{prefix}{NAMES[stem]}.{suffix}", packed, raw_dtype=wanted)
    exact = torch.from_numpy(np.array(gguf.dequantize(packed, wanted), np.float32))
    return exact.t().contiguous() if turned else exact


def pack(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Pack values; random blocks with small scales for types that the package only unpacks."""
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(1).integers(
            0, 256, (*values.shape[:-1], values.shape[-1] // block, size), np.uint8
        )
        data[..., 1::2] &= 0x1F  # halves of at most 0.01, wherever the type has its scales
        return data.reshape(*values.shape[:-1], -1)

"""GGUF files, pickles and what people take for a model's directory."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.zoo import vocabularies, weights
from tests.zoo.entry import Made
from tests.zoo.vocabularies import END, byte_level, save_json, write_json

#: Names of GPT-2's tensors in a GGUF file. Matrices of the blocks are stored [out, in] there.
NAMES = {
    "wte.weight": "token_embd.weight",
    "wpe.weight": "position_embd.weight",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}

#: Where a block of each type has its scales, and scales that give values of about 0.1 around zero.
SCALES = {
    "Q2_K": {80: 8e-3, 82: 1.2e-2},
    "Q3_K": {108: 2.2e-3},
    "Q4_K": {0: 4.4e-4, 2: 3.3e-3},
    "Q5_K": {0: 2.2e-4, 2: 3.4e-3},
    "Q6_K": {208: 7e-5},
}


def gguf_file(folder: Path, kind: str) -> Made:
    """A model.gguf whose matrices have this type, and a directory of what gguf itself makes of them."""
    twin = _plain(folder, n_embd=256, n_head=4, n_layer=1, n_inner=256, n_positions=64)
    tensors = load_file(twin / "model.safetensors")
    writer = gguf.GGUFWriter(folder / "model.gguf", "gpt2")
    _describe(writer, twin)
    made = np.random.default_rng(7)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        across = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        values = (tensor.T if across else tensor).contiguous().numpy().astype(np.float32)
        wanted = gguf.GGMLQuantizationType[kind if values.ndim == 2 and "wpe" not in name else "F32"]
        data = (
            _random_blocks(values, wanted, made)
            if kind.endswith("_K") and values.ndim == 2 and across
            else (
                gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0 if wanted.name.endswith("_K") else wanted)
            )
        )
        actual = wanted if not wanted.name.endswith("_K") or across else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(_gguf_name(name), data, raw_dtype=actual)
        exact = torch.from_numpy(np.array(gguf.quants.dequantize(data, actual), np.float32))
        stored[name] = (exact.T if across else exact).contiguous()
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    save_file(stored, twin / "model.safetensors", metadata={"format": "pt"})
    return Made(folder / "model.gguf", twin)


def _random_blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType, made: np.random.Generator) -> np.ndarray:
    """Blocks of random bytes with small scales: gguf unpacks the K types but does not pack them."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = made.integers(0, 256, (values.size // block, size), dtype=np.uint8)
    for start, scale in SCALES[kind.name].items():
        blocks[:, start : start + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(values.shape[0], -1)


def _describe(writer: Any, twin: Path) -> None:
    raw = vocabularies.read_json(twin / "tokenizer.json")
    vocabulary = raw["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_name("zoo")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == END else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_bos_token_id(vocabulary[END])
    writer.add_eos_token_id(vocabulary[END])


def _gguf_name(name: str) -> str:
    parts = name.removeprefix("transformer.")
    prefix = ""
    if parts.startswith("h."):
        _, layer, parts = parts.split(".", 2)
        prefix = f"blk.{layer}."
    for theirs, ours in NAMES.items():
        if parts.startswith(theirs):
            return prefix + ours + parts.removeprefix(theirs)
    raise ValueError(name)


def _plain(folder: Path, **config: Any) -> Path:
    """A model as transformers saves it, beside the folder. -> its directory."""
    twin = folder.with_name(f"{folder.name}.twin")
    twin.mkdir()
    weights.gpt2(twin, save_json(byte_level(), twin), **config)
    weights.ends(twin, config=0, bos=0)
    return twin


def pickled(folder: Path) -> Made:
    """pytorch_model.bin beside the other files, to be converted."""
    twin = _plain(folder)
    source = folder / "source"
    shutil.copytree(twin, source)
    (source / "model.safetensors").unlink()
    torch.save(load_file(twin / "model.safetensors"), source / "pytorch_model.bin")
    return Made(folder / "converted", twin, source)


def nano_gpt(folder: Path) -> Made:
    """The ckpt.pt of nanoGPT: its own names and configuration, compiled, matrices [out, in], no biases of its norms."""
    twin = folder.with_name(f"{folder.name}.twin")
    twin.mkdir()
    weights.gpt2(twin, 128, n_head=2, n_embd=32, n_positions=64, activation_function="gelu")
    names = load_file(twin / "model.safetensors")
    model: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, tensor in names.items():
        if name.endswith(".bias") and "bias" in name:
            names[name] = torch.zeros_like(tensor)
            continue
        across = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        model[f"_orig_mod.{name}"] = tensor.T.contiguous() if across else tensor
    model["_orig_mod.lm_head.weight"] = names["transformer.wte.weight"]
    save_file(names, twin / "model.safetensors", metadata={"format": "pt"})
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 64,
        "bias": False,
        "vocab_size": 128,
        "dropout": 0.0,
    }
    state = {
        "model": dict(model),
        "model_args": sizes,
        "iter_num": 10,
        "best_val_loss": torch.tensor(1.0),
        "config": {"dataset": "shakespeare", "dtype": "float16"},
    }
    torch.save(state, folder / "ckpt.pt")
    return Made(folder / "converted", twin, folder / "ckpt.pt")


def pickle_alone(folder: Path) -> None:
    made = pickled(folder)
    assert made.source is not None
    for path in made.source.iterdir():
        path.rename(folder / path.name)
    made.source.rmdir()


def adapter(folder: Path) -> None:
    """A directory that peft saved: a LoRA and no model."""
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "gpt2", "r": 8})
    save_file(
        {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.zeros(8, 32)},
        folder / "adapter_model.safetensors",
    )


def unmerged(folder: Path) -> None:
    """A model saved with its LoRA in it."""
    _with_tokenizer(folder)
    name = "transformer.h.0.attn.c_attn"
    weights.rename(
        folder,
        lambda t: {
            **{n.replace(f"{name}.", f"{name}.base_layer."): w for n, w in t.items()},
            f"{name}.lora_A.default.weight": torch.zeros(8, 32),
            f"{name}.lora_B.default.weight": torch.zeros(96, 8),
        },
    )


def checkpoints_below(folder: Path) -> None:
    """The output directory of a Trainer that saved only checkpoints."""
    below = folder / "checkpoint-500"
    below.mkdir()
    _with_tokenizer(below)


def not_resized(folder: Path) -> None:
    """More tokens than rows of the embedding: `resize_token_embeddings` was forgotten."""
    made = byte_level()
    made.add_special_tokens(["<user>", "<bot>"])
    weights.gpt2(folder, save_json(made, folder) - 2)


def classifier(folder: Path) -> None:
    """GPT2ForSequenceClassification: the decoder with a head for classes."""
    _with_tokenizer(folder)
    weights.rename(folder, lambda t: {**t, "score.weight": torch.ones(3, 32)})


def missing_tensor(folder: Path) -> None:
    _with_tokenizer(folder)
    weights.rename(folder, lambda t: {name: w for name, w in t.items() if not name.endswith("h.1.mlp.c_fc.weight")})


def other_head(folder: Path) -> None:
    """config.json says that the head is the token embedding, and the file has another one."""
    _with_tokenizer(folder)
    weights.rename(folder, lambda t: {**t, "lm_head.weight": torch.ones(320, 32)})


def gguf_of_llama(folder: Path) -> Made:
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return Made(folder / "model.gguf")


def other_config(folder: Path, **change: Any) -> None:
    """A GPT-2 whose config.json says something that is not computed."""
    _with_tokenizer(folder)
    weights.edit_config(folder, **change)


def _with_tokenizer(folder: Path) -> None:
    weights.gpt2(folder, save_json(byte_level(), folder))

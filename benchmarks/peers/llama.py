"""llama.cpp, through the functions that llama-cpp-python exposes: many sequences in one context, as its server does."""

from __future__ import annotations

import ctypes
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import Tokens
from benchmarks.vocabulary import merges, words
from benchmarks.workloads import Item

#: Precision -> the type that matrices are written in; the file types are llama.cpp's own numbers for whole files.
PRECISIONS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
_FILE_TYPES = {"F32": 0, "BF16": 32, "Q8_0": 7}
_NORMAL, _CONTROL = 1, 3  # kinds of token

_REPACKED = "weights repacked"

#: Tokens in one call of llama_decode, as in llama-server by default.
BATCH = 2048


class LlamaCpp:
    """Greedy decoding by `llama_decode` over many sequences: prompts join as others leave (continuous batching).

    Args:
        folder: the model in Hugging Face form; it is written as GGUF into `scratch` first.
        precision: of the matrices: float32, bfloat16 or int8 (llama.cpp's Q8_0).
    """

    def __init__(self, folder: Path, precision: str, threads: int, scratch: Path) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self._log = llama_cpp.llama_log_callback(_silent)  # kept alive, because llama.cpp keeps calling it
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        self.path = scratch / f"{folder.name}-{precision}.gguf"
        if not self.path.exists():
            write_gguf(folder, self.path, PRECISIONS[precision])
        self.precision, self.threads = precision, threads
        llama_cpp.llama_backend_init()
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._context: Any = None
        self._model: Any = None
        self._repacked: bool | None = None

    def plans(self, items: Sequence[Item]) -> list[str]:
        sizes = list(dict.fromkeys(min(size, len(items)) for size in (16, 32, 64)))
        plans = [f"{size} sequences in one cache, flash attention on" for size in sizes]
        plans.append(f"{sizes[0]} sequences in one cache, flash attention off")
        if len(items) > 1:
            plans.append(f"{sizes[0]} sequences with a cache each, flash attention on")
        if self.precision == "int8":
            # Last, because it crashes on some processors with AMX (ggml-org/llama.cpp, issue 20824).
            plans.append(f"{plans[0]}, {_REPACKED}")
        return plans

    def prepare(self, items: Sequence[Item], plan: str) -> Callable[[], Tokens]:
        """Create a context that can hold the longest sequences that may run at once in this plan."""
        lib, sequences = self.lib, int(plan.split()[0])
        self._load(repacked=_REPACKED in plan)
        lengths = sorted((len(item.prompt) + item.new_tokens for item in items), reverse=True)[:sequences]
        params = lib.llama_context_default_params()
        params.kv_unified = "in one cache" in plan
        params.n_ctx = sum(lengths) if params.kv_unified else _up(lengths[0]) * sequences
        params.n_ctx = _up(params.n_ctx)
        params.n_batch, params.n_seq_max = BATCH, sequences
        params.n_threads = params.n_threads_batch = self.threads
        on, off = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED, lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = on if "flash attention on" in plan else off
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context for {plan}")
        return lambda: self._generate(items, sequences)

    def _load(self, *, repacked: bool) -> None:
        """Free the context and load the model if necessary, with or without weights repacked for AMX or AVX."""
        lib = self.lib
        if self._context:
            lib.llama_free(self._context)
            self._context = None
        if self._repacked == repacked:
            return
        if self._model:
            lib.llama_model_free(self._model)
        params = lib.llama_model_default_params()
        params.use_extra_bufts = repacked
        self._model = lib.llama_model_load_from_file(str(self.path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {self.path.name}")
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._repacked = repacked

    def _generate(self, items: Sequence[Item], sequences: int) -> Tokens:
        lib, memory = self.lib, self.lib.llama_get_memory(self._context)
        rows = [_Row(item) for item in items]
        waiting, free, running = deque(rows), list(range(sequences)), list[_Row]()
        while waiting or running:
            while waiting and free:
                waiting[0].sequence = free.pop()
                running.append(waiting.popleft())
            asked = self._fill(running)
            if status := lib.llama_decode(self._context, self._batch):
                raise RuntimeError(f"llama_decode returned {status}")
            logits = np.ctypeslib.as_array(lib.llama_get_logits(self._context), (len(asked), self._vocabulary))
            for row, token in zip(asked, logits.argmax(axis=1).tolist(), strict=True):
                row.tokens.append(token)
                if len(row.tokens) == row.item.new_tokens:
                    lib.llama_memory_seq_rm(memory, row.sequence, -1, -1)
                    free.append(row.sequence)
                    running.remove(row)
        return [row.tokens for row in rows]

    def _fill(self, running: list[_Row]) -> list[_Row]:
        """Write the next batch: first the new token of each row that decodes, then as many prompt tokens as fit.

        Returns:
            The rows whose next token the batch computes, in the order of their logits.
        """
        batch, asked, size = self._batch, list[_Row](), 0
        for row in sorted(running, key=lambda row: not row.tokens):
            tokens = row.tokens[-1:] or row.item.prompt[row.done : row.done + BATCH - size]
            for token in tokens:
                batch.token[size], batch.pos[size], batch.seq_id[size][0] = token, row.done, row.sequence
                batch.n_seq_id[size], batch.logits[size] = 1, row.done + 1 >= len(row.item.prompt)
                row.done, size = row.done + 1, size + 1
            if tokens and row.done >= len(row.item.prompt):
                asked.append(row)
        batch.n_tokens = size
        return asked


@dataclass(eq=False)
class _Row:
    """A running sequence: tokens in the cache, new tokens, and its sequence number in llama.cpp."""

    item: Item
    done: int = 0
    sequence: int = -1
    tokens: list[int] = field(default_factory=list)


def _up(positions: int) -> int:
    """llama.cpp allocates its cache in blocks of 256 positions."""
    return -(-positions // 256) * 256


def _silent(_level: int, _text: bytes, _user_data: object) -> None:
    """llama.cpp reports every tensor it loads."""


def write_gguf(folder: Path, path: Path, matrix_type: str) -> None:
    """Write a GPT-2 checkpoint in Hugging Face form as GGUF, matrices in `matrix_type`, vectors in float32.

    The head is the token embedding: llama.cpp uses it for both when the file has no `output.weight`.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_file_type(_FILE_TYPES[matrix_type])
    _add_vocabulary(writer)
    for name, tensor in load_file(folder / "model.safetensors").items():
        # Checkpoints keep a layer's matrix as [inputs, outputs], llama.cpp as [outputs, inputs].
        within_block = ".h." in f".{name}"
        array = np.ascontiguousarray(tensor.T if within_block and tensor.ndim == 2 else tensor, dtype=np.float32)
        kind = matrix_type if array.ndim == 2 and "wpe" not in name else "F32"
        data = quantize(array, GGMLQuantizationType[kind])
        writer.add_tensor(_gguf_name(name.removeprefix("transformer.")), data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    """`h.3.attn.c_attn.bias` -> `blk.3.attn_qkv.bias`."""
    if not name.startswith("h."):
        owner, kind = name.split(".")
        return f"{ {'wte': 'token_embd', 'wpe': 'position_embd', 'ln_f': 'output_norm'}[owner] }.{kind}"
    _, block, *middle, kind = name.split(".")
    return f"blk.{block}.{_NAMES['.'.join(middle)]}.{kind}"


def _add_vocabulary(writer: Any) -> None:
    end, tokens = "<|endoftext|>", words()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([_CONTROL if token == end else _NORMAL for token in tokens])
    writer.add_token_merges(merges())
    writer.add_bos_token_id(tokens.index(end))
    writer.add_eos_token_id(tokens.index(end))

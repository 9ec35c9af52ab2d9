"""What a GGUF file says about its model and its tokenizer, in the terms of a Hugging Face directory. Needs no torch.

Source: the converter of llama.cpp, which writes such files. The weights are read by model/gguf_weights.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.model.gguf_header import Header, read_header
from headrace.model.gguf_tokenizer import TokenizerFields, compose
from headrace.model.hub import MAX_CONFIG_BYTES, is_gguf, read_json, short_repr
from headrace.model.trusted_files import ModelError, open_file

#: `general.architecture` -> `model_type` of config.json, and the class of transformers.
ARCHITECTURES = {"gpt2": ("gpt2", "GPT2LMHeadModel"), "starcoder": ("gpt_bigcode", "GPTBigCodeForCausalLM")}
#: Both compute the tanh form of GELU; a GGUF file has no field for the function.
_ACTIVATIONS = {"gpt2": "gelu_new", "gpt_bigcode": "gelu_pytorch_tanh"}
_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def header(path: Path) -> Header:
    """The parsed header of a file. Raises ModelError, which names the file."""
    with open_file(path) as file:
        try:
            return read_header(file)
        except ValueError as error:
            raise broken(path, error) from None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror})") from None


def broken(path: Path, error: ValueError) -> ModelError:
    """The error for a file whose header cannot be parsed."""
    return ModelError(f"{path}: not a GGUF file that can be read ({error}); copy it again, or convert it again")


def metadata(path: Path) -> Mapping[str, Any]:
    """The metadata of a file, by the names in the file. Raises ModelError, which names the file."""
    return header(path).metadata


def config(path: Path) -> dict[str, Any]:
    """What config.json would say about the model in a file.

    Raises:
        ModelError: the file is not GGUF, or its model is of an architecture that cannot be computed.
    """
    return config_of(path, header(path))


def raw_config(path: Path) -> dict[str, Any]:
    """The content of a config.json, or what it would say about a GGUF file. Raises ModelError."""
    return config(path) if is_gguf(path) else read_json(path, MAX_CONFIG_BYTES)


def tokenizer_json(path: Path) -> dict[str, Any]:
    """What tokenizer.json would hold for the tokenizer in a file.

    Raises:
        ModelError: the file is not GGUF, or its tokenizer is not byte-level BPE of a known kind.
    """
    return compose(TokenizerFields(path, metadata(path)))


def tokenizer_config(path: Path) -> dict[str, Any]:
    """What tokenizer_config.json would hold: the special tokens and the chat template. Raises ModelError."""
    return TokenizerFields(path, metadata(path)).config()


def config_of(path: Path, parsed: Header) -> dict[str, Any]:
    """What config.json would say, from a header that was parsed. Raises ModelError like `config`."""
    fields = _Fields(path, parsed.metadata)
    family, class_name = ARCHITECTURES[fields.architecture]
    shapes = {name: tensor.shape for name, tensor in parsed.tensors.items()}
    embedding, positions = shapes.get("token_embd.weight"), shapes.get("position_embd.weight")
    width = fields.number("embedding_length")
    found: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": family,
        "activation_function": _ACTIVATIONS[family],
        "n_layer": fields.number("block_count"),
        "n_head": fields.number("attention.head_count"),
        "n_embd": width,
        "n_inner": fields.number("feed_forward_length", 4 * width),
        # The rows of the embedding count: converters write `n_ctx` as the length, which may be another number.
        "n_positions": positions[0] if positions else fields.number("context_length"),
        "vocab_size": embedding[0] if embedding else fields.vocabulary(),
        "layer_norm_epsilon": fields.epsilon(),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if family == "gpt_bigcode":
        # Not from head_count_kv, which converters write as 1 for every model of this family.
        joined = shapes.get("blk.0.attn_qkv.weight", (0,))[0]
        found["multi_query"] = joined != 3 * width or found["n_head"] == 1
    elif fields.number("attention.head_count_kv", found["n_head"]) != found["n_head"]:
        raise ModelError(
            f"{path}: metadata {fields.architecture}.attention.head_count_kv is not the number of heads; "
            "GPT-2 has as many heads of keys and values as of queries"
        )
    for name, key in _TOKEN_IDS.items():
        if key in parsed.metadata:
            found[name] = parsed.metadata[key]
            if type(found[name]) is not int:
                raise ModelError(f"{path}: metadata {key} is {short_repr(found[name])}; it must be the id of a token")
    return found


class _Fields:
    """The metadata that describe the model. Raises ModelError unless the file holds one whole model of a known kind."""

    def __init__(self, path: Path, found: Mapping[str, Any]) -> None:
        self._path, self._found = path, found
        kind, parts = found.get("general.type", "model"), found.get("split.count", 1)
        if kind != "model":
            raise ModelError(
                f"{path}: metadata general.type is {short_repr(kind)}; only 'model' can be loaded (merge an adapter "
                "into its model with llama-export-lora)"
            )
        if parts not in (0, 1):
            raise ModelError(
                f"{path}: metadata split.count is {short_repr(parts)}: it is one part of a model; join the parts with "
                "llama-gguf-split --merge"
            )
        self.architecture: str = found.get("general.architecture", "")
        if not isinstance(self.architecture, str) or self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{path}: metadata general.architecture is {short_repr(self.architecture)}; only "
                f"{' or '.join(map(repr, ARCHITECTURES))} can be computed"
            )

    def number(self, name: str, default: int | None = None) -> int:
        """A size of the architecture."""
        value = self._found.get(key := f"{self.architecture}.{name}", default)
        if type(value) is not int or not 1 <= value <= 1_000_000:
            raise ModelError(
                f"{self._path}: metadata {key} is {short_repr(value)}; it must be a whole number from 1 to 1,000,000"
            )
        return value

    def epsilon(self) -> float:
        """What is added to the variance in a layer norm."""
        value = self._found.get(key := f"{self.architecture}.attention.layer_norm_epsilon")
        if type(value) is not float or not 0 < value < 1:
            raise ModelError(f"{self._path}: metadata {key} is {short_repr(value)}; it must be a small positive number")
        return value

    def vocabulary(self) -> int:
        """The number of tokens."""
        tokens = self._found.get("tokenizer.ggml.tokens")
        return len(tokens) if isinstance(tokens, list) and tokens else self.number("vocab_size")

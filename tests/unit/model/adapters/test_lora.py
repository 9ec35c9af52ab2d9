"""Adapters in PEFT's format: what is loaded equals what PEFT merges, and what is not computed is refused by name."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.model import weights as loading
from headrace.model.adapters.lora import Adapter, load_adapter
from headrace.model.families.base import decoder_shapes
from headrace.model.trusted_files import ModelError
from headrace.model.weight_names import find_sources
from headrace.model.weights import read_config

#: Family -> a tiny model of it, without its own tensors for q, k and v in GPT-2 and GPT-BigCode.
BASES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=3, n_head=2, n_embd=16, n_positions=32, vocab_size=50)
    ),
    "gpt_bigcode": lambda: transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=50, multi_query=True)
    ),
    "gpt_neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            num_layers=2,
            num_heads=2,
            hidden_size=16,
            max_position_embeddings=32,
            vocab_size=50,
            intermediate_size=64,
            attention_types=[[["global", "local"], 1]],
            window_size=8,
        )
    ),
}
ALL = ["c_attn", "c_proj", "c_fc"]


def decoder_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of the decoder, as a load reads them from a directory."""
    config, found = read_config(folder / "config.json"), {}
    with loading._opened([folder / "model.safetensors"]) as files:
        for name, tensor in loading._read(files, find_sources(folder, files, config), config):
            found[name] = tensor.clone()
    return found


def make_adapter(folder: Path, family: str, **options: Any) -> tuple[Path, Path]:
    """An adapter with random matrices that PEFT has written, and a directory with the model that PEFT merges."""
    torch.manual_seed(7)
    adapted: Any = peft.get_peft_model(BASES[family](), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    adapted.save_pretrained(str(folder / "adapter"))
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for family, make in BASES.items():
        torch.manual_seed(7)
        folders[family] = tmp_path_factory.mktemp(family)
        make().save_pretrained(folders[family])
    return folders


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "all layers": ("gpt2", {"target_modules": ALL, "r": 4, "lora_alpha": 6}),
    "one module": ("gpt2", {"target_modules": ["attn.c_proj"], "r": 3, "fan_in_fan_out": True}),
    "all-linear": ("gpt2", {"target_modules": "all-linear", "r": 2}),
    "an expression": ("gpt2", {"target_modules": r".*\.(0|2)\.mlp\.c_(fc|proj)", "r": 4}),
    "without some": ("gpt2", {"target_modules": ALL, "exclude_modules": ["h.1.attn.c_attn", "c_fc"]}),
    "some layers": ("gpt2", {"target_modules": ALL, "layers_to_transform": [0, 2]}),
    "layers by name": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "h"}),
    "patterns": (
        "gpt2",
        {
            "target_modules": ALL,
            "rank_pattern": {"c_fc": 5, r"h\.0\.attn\.c_proj": 1},
            "alpha_pattern": {"c_fc": 20, "h.1.attn.c_attn": 3},
        },
    ),
    "rank-stabilised": ("gpt2", {"target_modules": ALL, "use_rslora": True, "r": 9, "lora_alpha": 5}),
    "all biases": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "all"}),
    "biases of its layers": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}),
    "gaussian": ("gpt2", {"target_modules": ["c_attn"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}),
    "multi-query": ("gpt_bigcode", {"target_modules": ALL, "r": 4}),
    "q, k and v apart": ("gpt_neo", {"target_modules": ["q_proj", "v_proj", "c_fc"], "r": 4}),
    "separate output": ("gpt_neo", {"target_modules": ["out_proj", "k_proj"], "layers_to_transform": [1]}),
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning:transformers")
@pytest.mark.parametrize("name", OPTIONS)
def test_the_base_with_an_adapter_has_the_weights_that_peft_merges(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    family, options = OPTIONS[name]
    folder, merged = make_adapter(tmp_path, family, **options)
    config = read_config(bases[family] / "config.json")
    adapter = load_adapter(folder, config, allow_shared=True)
    base, expected = decoder_weights(bases[family]), decoder_weights(merged)
    assert adapter.matrices
    for tensor_name, shape in decoder_shapes(config):
        found = adapter.biases.get(tensor_name, base[tensor_name])
        if len(shape) == 2:
            found = found + adapter.delta(tensor_name, (shape[0], shape[1]))
        torch.testing.assert_close(found, expected[tensor_name], rtol=0, atol=2e-6)
    assert adapter.rank == max([options.get("r", 8), *options.get("rank_pattern", {}).values()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_adapter(tmp_path_factory.mktemp("plain"), "gpt2", target_modules=["c_attn", "c_fc"], r=4)[0]


def changed(plain: Path, target: Path, **fields: Any) -> Path:
    """A copy of the adapter whose config has these fields."""
    shutil.copytree(plain, target, dirs_exist_ok=True)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return target


def load(folder: Path, bases: dict[str, Path]) -> Adapter:
    return load_adapter(folder, read_config(bases["gpt2"] / "config.json"), allow_shared=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; only 'LORA' is computed; merge the adapter into a model"),
        ({"task_type": "SEQ_CLS"}, r"task_type is 'SEQ_CLS'; it must be 'CAUSAL_LM'"),
        ({"use_dora": True}, r"use_dora is True; it is not computed; merge the adapter into"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]; it is not computed"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\]; it is not computed"),
        ({"target_parameters": ["mlp"]}, r"target_parameters is \['mlp'\]; it is not computed"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication .* is not computed"),
        ({"lora_bias": True}, r"lora_bias is True; it is not computed"),
        ({"use_qalora": True}, r"use_qalora is True; it is not computed"),
        ({"a_new_field": 3}, r"a_new_field is 3; it is not computed; merge the adapter into"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa'; it changed the base model before training"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights is 'olora'; it changed the base"),
        ({"init_lora_weights": "corda"}, r"init_lora_weights is 'corda'; it changed the base"),
        ({"r": 10**9}, r"r is 1000000000; a rank must be a whole number from 1 to 1024"),
        ({"r": True}, r"r is True; a rank must be"),
        ({"r": 5}, r"lora_A.weight' has shape \[4, 16\]; for this base and rank 5 it must be \[5, 16\]"),
        ({"rank_pattern": {"c_attn": 0}}, r"rank_pattern is .*; a rank must be"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\]; it must be an object"),
        ({"lora_alpha": float("inf")}, r"lora_alpha is .*; it must be a number"),
        ({"lora_alpha": float("nan")}, r"lora_alpha is .*; it must be a number"),
        ({"alpha_pattern": {"c_attn": "8"}}, r"alpha_pattern is .*; it must be a number"),
        ({"bias": "some"}, r"bias is 'some'; it must be 'none', 'all' or 'lora_only'"),
        ({"use_rslora": "yes"}, r"use_rslora is 'yes'; it must be true or false"),
        ({"target_modules": None}, r"target_modules is None; it must name the modules"),
        ({"target_modules": [1]}, r"target_modules is \[1\]; it must be a list of names, or one regular expression"),
        ({"target_modules": "c_(attn"}, r"target_modules .* is not a regular expression"),
        ({"target_modules": r"(?:\w|\w\w|\.|.)+[0-9]"}, r"takes more than 0.1 s for transformer.h.0"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform is \[-1\]; it must be the number of a layer"),
        ({"target_modules": ["c_attn"]}, r"c_fc.lora_A.weight' is of a module that target_modules"),
        ({"target_modules": ["c_attn", "c_fc", "c_proj"]}, r"it has no tensors for h.0.attn.c_proj, which target"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    fields: dict[str, Any], message: str, plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder, started = changed(plain, tmp_path / "adapter", **fields), time.monotonic()
    with pytest.raises(ModelError, match=message) as error:
        load(folder, bases)
    assert str(error.value).startswith(str(folder))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.popitem() and None, r"lora_[AB].weight is missing"),
        (lambda t: t.update({k: v * float("nan") for k, v in t.items()}), r"holds a NaN or an infinity"),
        (lambda t: t.update({k: v.int() for k, v in t.items()}), r"is of type torch.int32; it must be a floating"),
        (lambda t: t.update({k: v[:, :3].clone() for k, v in t.items()}), r"has shape \[4, 3\]; for this base"),
        (lambda t: t.update(x=torch.ones(1)), r"tensor 'x' does not begin with 'base_model.model.'"),
        (
            lambda t: t.update({"base_model.model.transformer.wte.lora_embedding_A": torch.ones(4, 50)}),
            r"lora_embedding_A' is not computed: it changes an embedding",
        ),
        (
            lambda t: t.update({"base_model.model.transformer.h.9.attn.c_attn.lora_A.weight": torch.ones(4, 16)}),
            r"belongs to no linear layer of the base model; is the adapter for another base",
        ),
        (
            lambda t: t.update({"base_model.model.transformer.h.0.attn.c_attn.bias": torch.ones(48)}),
            r"is a bias that the base does not have, or bias is 'none'",
        ),
        (
            lambda t: t.update({"base_model.model.transformer.h.0.attn.c_attn.lora_magnitude_vector": torch.ones(48)}),
            r"is not computed: it is of DoRA",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], None], message: str, plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(plain, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message):
        load(folder, bases)


def test_files_that_are_missing_cut_off_or_pickled_are_refused(
    plain: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(plain, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for count in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:count])
        with pytest.raises(ModelError, match="not a complete safetensors file"):
            load(folder, bases)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(
        ModelError, match=r"adapter_model.bin: pickled weights are never read; .*safe_serialization=True"
    ):
        load(folder, bases)
    (folder / "adapter_model.bin").rename(weights)
    weights.write_bytes(whole)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config.json"):
        load(folder, bases)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config.json: there is no such file"):
        load(folder, bases)


def test_the_digest_tells_config_and_weights_apart(plain: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    same = load(changed(plain, tmp_path / "same", revision=None), bases).digest
    other = load(changed(plain, tmp_path / "other", lora_alpha=9), bases).digest
    assert len({load(plain, bases).digest, other}) == 2
    assert len(same) == 64

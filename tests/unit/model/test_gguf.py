"""GGUF files: the weights, the shape and the tokenizer that they describe, against transformers and gguf."""

from __future__ import annotations

import array
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTBigCodeConfig, GPTBigCodeForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from headrace.model import ModelError, load_model
from headrace.model.gguf_file import config, metadata, tokenizer_json
from headrace.model.gguf_weights import TYPES, GGUFWeights, open_container
from headrace.model.hub import find_model, weight_files
from tests.unit.model.gguf_files import END, TOKENS, write_gguf

SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 1024, "vocab_size": len(TOKENS)}


def random_gpt2(**changed: Any) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE | {"bos_token_id": END, "eos_token_id": END} | changed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def state(model: GPT2LMHeadModel | GPTBigCodeForCausalLM) -> dict[str, torch.Tensor]:
    tied = model.config.tie_word_embeddings
    return {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model.logits(torch.tensor([ids]))[0]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_a_file_computes_what_transformers_computes_from_it(tmp_path: Path, kind: str) -> None:
    source = random_gpt2()
    write_gguf(tmp_path / "m.gguf", state(source), SHAPE, kind=kind)
    reference = random_gpt2()
    reference.load_state_dict(
        load_gguf_checkpoint(tmp_path / "m.gguf", return_tensors=True, model_to_load=reference)["tensors"], strict=False
    )
    ours = load_model(tmp_path / "m.gguf", device="cpu", dtype="float32")
    ids = [5, 40, 256, 257, END, 7, 80]
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, ids), reference(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4)
    assert ours.digest == hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()


def test_a_head_of_its_own_is_not_the_embedding(tmp_path: Path) -> None:
    source = random_gpt2(tie_word_embeddings=False)
    write_gguf(tmp_path / "m.gguf", state(source), SHAPE)
    assert config(tmp_path / "m.gguf")["tie_word_embeddings"] is False
    with open_container(tmp_path / "m.gguf") as opened:
        found = dict(opened.read(frozenset(opened.tensors)))
    assert torch.equal(found["lm_head.weight"], source.lm_head.weight)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_unpacked_as_gguf_unpacks_it(tmp_path: Path, kind: str) -> None:
    values = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    small = {"n_layer": 1, "n_head": 1, "n_embd": 256, "n_positions": 3, "vocab_size": 3}
    written = write_gguf(
        tmp_path / "m.gguf",
        {"wte.weight": values, "h.0.mlp.c_proj.weight": values.repeat(86, 1)[:256]},
        small,
        kind=kind,
    )
    with open_container(tmp_path / "m.gguf") as opened:
        found = {name: tensor.clone() for name, tensor in opened.read(frozenset(opened.tensors))}
        assert {name: place.shape for name, place in opened.tensors.items()} == {n: t.shape for n, t in found.items()}
    assert found.keys() == written.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, written[name], rtol=0, atol=0, equal_nan=True)


def test_the_description_has_the_shape_of_the_tensors_and_the_ends_of_the_tokenizer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", state(random_gpt2(n_positions=64)), SHAPE | {"n_positions": 1000}, vocabulary=272)
    found = config(tmp_path / "m.gguf")
    assert found["n_positions"] == 64  # converters write n_ctx, which nothing computes with
    assert found["vocab_size"] == len(TOKENS)
    assert (found["model_type"], found["eos_token_id"], found["n_inner"]) == ("gpt2", END, 128)


@pytest.mark.parametrize("multi_query", [True, False])
def test_the_heads_of_a_starcoder_are_known_by_the_shape_of_the_joined_projection(
    tmp_path: Path, multi_query: bool
) -> None:
    rows = 32 + 2 * (16 if multi_query else 32)
    weights = {"wte.weight": torch.randn(6, 32), "h.0.attn.c_attn.weight": torch.randn(rows, 32)}
    write_gguf(tmp_path / "m.gguf", weights, SHAPE | {"n_layer": 1}, arch="starcoder")
    found = config(tmp_path / "m.gguf")
    assert (found["model_type"], found["multi_query"]) == ("gpt_bigcode", multi_query)
    with open_container(tmp_path / "m.gguf") as opened:  # [out, in], as the files of this family store it
        assert opened.tensors["h.0.attn.c_attn.weight"].shape == (rows, 32)


@pytest.mark.parametrize("multi_query", [True, False])
def test_a_starcoder_computes_what_transformers_computes_from_its_source(tmp_path: Path, multi_query: bool) -> None:
    torch.manual_seed(3)
    shape = SHAPE | {"n_positions": 16}
    source = GPTBigCodeForCausalLM(GPTBigCodeConfig(**shape, multi_query=multi_query, eos_token_id=END)).eval()
    write_gguf(tmp_path / "m.gguf", state(source), shape, arch="starcoder")
    ours = load_model(tmp_path / "m.gguf", device="cpu", dtype="float32")
    ids = [5, 40, 256, END]
    with torch.no_grad():
        expected = source(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(ours, ids), expected, atol=1e-4, rtol=1e-4)


SAMPLES = [
    "",
    " ",
    "abc abcab 12",
    "<|endoftext|>a",
    "x<|user|>y",
    "tíz két szó!",
    "a\n\n b \t",
    "😀 1234 'll don't",
    "Ġ",
]


@pytest.mark.parametrize("more", [{}, {"add_bos_token": True}, {"add_space_prefix": False}], ids=str)
@pytest.mark.parametrize("pre", ["gpt-2", "default", None])
def test_the_tokenizer_of_a_file_is_that_of_transformers(tmp_path: Path, pre: str | None, more: dict[str, Any]) -> None:
    write_gguf(tmp_path / "m.gguf", {"wte.weight": torch.zeros(2, 32)}, SHAPE, pre=pre, vocabulary=272, **more)
    ours = Tokenizer.from_str(json.dumps(tokenizer_json(tmp_path / "m.gguf")))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in SAMPLES:
        if "szó" in text:  # transformers drops an added token with a space or an accent; llama.cpp finds it
            assert len(TOKENS) - 1 in ours.encode(text).ids
            continue
        ids = ours.encode(text).ids
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids), text
    assert ours.get_vocab_size() == 272


@pytest.mark.parametrize("arch", ["gpt2", "starcoder"])
def test_starcoder_splits_digits_as_its_tokenizer_does(tmp_path: Path, arch: str) -> None:
    """The original tokenizer.json of StarCoder has Digits(individual_digits=True) before ByteLevel."""
    weights = {"wte.weight": torch.zeros(2, 32)}
    write_gguf(tmp_path / "m.gguf", weights, SHAPE, arch=arch, pre="starcoder" if arch == "starcoder" else "gpt-2")
    ids = Tokenizer.from_str(json.dumps(tokenizer_json(tmp_path / "m.gguf"))).encode("a12").ids
    assert ids == [TOKENS.index(token) for token in (("a", "1", "2") if arch == "starcoder" else ("a", "12"))]


def raw(tensors: list[tuple[str, list[int], int, int]] = (), entries: list[bytes] = (), *, data: int = 4096) -> bytes:  # type: ignore[assignment]
    """A file of version 3 with these tensors (name, dimensions, type, offset) and metadata entries."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries)
    for name, dims, code, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", code, offset)
    return head + bytes(-len(head) % 32) + bytes(data)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return text(name) + struct.pack("<If", 6, value)
    return text(name) + struct.pack("<II", 4, value)


GOOD = [
    *(entry("general.architecture", "gpt2"), entry("gpt2.block_count", 1), entry("gpt2.embedding_length", 4)),
    *(entry("gpt2.attention.head_count", 1), entry("gpt2.attention.layer_norm_epsilon", 1e-5)),
    entry("gpt2.context_length", 8),
]
A = ("token_embd.weight", [4, 8], 0, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off"),
        (b"GGML" + bytes(60), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), f"counts {2**60} tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), f"counts {2**60} metadata entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**60), "a text of"),
        (raw(entries=[text("a") + struct.pack("<IIQ", 9, 8, 2**60)]), "texts"),
        (raw(entries=[text("a") + struct.pack("<IIQ", 9, 4, 2**60)]), "numbers"),
        (raw(entries=[text("a") + struct.pack("<IIQ", 9, 9, 1)]), "array of the type 9"),
        (raw(entries=[text("a") + struct.pack("<I", 99)]), "unknown type 99"),
        (raw(entries=[entry("a", 1), entry("a", 2)]), "occurs twice"),
        (raw(entries=[entry("general.alignment", 3)]), "general.alignment is 3"),
        (raw([A, A], GOOD), "occurs twice"),
        (raw([("x", [2**40, 2**40], 0, 0)], GOOD), "has the shape"),
        (raw([("x", [4] * 5, 0, 0)], GOOD), "5 dimensions"),
        (raw([A, ("b", [4, 8], 0, 64)], GOOD), "does not begin where the one before it ends"),
        (raw([A, ("b", [4, 8], 0, 2**62)], GOOD), "does not begin where the one before it ends"),
        (raw([("token_embd.weight", [4, 8], 0, 32)], GOOD), "does not begin where the one before it ends"),
        (raw([("token_embd.weight", [4, 999_999], 0, 0)], GOOD), "it has"),
        (raw([A], GOOD, data=8), "it has"),
        (raw([("token_embd.weight", [4, 8], 8, 0)], GOOD), "not whole blocks of Q8_0"),
        (raw([("token_embd.weight", [4, 8], 77, 0)], GOOD), "of the type 77"),
        (raw([("token_embd.weight", [4, 8], 27, 0)], GOOD), "of the type I64"),
        (raw([A], [entry("general.architecture", "llama")]), "general.architecture is 'llama'; only 'gpt2'"),
        (raw([A], []), "general.architecture is ''"),
        (raw([A], [entry("general.type", "adapter"), *GOOD]), "general.type is 'adapter'"),
        (raw([A], [entry("split.count", 3), *GOOD]), "split.count is 3"),
        (raw([A], [GOOD[0], entry("gpt2.block_count", "two"), *GOOD[2:]]), "gpt2.block_count is 'two'"),
        (raw([A], [*GOOD[:4], GOOD[5]]), "gpt2.attention.layer_norm_epsilon is None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_or_unsupported_file_is_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=r"m\.gguf: ") as raised:
        load_model(tmp_path / "m.gguf", device="cpu", dtype="float32")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tokenizer_model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"tokenizer_pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'"),
        ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id is 1000000"),
        ({"token_list": ["a", "a"]}, "the token occurs twice"),
        ({"token_merges": ["a b c"]}, "tokenizer.ggml.merges is 'a b c'"),
        ({"token_types": [1]}, "tokenizer.ggml.token_type is"),
    ],
    ids=str,
)
def test_a_tokenizer_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, more: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {f"tokenizer.ggml.{name.removeprefix('tokenizer_')}": value for name, value in more.items()}
    renamed = {"token_list": "tokens", "token_merges": "merges", "token_types": "token_type"}
    write_gguf(tmp_path / "m.gguf", {"wte.weight": torch.zeros(2, 32)}, SHAPE)
    changed = dict(metadata(tmp_path / "m.gguf"))
    for name, value in fields.items():
        stem = name.rsplit(".", 1)[1]
        changed[f"tokenizer.ggml.{renamed.get(stem, stem)}"] = value
    if "token_types" in more:
        changed["tokenizer.ggml.token_type"] = array.array("i", [1])
    if "token_list" in more:
        del changed["tokenizer.ggml.token_type"], changed["tokenizer.ggml.eos_token_id"]
        del changed["tokenizer.ggml.bos_token_id"]
    monkeypatch.setattr("headrace.model.gguf_file.metadata", lambda _: changed)
    with pytest.raises(ModelError) as raised:
        tokenizer_json(tmp_path / "m.gguf")
    assert message in str(raised.value)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", state(random_gpt2()), SHAPE)
    with open_container(tmp_path / "m.gguf") as opened:
        assert isinstance(opened, GGUFWeights)
        tensors = opened.read(frozenset(opened.tensors))
        next(tensors)
        (tmp_path / "m.gguf").write_bytes(b"x" * (tmp_path / "m.gguf").stat().st_size)
        with pytest.raises(ModelError, match="changed or replaced"):
            list(tensors)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model-q4_k.gguf", "name the file itself"),
        ("ckpt.pt", "a checkpoint of nanoGPT: run `headrace convert"),
        ("pytorch_model.bin", "pickled and is never read: run `headrace convert"),
        ("model.ckpt.index", "TensorFlow: run `headrace convert"),
        ("flax_model.msgpack", "save_pretrained"),
    ],
)
def test_a_directory_with_weights_of_another_format_says_what_to_do(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=r"neither model\.safetensors") as raised:
        weight_files(tmp_path)
    assert hint in str(raised.value)


def test_a_missing_gguf_file_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="there is no such"):
        find_model("model.gguf")


def test_the_package_is_the_one_that_unpacks() -> None:
    assert all(name in gguf.GGMLQuantizationType.__members__ for name in TYPES)

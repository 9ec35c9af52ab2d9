"""The comparison itself, on tensors small enough to work out by hand."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from headrace.client.wire.activations import CHECKPOINTS
from headrace.client.wire.comparison import CheckpointResult, check_cache, compare, worst
from headrace.config import Settings
from headrace.model.config import ModelConfig
from headrace.model.weights import expected_shapes
from headrace.worker.fidelity.adapter import with_adapter
from headrace.worker.fidelity.references.float64 import Float64
from headrace.worker.fidelity.references.text import load_text
from headrace.worker.fidelity.tensor_files import half_tolerances, loss, read_tensors
from headrace.worker.fidelity.validate import Validation, ValidationError
from tests.adapter_files import write_adapter
from tests.unit.model.gguf_files import TOKENS, write_gguf


def ours() -> dict[str, np.ndarray]:
    """Tensors of a tiny model: T 2, E 3, H 1, D 3, V 4."""
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    heads = rows.reshape(2, 1, 3)
    logits = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=np.float32)
    return {
        **{name: rows.copy() for name in ("embeddings", "ln_1", "attn", "mlp", "block_0")},
        **{name: heads.copy() for name in ("q", "k", "v", "cache_k", "cache_v", "cache_k_end", "cache_v_end")},
        "k_new": np.zeros((0, 1, 3), dtype=np.float32),
        "v_new": np.zeros((0, 1, 3), dtype=np.float32),
        "cache_rest": np.array(0.0, dtype=np.float32),
        "scores": np.zeros((1, 2, 2), dtype=np.float32),
        "logits": logits,
        "last_logits": logits[-1].copy(),
        "next_token": np.array(0),
        "probs": np.array([0.7, 0.2, 0.05, 0.05], dtype=np.float32),
        "tokens": np.array([0, 3]),
    }


def verdicts(theirs: dict[str, np.ndarray], mine: dict[str, np.ndarray] | None = None) -> dict[int, bool | None]:
    rows = compare(mine or ours(), theirs, reference="other", tolerances={})
    return {row.number: row.ok for row in rows}


def test_equal_tensors_pass_every_checkpoint() -> None:
    assert verdicts(ours()) == dict.fromkeys(range(1, 13), True)


@pytest.mark.parametrize(
    ("name", "gap", "number"),
    [
        ("ln_1", 2e-5, 1),
        ("k", 2e-4, 2),
        ("scores", 2e-4, 4),
        ("logits", 2e-3, 8),
        ("probs", 2e-6, 11),
        ("tokens", 1, 12),
    ],
)
def test_a_difference_over_the_tolerance_fails_its_checkpoint_and_no_other(name: str, gap: float, number: int) -> None:
    theirs = ours()
    theirs[name] = theirs[name] + np.asarray(gap).astype(theirs[name].dtype)
    assert [n for n, ok in verdicts(theirs).items() if not ok] == [number]


def test_a_nan_and_another_shape_fail() -> None:
    theirs = ours()
    theirs["mlp"] = np.full_like(theirs["mlp"], np.nan)
    theirs["attn"] = theirs["attn"].T.copy()
    assert [n for n, ok in verdicts(theirs).items() if not ok] == [5, 6]


def test_tensors_that_the_reference_lacks_are_not_compared() -> None:
    found = verdicts({"logits": ours()["logits"]})
    assert {n: ok for n, ok in found.items() if ok is not None} == {3: True, 8: True}


@pytest.mark.parametrize("name", ["cache_k", "cache_v_end"])
def test_the_cache_must_hold_exactly_what_was_written(name: str) -> None:
    mine = ours()
    mine[name][1, 0, 0] += 1e-7
    mine[name][1, 0, 0] = np.nextafter(mine[name][1, 0, 0], np.float32(9))
    assert check_cache(mine).ok is False


def test_the_cache_must_be_zero_elsewhere() -> None:
    mine = ours()
    mine["cache_rest"] = np.array(1e-30)
    row = check_cache(mine)
    assert row.ok is False
    assert "beyond the prompt" in row.note


def test_the_last_logits_must_be_the_last_row_bit_for_bit_and_probabilities_sum_to_one() -> None:
    mine = ours()
    mine["last_logits"] = np.nextafter(mine["last_logits"], np.float32(9))
    mine["probs"] = mine["probs"] + np.array([1e-5, 0, 0, 0], dtype=np.float32)
    theirs = {**ours(), "probs": mine["probs"]}
    found = verdicts(theirs, mine)
    assert (found[9], found[11]) == (False, False)


def test_the_worst_row_is_a_failed_one_then_the_largest() -> None:
    rows = [
        CheckpointResult(1, "a", max_abs=5.0, ok=True),
        CheckpointResult(1, "a", max_abs=1.0, ok=False),
        CheckpointResult(1, "a"),
    ]
    assert worst(rows) is rows[1]
    assert worst([rows[0], rows[2]]) is rows[0]


def test_the_tolerance_in_half_precision_is_twice_the_references_own_difference() -> None:
    exact, half = ours(), ours()
    half["mlp"] = half["mlp"] + np.float32(0.25)
    found = half_tolerances([exact], [half])
    assert found[6] == 0.5
    assert found[8] == CHECKPOINTS[8][2]
    assert not found.keys() & {3, 10, 12}


def test_tensors_are_read_from_three_kinds_of_file(tmp_path: Path) -> None:
    logits = ours()["logits"]
    save_file({"logits": logits, "unknown": logits}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", logits=logits)
    np.save(tmp_path / "logits.npy", logits)
    for name in ("a.safetensors", "b.npz", "logits.npy"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == {"logits"}
        assert np.array_equal(found["logits"], logits)


@pytest.mark.parametrize("name", ["missing.npz", "cut.safetensors", "cut.npy", "pickled.npy", "notes.txt", "other.npz"])
def test_an_invalid_tensor_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "notes.txt").write_text("x")
    np.savez(tmp_path / "other.npz", something=np.zeros(2))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_tensors(tmp_path / name)


def test_the_loss_of_a_precision_by_hand() -> None:
    """Two positions of two tokens each: (1/2, 1/2) read as (1/4, 3/4), and (1/5, 4/5) read right."""
    exact = {"logits": np.log(np.array([[0.5, 0.5], [0.2, 0.8]], dtype=np.float32))}
    other = {"logits": np.log(np.array([[0.25, 0.75], [0.2, 0.8]], dtype=np.float32)) + 3}
    found = loss([other, {}], [exact, exact])
    assert found is not None
    assert found.positions == 2
    assert found.divergence == pytest.approx((0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2, rel=1e-5)
    assert found.agreement == 0.5  # of two equal ones the first is the likeliest
    assert loss([{}], [exact]) is None


# --- models that references cannot read by themselves ----------------------------------------------------------------


def test_a_gguf_file_is_validated_against_what_the_gguf_package_unpacks(tmp_path: Path) -> None:
    config: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 24, "vocab_size": len(TOKENS)}
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in expected_shapes(ModelConfig(**config)).items()}
    written = write_gguf(tmp_path / "model.gguf", tensors, config, kind="Q8_0")
    validation = Validation(Settings(model=str(tmp_path / "model.gguf"), dtype="float32"), ["transformers"], ["hello"])
    (case,), (reference,), folder = validation.cases, validation._references, validation.folder
    exact = Float64(folder).traces([case.tokens])[0]["last_logits"]
    assert np.abs(exact - reference.trace(case.tokens)["last_logits"]).max() < 1e-3
    embedding = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(torch.from_numpy(embedding), written["wte.weight"])
    assert validation.text.requests
    del validation
    gc.collect()
    assert not folder.exists()


def test_an_adapter_that_the_worker_would_refuse_is_not_validated(tmp_path: Path) -> None:
    place = write_adapter(tmp_path / "tone", 0)
    settings = with_adapter(Settings(model="demo", dtype="float32"), place)
    assert settings.adapters_of("demo") == {"validated": place}
    file = place / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValidationError, match=r"tone/adapter_model\.safetensors"):
        Validation(settings, ["transformers"], ["Hello."], place)
    with pytest.raises(ValidationError, match="without a comma"):
        Validation(settings, ["transformers"], ["Hello."], tmp_path / "a,b")


def test_a_model_without_a_tokenizer_is_validated_from_token_ids(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, n_positions=40, vocab_size=90)).save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"pieces")
    cases = Validation(Settings(model=str(tmp_path), dtype="float32"), ["transformers"], []).cases
    assert cases[0].tokens == [72, 11, 18, 18, 21, 46]
    assert max(max(case.tokens) for case in cases) < 90


def test_text_without_a_vocabulary_of_its_own_is_compared_with_gpt2s_tokenizer(tmp_path: Path) -> None:
    """A chat template alone: AutoTokenizer would make a tokenizer of one token of it."""
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}", "eos_token": "<|endoftext|>"}')
    reference = load_text(tmp_path)
    assert reference.encode("Hello.") == [15496, 13]
    assert reference.end == 50256

"""`headrace convert`: the result computes what transformers computes from the source, or nothing is written."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from headrace.model import ModelError, load_model
from headrace.model.convert import convert, unpickle
from headrace.model.convert.directory import new_directory
from headrace.model.convert.pickled import _report
from headrace.worker.cli import main
from tests.unit.model.gguf_files import END, TOKENS, write_gguf

SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 40}
IDS = [1, 5, 39, 0, 7]
GOLDEN = Path(__file__).parents[2] / "golden" / "tensorflow"


def random_gpt2(**changed: Any) -> GPT2LMHeadModel:
    torch.manual_seed(2)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**SHAPE | ends | changed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def same(target: Path, reference: GPT2LMHeadModel) -> None:
    """Both our loader and transformers compute from the target what the reference computes."""
    with torch.no_grad():
        expected = reference(torch.tensor([IDS])).logits
        theirs = GPT2LMHeadModel.from_pretrained(target).eval()(torch.tensor([IDS])).logits
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    ours = load_model(target, device="cpu", dtype="float32").logits(torch.tensor([IDS]))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_a_pickled_directory_in_shards(tmp_path: Path) -> None:
    model = random_gpt2()
    (source := tmp_path / "source").mkdir()
    model.config.save_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    first = dict(list(state.items())[:9])
    rest = {name: value for name, value in state.items() if name not in first}
    torch.save(first | {"_orig_mod.transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}, source / "a.bin")
    torch.save(rest, source / "b.bin")
    index = {"weight_map": dict.fromkeys(first, "a.bin") | dict.fromkeys(rest, "b.bin")}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    done = convert(source, tmp_path / "target")
    same(tmp_path / "target", model)
    assert (done.family, done.kind) == ("GPT-2", "pickled PyTorch checkpoint")
    assert done.parameters == sum(p.numel() for p in model.parameters())
    assert any("_orig_mod" in note for note in done.notes)
    assert json.loads((tmp_path / "target/generation_config.json").read_text()) == {"eos_token_id": 3}
    assert not any(name.startswith(".") for name in os.listdir(tmp_path))


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt(tmp_path: Path, bias: bool) -> None:
    """As nanoGPT writes it: compiled, [out, in], the head shared, and without biases if bias=False."""
    model = random_gpt2(activation_function="gelu")
    if not bias:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.zero_()
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {
        f"_orig_mod.{name}": value.t().contiguous() if name.endswith(turned) else value
        for name, value in model.state_dict().items()
        if bias or not name.endswith(".bias")
    }
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "bias": bias, "vocab_size": 40, "dropout": 0.0}
    torch.save({"model": state, "optimizer": {"state": {}}, "model_args": sizes, "iter_num": 5}, tmp_path / "ckpt.pt")
    result = CliRunner().invoke(main, ["convert", str(tmp_path / "ckpt.pt"), str(tmp_path / "target"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["kind"], told["family"]) == ("checkpoint of nanoGPT", "GPT-2")
    assert "lm_head.weight" not in load_file(tmp_path / "target" / "model.safetensors")
    assert any("zeros" in note for note in told["notes"]) is not bias
    same(tmp_path / "target", model)


def test_a_gguf_file_with_its_tokenizer(tmp_path: Path) -> None:
    model = random_gpt2(vocab_size=len(TOKENS), n_positions=12, activation_function="gelu")
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    write_gguf(tmp_path / "m.gguf", state, SHAPE)
    words = ["convert", str(tmp_path / "m.gguf"), str(tmp_path / "target"), "--activation", "gelu"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert (
        f"target: GPT-2, {sum(p.numel() for p in model.parameters()):,} parameters, from a GGUF file" in result.stdout
    )
    same(tmp_path / "target", model)
    assert {"tokenizer.json", "tokenizer_config.json"} < set(os.listdir(tmp_path / "target"))
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "target" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert json.loads((tmp_path / "target/generation_config.json").read_text())["eos_token_id"] == END


def test_a_checkpoint_of_tensorflow(tmp_path: Path) -> None:
    """The golden files were written by TensorFlow 2's tf.compat.v1.train.Saver, with these values in this order."""
    convert(GOLDEN, tmp_path / "target")
    found = load_file(tmp_path / "target" / "model.safetensors")
    made = np.random.default_rng(3)
    layer = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"]
    layer += ["attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"]
    layer += ["mlp.c_proj.bias"]
    names = ["wpe.weight", "wte.weight", *(f"h.{i}.{n}" for i in (0, 1) for n in layer), "ln_f.weight", "ln_f.bias"]
    assert found.keys() == {f"transformer.{name}" for name in names}
    for name in names:
        tensor = found[f"transformer.{name}"]
        assert np.array_equal(tensor.numpy(), made.normal(0, 0.3, tensor.shape).astype(np.float32)), name
    load_model(tmp_path / "target", device="cpu", dtype="float32")


class Trap:
    """A pickle that makes a directory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_names_a_function_is_refused_by_its_name_and_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": Trap(tmp_path / "sprung")}, tmp_path / "model.pt")
    result = CliRunner().invoke(main, ["convert", str(tmp_path / "model.pt"), str(tmp_path / "target")])
    assert result.exit_code == 1
    assert "posix.mkdir" in result.stderr
    assert "model.state_dict()" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["model.pt"]


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ({"a": torch.zeros(1).expand(2**40)}, "fewer are stored"),
        ({"a": torch.zeros(4, dtype=torch.complex64)}, "save dense, real numbers"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "save dense, real numbers"),
        ({f"a{i}": torch.zeros(2**18).view(-1) for i in range(5)}, "larger than the file"),
        ({"a": torch.zeros(2), "module.a": torch.ones(2)}, "occurs twice"),
        ([1, 2], "but a list"),
        ({"epoch": 3}, "but a dict"),
        (torch.zeros(3), "but a Tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, loaded: Any, message: str) -> None:
    with pytest.raises(unpickle.Refused, match=message):
        unpickle._convert(loaded, 1_000, str(tmp_path / "out"))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
def test_tensors_are_found_where_training_code_puts_them(tmp_path: Path, wrapper: str) -> None:
    state = {"model.transformer.wte.weight": torch.ones(2, 2), "model.lm_head.weight": torch.ones(2, 2)}
    unpickle._convert({wrapper: state, "epoch": 3, "best": torch.ones(1)}, 1_000, str(tmp_path / "out"))
    assert load_file(tmp_path / "out").keys() == {"transformer.wte.weight"}


def test_a_child_that_is_killed_is_reported_by_its_signal(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"m\.pt: .* ended with SIGXCPU after its limit of processor time"):
        _report(tmp_path / "m.pt", -24, b"", "")


def test_the_second_wall_of_the_child() -> None:
    for event, arguments in (("socket.connect", ()), ("os.system", ()), ("open", ("x", "w", os.O_WRONLY))):
        with pytest.raises(PermissionError):
            unpickle._forbid(event, arguments)
    unpickle._forbid("open", ("x", "r", os.O_RDONLY))


def test_nothing_is_left_after_an_error_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelError, match=r"target: .*the disk is full"), new_directory(tmp_path / "target") as place:
        (place / "config.json").write_text("{}")
    for failure in (SafetensorError("I/O error: No space left on device"), OSError(errno.ENOSPC, "full")):
        with pytest.raises(ModelError, match=r"target: it cannot be written"), new_directory(tmp_path / "target"):
            raise failure
    with pytest.raises(SystemExit), new_directory(tmp_path / "target"):  # SIGTERM
        sys.exit(143)
    assert os.listdir(tmp_path) == []
    (tmp_path / "target").mkdir()
    with pytest.raises(ModelError, match="exists already"):
        convert(GOLDEN, tmp_path / "target")
    with pytest.raises(ModelError, match="there is no directory"):
        convert(GOLDEN, tmp_path / "none" / "target")


def test_what_a_killed_conversion_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    (left := tmp_path / ".headrace-convert-abandoned").mkdir()
    (left / "model.safetensors").write_text("half")
    (tmp_path / ".target.old").mkdir()  # the user's
    (tmp_path / ".headrace-convert-link").symlink_to(tmp_path / ".target.old")
    with new_directory(tmp_path / "one") as first, new_directory(tmp_path / "two") as second:
        assert not left.exists()
        assert first.exists()
        assert second.exists()
    assert sorted(os.listdir(tmp_path)) == [".headrace-convert-link", ".target.old", "one", "two"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it contains no checkpoint"),
        ({"model.safetensors": b""}, r"safetensors already; use it as it is, HEADRACE_MODEL=.*source"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "no whole model; it is a LoRA .*merge both"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b""}, "merge both"),
        ({"checkpoint-500/config.json": b"{}"}, r"it contains no checkpoint: .*; checkpoint-500 below it is a model"),
        ({"pytorch_model.bin": b'{"version": "1.0"}'}, r"pytorch_model\.bin: it is no checkpoint; name a directory"),
        ({"a.pt": b"", "b.pt": b""}, r"several checkpoints \(a\.pt, b\.pt\)"),
        ({"pytorch_model.bin.index.json": b'{"weight_map": {"a": "../x"}}'}, "which is not a file"),
        ({"model.ckpt.index": b"x" * 100}, "not the index of a TensorFlow checkpoint"),
        ({"x.gguf": b"GGUF"}, "its header is cut off"),
    ],
)
def test_a_source_that_cannot_be_converted_says_why(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    (source := tmp_path / "source").mkdir()
    for name, data in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    with pytest.raises(ModelError, match=message):
        convert(source, tmp_path / "target")
    assert os.listdir(tmp_path) == ["source"]

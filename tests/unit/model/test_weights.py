"""Reading a model directory: what is accepted, and what is refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.model import Decoder, ModelError, load_model, load_tokenizer
from headrace.model.hub import RELEASED, find_model
from headrace.model.weight_file import WeightFile, open_weights
from headrace.model.weights import expected_shapes, read_config
from tests.unit.model.references import random_reference, saved

IDS = torch.tensor([[1, 2, 3, 90]])


def read(folder: Path, **options: Any) -> Decoder:
    return load_model(folder, device="cpu", **({"dtype": "float32"} | options))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of the file."""
    weights = tensors(folder)
    change(weights)
    save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


def configure(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def refused(folder: Path, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        read(folder)


# --- what is accepted -----------------------------------------------------------------------------------------------


def test_names_are_taken_with_and_without_the_prefix(original: Path, folder: Path) -> None:
    assert all(name.startswith("transformer.") for name in tensors(folder))
    expected = read(original).logits(IDS)
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors(folder).items()}
    save_file(plain, folder / "model.safetensors")
    assert torch.equal(read(folder).logits(IDS), expected)


def test_shards_are_read_through_their_index(original: Path, tmp_path: Path) -> None:
    sharded = saved(random_reference(), tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    assert not (sharded / "model.safetensors").exists()
    assert torch.equal(read(sharded).logits(IDS), read(original).logits(IDS))


def test_mask_buffers_and_an_equal_head_in_old_files_are_accepted(original: Path, folder: Path) -> None:
    def age(weights: dict[str, Tensor]) -> None:
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
        weights["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
        weights["lm_head.weight"] = weights["transformer.wte.weight"]

    rewrite(folder, age)
    assert torch.equal(read(folder).logits(IDS), read(original).logits(IDS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_any_float_type_are_converted_to_the_requested_type(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda weights: weights.update({name: t.to(dtype) for name, t in weights.items()}))
    gpt2 = read(folder)
    assert gpt2.dtype == torch.float32
    assert torch.equal(gpt2.wte, tensors(folder)["transformer.wte.weight"].float())
    assert read(folder, dtype="bfloat16").blocks[1].c_fc.weight.dtype == torch.bfloat16
    assert read(folder, dtype=torch.float16).ln_f.bias.dtype == torch.float16
    assert read(folder, dtype="auto").dtype == torch.float32  # on a CPU


def test_a_head_of_another_float_type_is_compared_by_value(folder: Path) -> None:
    def halve(weights: dict[str, Tensor]) -> None:
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"].half().float()
        weights["lm_head.weight"] = weights["transformer.wte.weight"].half()

    rewrite(folder, halve)
    assert read(folder).logits(IDS).isfinite().all()


def test_the_digest_is_of_the_files(original: Path, folder: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((original / "model.safetensors").read_bytes()).hexdigest()
    assert read(original).digest == digest == read(folder).digest
    rewrite(folder, lambda weights: weights["transformer.ln_f.bias"].add_(1e-3))
    assert read(folder).digest != digest


def test_the_bundled_model_has_every_tensor_of_a_gpt2() -> None:
    folder = find_model("demo")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors(folder).items()}
    assert {name.removeprefix("transformer."): shape for name, shape in shapes.items()} == expected_shapes(
        read_config(folder / "config.json")
    )


# --- tensors that are refused ---------------------------------------------------------------------------------------


def spoil(name: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(weights: dict[str, Tensor]) -> None:
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (spoil("transformer.h.1.ln_2.bias", None), r"tensor h\.1\.ln_2\.bias is missing \(1 in all\)"),
        (spoil("transformer.wte.weight", None), r"tensor wte\.weight is missing"),
        (
            spoil("transformer.h.2.ln_1.bias", torch.zeros(36)),
            r"transformer\.h\.2\.ln_1\.bias does not belong to .* 2 layers",
        ),
        (spoil("score.weight", torch.zeros(3)), r"tensor score\.weight does not belong"),
        (
            spoil("transformer.h.0.attn.c_attn.weight", torch.zeros(108, 36)),
            r"transformer\.h\.0\.attn\.c_attn\.weight has shape \[108, 36\]; config\.json requires \[36, 108\]",
        ),
        (spoil("transformer.ln_f.weight", torch.zeros(1, 36)), r"ln_f\.weight has shape \[1, 36\]"),
        (spoil("lm_head.weight", torch.zeros(91, 36)), r"tensor lm_head\.weight differs from wte\.weight"),
        (spoil("lm_head.weight", torch.zeros(36, 91)), r"tensor lm_head\.weight has shape \[36, 91\]"),
        (spoil("ln_f.bias", torch.zeros(36)), r"ln_f\.bias occurs twice"),
        (spoil("transformer.ln_f.bias", torch.zeros(36).int()), r"ln_f\.bias is of type torch\.int32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    folder: Path, change: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    rewrite(folder, change)
    refused(folder, said)


# --- files that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
def test_a_cut_file_is_refused_by_its_name(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, r"model\.safetensors: not a complete safetensors file.*copy it again")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 4096,
        b"\x10" + b"\x00" * 7 + b"{not json at all" + b"\x00" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 497764107\n",
        b"\x80\x02}q\x00." * 40,
        (2).to_bytes(8, "little") + b"[]" + bytes(64),
    ],
)
def test_garbage_is_refused_by_the_files_name(folder: Path, garbage: bytes) -> None:
    (folder / "model.safetensors").write_bytes(garbage)
    refused(folder, r"model\.safetensors: not a complete safetensors file")


def shard(folder: Path, index: object) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))


@pytest.mark.parametrize("name", ["../part.safetensors", "/etc/passwd", "absent.safetensors", "", "..", "a" * 300])
def test_an_index_that_names_no_file_of_the_directory_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "part.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    shard(folder, {"weight_map": {"wte.weight": name}})
    refused(folder, r"index\.json: it names .* which is not a file in")


@pytest.mark.parametrize("index", ["[]", "{", {}, {"weight_map": []}, {"weight_map": {"wte.weight": 3}}, "[" * 100_000])
def test_an_invalid_index_is_refused(folder: Path, index: object) -> None:
    shard(folder, index)
    refused(folder, r"model\.safetensors\.index\.json: ")


def test_pickled_weights_are_named_and_never_read(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    (folder / "model.safetensors").unlink()
    torch.save({"wte.weight": Trap()}, folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin is pickled and is never read.*headrace convert")
    assert not (tmp_path / "sprung").exists()


def test_a_directory_without_weights_or_config_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, r"it contains neither model\.safetensors nor model\.safetensors\.index\.json$")
    (folder / "config.json").unlink()
    refused(folder, r"config\.json: there is no such file")


# --- files that others write ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["one file", "shards", "with a head"])
def test_files_that_are_overwritten_or_cut_after_the_start_have_no_effect(
    tmp_path: Path, form: str, dtype: str
) -> None:
    """With mapped tensors, the text would change under the same fingerprint, and a cut file would end the process."""
    model = random_reference().to(getattr(torch, dtype))
    folder = saved(model, tmp_path / "model", max_shard_size="20KB" if form == "shards" else "1GB")
    if form == "with a head":
        rewrite(folder, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    gpt2 = read(folder, dtype=dtype)
    expected, digest = gpt2.logits(IDS), gpt2.digest
    files = list(folder.glob("*.safetensors"))
    for path in files:
        size = path.stat().st_size
        path.write_bytes(bytes(size))  # in place, as `cp` does
        assert path.stat().st_size == size
    assert torch.equal(gpt2.logits(IDS), expected)
    for path in files:
        os.truncate(path, 0)
    assert torch.equal(gpt2.logits(IDS), expected)
    assert gpt2.digest == digest
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(folder) not in maps.read_text()


@pytest.mark.parametrize("change", ["in place", "with its old times", "by renaming", "shorter", "removed"])
def test_files_that_change_while_they_are_read_are_refused(
    folder: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "model.safetensors"
    real = WeightFile.read

    def read_while_it_changes(file: WeightFile, wanted: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        for count, found in enumerate(real(file, wanted)):
            if count == 3:
                data, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
                if change in ("by renaming", "removed"):
                    path.rename(folder / "old")
                if change != "removed":
                    path.write_bytes(data[:5000] if change == "shorter" else data)
                    os.utime(path, ns=times if change == "with its old times" else (1, 1))
            yield found

    monkeypatch.setattr(WeightFile, "read", read_while_it_changes)
    refused(folder, r"model\.safetensors: .*(it became shorter|changed or replaced) while it was read")


def test_the_digest_is_of_the_bytes_that_compute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is opened once: nobody can exchange it between the digest and the use."""
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **more: (opened.append(str(path)), real(path, *rest, **more))[1]
    )
    read(folder)
    assert sorted(Path(each).name for each in opened if str(folder) in each) == ["config.json", "model.safetensors"]


def everybody_writes(path: Path) -> Path:
    path.chmod(path.stat().st_mode | 0o002)
    return path


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors", "..", "vocab.json"])
def test_a_model_that_everybody_can_write_is_refused_with_the_command_that_mends_it(folder: Path, name: str) -> None:
    (folder / "vocab.json").write_text("{}")
    place = everybody_writes((folder / name).resolve())
    load = read if name != "vocab.json" else load_tokenizer
    with pytest.raises(ModelError, match=rf"chmod o-w {re.escape(str(place))}`.*HEADRACE_ALLOW_SHARED_MODEL=1"):
        load(folder)
    if name != "vocab.json":
        assert read(folder, allow_shared=True).digest
    place.chmod(0o755)
    with contextlib.suppress(ModelError):  # the vocabulary is an empty one
        load(folder)


def test_directories_of_a_group_of_others_and_in_a_sticky_directory_are_accepted(folder: Path) -> None:
    """As private groups, mounted volumes and the hub's cache of links have them."""
    folder.chmod(0o775)
    (folder / "config.json").chmod(0o664)
    folder.parent.chmod(0o1777)
    real = folder.rename(folder.parent / "snapshot")
    folder.mkdir()
    for path in real.iterdir():
        (folder / path.name).symlink_to(path)
        if os.getuid() == 0:
            os.chown(path, 12345, 12345)
    assert read(folder).digest
    everybody_writes(real)
    refused(folder, rf"chmod o-w {re.escape(str(real))}`")


@pytest.mark.parametrize(
    "name", ["generation_config.json", "model.safetensors.index.json", "added_tokens.json", "chat_template.jinja"]
)
def test_a_file_that_decides_answers_and_that_everybody_can_write_is_refused(folder: Path, name: str) -> None:
    """Whichever part of a load reads it, and also in later versions."""
    (path := folder / name).write_text("{}")
    everybody_writes(path)
    refused(folder, rf"chmod o-w {re.escape(str(path))}`")


@pytest.mark.parametrize("linked", ["model.safetensors", "config.json", ""])
def test_a_link_on_the_way_that_everybody_can_replace_is_refused(folder: Path, linked: str) -> None:
    """Link -> link in a directory that everybody can write -> file: only the one in the middle can be replaced."""
    (open_to_all := folder.parent / "open").mkdir()
    path = folder / linked if linked else folder
    real = path.rename(folder.parent / "real")
    (open_to_all / "middle").symlink_to(real)
    path.symlink_to("../open/middle" if linked else "open/middle")
    assert read(folder).digest
    everybody_writes(open_to_all)
    refused(folder, rf"chmod o-w {re.escape(str(open_to_all))}`")
    open_to_all.chmod(0o1777)
    assert read(folder).digest  # nobody else can replace what we made there


@pytest.mark.parametrize("planted", ["", "generation_config.json", "refs"])
def test_what_another_user_made_where_everybody_can_is_refused(
    folder: Path, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shared := folder.parent / "shared").mkdir()
    shared.chmod(0o1777)
    theirs = shared / "theirs"
    if planted == "generation_config.json":
        theirs.write_text("{}")
        (folder / planted).unlink(missing_ok=True)
        (folder / planted).symlink_to(theirs)
    else:
        shutil.copytree(folder, theirs)
    opened = {"": theirs, "refs": folder / ".." / "shared" / "theirs"}.get(planted, folder)
    assert read(opened).digest
    if os.getuid() == 0:
        os.chown(theirs, 12345, 12345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    refused(opened, rf"{re.escape(str(theirs))} was made by another user.*HEADRACE_ALLOW_SHARED_MODEL=1")
    assert read(opened, allow_shared=True).digest


@given(st.data())
def test_a_file_is_accepted_if_the_safetensors_library_accepts_it(data: st.DataObject) -> None:
    """Its offsets, shapes and sizes are checked as the library checks them."""
    count = data.draw(st.integers(0, 3))
    header: dict[str, Any] = {}
    at = 0
    for number in range(count):
        dtype, width = data.draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8)]))
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        end = at + width * math.prod(shape) + data.draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, max(0, end)]}
        at = max(0, end) + data.draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
    if data.draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    text = json.dumps(header).encode()
    body = random.Random(0).randbytes(max(0, at + data.draw(st.sampled_from([0, 0, 0, 1, -1]))))
    content = len(text).to_bytes(8, "little") + text + body
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "some.safetensors"
        path.write_bytes(content)
        try:
            expected: dict[str, Tensor] | None = safetensors.torch.load(content)
        except safetensors.SafetensorError:
            expected = None
        try:
            with open_weights(path) as file:
                found = dict(file.read(frozenset(file.tensors)))
                assert file.digest == hashlib.sha256(content).hexdigest()
        except ModelError:
            assert expected is None
        else:
            assert expected is not None
            assert found.keys() == expected.keys()
            for each, tensor in found.items():
                assert tensor.dtype == expected[each].dtype
                assert torch.equal(tensor.view(-1).view(torch.uint8), expected[each].view(-1).view(torch.uint8))


# --- configs that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; the supported families are gpt2"),
        ({"activation_function": "quick_gelu"}, "activation_function is 'quick_gelu'; it must be one of gelu, "),
        ({"activation_function": None}, "activation_function is None; it must be one of gelu, "),
        ({"scale_attn_weights": 0}, "scale_attn_weights is 0; it must be true or false"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight is missing .*tie_word_embeddings is false; write true"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_layer": "2"}, "n_layer is '2'"),
        ({"n_embd": 36.0}, "n_embd is 36.0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"n_positions": None}, "n_positions is None"),
        ({"n_head": True}, "n_head is True"),
        ({"n_head": 5}, "n_embd 36 is not a multiple of n_head 5"),
        ({"n_inner": 0}, "n_inner is 0"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"n_layer": 1}, r"transformer\.h\.1\..* does not belong to a GPT-2 with 1 layers"),
        ({"n_positions": 41}, r"transformer\.wpe\.weight has shape \[40, 36\]; config\.json requires \[41, 36\]"),
    ],
)
def test_configs_that_are_not_this_gpt2_are_refused(folder: Path, fields: dict[str, Any], said: str) -> None:
    configure(folder, **fields)
    refused(folder, said)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\xff\xfe", "[" * 100_000, '{"n_layer": ' + "9" * 10_000 + "}"]
)
def test_a_config_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, r"config\.json: ")


def test_a_config_that_is_a_directory_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, r"config\.json: ")


# --- missing models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "~/nowhere/at/all", "a/b/c"])
def test_a_missing_path_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="there is no such directory"):
        load_model(name)


@pytest.fixture
def unreachable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub library offline, with an empty cache: its constants are read from the environment at import."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["gpt2-medium", "someone/gpt2-of-theirs", "not a name"])
def test_an_unreachable_hub_is_reported_with_three_solutions(unreachable_hub: Path, name: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(name)
    said = str(caught.value)
    assert repr(name) in said
    for way in (f"hf download {RELEASED.get(name, name)}", "HEADRACE_MODEL at a directory", "HEADRACE_MODEL=demo"):
        assert way in said


@pytest.mark.parametrize("repo", ["openai-community/gpt2-medium", "gpt2-medium"])
def test_a_cached_model_is_found_without_the_hub(unreachable_hub: Path, original: Path, repo: str) -> None:
    place = unreachable_hub / f"models--{repo.replace('/', '--')}"
    shutil.copytree(original, place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    assert torch.equal(load_model("gpt2-medium", device="cpu").logits(IDS), read(original).logits(IDS))


@pytest.mark.parametrize(("option", "said"), [({"dtype": "int4"}, "dtype 'int4'"), ({"device": "cuda:0"}, "no CUDA")])
def test_unsupported_devices_and_types_are_refused(original: Path, option: dict[str, str], said: str) -> None:
    if "device" in option and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ModelError, match=said):
        load_model(original, **{"device": "cpu", **option})

"""Our model and the references, each by its own error against float64; and float64 against what others computed.

The tolerances of the checkpoints are for our own error. A library's rounding errors are not ours, and differ from one
CPU to another: the tests look whether the right tensors are read from it, and the end of the run lists what is over a
tolerance.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from headrace.model import Decoder, load_model
from headrace.worker.fidelity.references import REFERENCES, Reference, ReferenceUnavailable, load_reference
from headrace.worker.fidelity.references.base import PACKAGES
from headrace.worker.fidelity.references.files import StoredWeights, read_weights
from headrace.worker.fidelity.references.float64 import NAME, Float64
from tests.golden.make_golden import CASES, DEMO, HERE, LIBRARIES, record, weights_sha256

Tensors = dict[str, NDArray[Any]]

#: The table of the checkpoints: largest absolute difference in float32.
TOLERANCES = {
    "embeddings": 1e-5,
    "ln_1": 1e-5,
    **dict.fromkeys(("q", "k", "v", "scores", "attn", "mlp", "block_0"), 1e-4),
    # Not in the table: the sums of all blocks, held to what it says of one.
    "hidden": 1e-4,
    **dict.fromkeys(("logits", "first_logits", "last_logits"), 1e-3),
    "next_token": 0,
    "probs": 1e-6,
}
#: What tells a wrong tensor of a library from its rounding errors: a wrong one is off by more than a hundredth.
WRONG = {name: 10 * tolerance for name, tolerance in TOLERANCES.items()}

ARBITER = Float64(DEMO)
PROMPTS = {
    **CASES,
    "one token": [50256],
    "200 tokens": random.Random(5).choices(range(50257), k=200),
}
SHAPES = {
    "n_layer": 2,
    "n_head": 5,
    "n_embd": 40,
    "n_inner": 72,
    "n_positions": 16,
    "vocab_size": 101,
    "layer_norm_epsilon": 1e-4,
}
TINY_PROMPT = [3, 100, 0, 7, 7]


def largest_differences(ours: Tensors, theirs: Tensors) -> dict[str, float]:
    """Of the tensors that both have; shapes must be the same."""
    shared = ours.keys() & theirs.keys()
    assert {name: ours[name].shape for name in shared} == {name: theirs[name].shape for name in shared}
    return {name: float(np.abs(ours[name] - theirs[name]).max()) for name in shared}


def assert_close(ours: Tensors, theirs: Tensors, tolerances: dict[str, float] = TOLERANCES) -> None:
    found = largest_differences(ours, theirs)
    assert len(found) >= 11
    # `not <=`, because a NaN is never greater.
    assert {name: worst for name, worst in found.items() if not worst <= tolerances.get(name, 0)} == {}


def model_trace(model: Decoder, token_ids: Sequence[int]) -> Tensors:
    return {name: tensor[0].numpy() for name, tensor in model.trace(torch.tensor([token_ids])).items()}


def assert_library(errors: dict[str, float], note: Callable[[str, object], None], subject: str) -> None:
    """No wrong tensors; what is over a checkpoint's tolerance is noted for the summary."""
    assert {name: worst for name, worst in errors.items() if not worst <= WRONG[name]} == {}
    for name, worst in errors.items():
        if worst > TOLERANCES[name]:
            note("library_error", f"{subject}: {name} {worst:.2g}, tolerance {TOLERANCES[name]:.0e}")


def load_or_skip(name: str, folder: Path) -> Reference:
    try:
        return load_reference(name, folder)
    except ReferenceUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def demo() -> Decoder:
    return load_model("demo", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def live() -> Callable[[str], Reference]:
    """A reference by name, with the bundled model; skips the test where its library cannot run."""
    loaded: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in loaded:
            loaded[name] = load_or_skip(name, DEMO)
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def traced(live: Callable[[str], Reference]) -> Callable[[str, str], Tensors]:
    """A reference's, or float64's, trace of one of PROMPTS, made once."""
    made: dict[tuple[str, str], Tensors] = {}

    def get(name: str, prompt: str) -> Tensors:
        if (name, prompt) not in made:
            made[name, prompt] = (ARBITER if name == NAME else live(name)).trace(PROMPTS[prompt])
        return made[name, prompt]

    return get


# What was recorded


@pytest.mark.parametrize("library", LIBRARIES)
def test_recorded_outputs_are_those_of_the_bundled_weights(library: str) -> None:
    with safe_open(HERE / f"{library}.safetensors", framework="np") as file:
        about = file.metadata()
    assert about["weights_sha256"] == weights_sha256(), "run `python -m tests.golden.make_golden`"
    assert json.loads(about["cases"]) == CASES
    assert about["library"] == f"{library} {PACKAGES[library][1]}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_float64_computes_what_others_recorded(library: str, case: str) -> None:
    """Without probabilities, which were not recorded."""
    recorded = load_file(HERE / f"{library}.safetensors")
    theirs = {name.removeprefix(f"{case}."): tensor for name, tensor in recorded.items() if name.startswith(f"{case}.")}
    exact = ARBITER.trace(CASES[case])
    assert_close(exact | {"first_logits": exact["logits"][0]}, theirs)


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_still_computes_what_was_recorded(
    library: str, live: Callable[[str], Reference], record_property: Callable[[str, object], None]
) -> None:
    recorded, made = load_file(HERE / f"{library}.safetensors"), record(live(library))
    assert made.keys() == recorded.keys()
    for case in CASES:
        exact = ARBITER.trace(CASES[case])
        exact["first_logits"] = exact["logits"][0]
        ours = {name.removeprefix(f"{case}."): t for name, t in made.items() if name.startswith(f"{case}.")}
        assert_library(largest_differences(ours, exact), record_property, f"{live(library).name}, {case}")


# Against float64


@pytest.mark.parametrize("prompt", PROMPTS)
def test_float64_is_transformers_in_float64(prompt: str) -> None:
    """Code of others in the same precision: what both have in common is GPT-2."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits = theirs(torch.tensor([PROMPTS[prompt]])).logits[0].numpy()
    assert np.abs(ARBITER.trace(PROMPTS[prompt])["logits"] - logits).max() < 1e-10


def test_float64_measures_how_far_each_token_is_from_the_likeliest() -> None:
    prompts = [CASES["hello"], CASES["quick"]]
    likeliest = [ARBITER.generate(prompt, 3) for prompt in prompts]
    assert [margins.tolist() for margins in ARBITER.margins(prompts, likeliest)] == [[0, 0, 0]] * 2
    other = [likeliest[0][0], 5, likeliest[0][2]]
    (margins,) = ARBITER.margins(prompts[:1], [other])
    after = ARBITER.trace([*prompts[0], other[0]])["last_logits"]
    assert margins[0] == 0
    assert margins[1] == pytest.approx(after.max() - after[5], rel=1e-9)


def test_float64_keeps_no_logits_of_long_prompts_where_told() -> None:
    short, long = ARBITER.traces([[1, 2], [1, 2, 3]], logits_limit=2)
    assert short["logits"].shape == (2, 50257)
    assert "logits" not in long
    np.testing.assert_allclose(long["last_logits"], ARBITER.trace([1, 2, 3])["logits"][-1], atol=1e-10)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", REFERENCES)
def test_the_right_tensors_are_read_from_each_library(
    name: str, prompt: str, traced: Callable[[str, str], Tensors], record_property: Callable[[str, object], None]
) -> None:
    theirs, exact = traced(name, prompt), traced(NAME, prompt)
    assert theirs.keys() == exact.keys() == TOLERANCES.keys() - {"first_logits"}
    assert_library(largest_differences(theirs, exact), record_property, f"{name}, {prompt}")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_our_own_error_is_within_every_checkpoint(
    prompt: str, demo: Decoder, traced: Callable[[str, str], Tensors]
) -> None:
    assert_close(model_trace(demo, PROMPTS[prompt]), traced(NAME, prompt))


def test_as_many_tokens_as_the_model_has_positions(demo: Decoder) -> None:
    token_ids = random.Random(6).choices(range(50257), k=1024)
    assert_close(model_trace(demo, token_ids), ARBITER.trace(token_ids))


@pytest.mark.parametrize("name", REFERENCES)
def test_shapes_and_types(name: str, traced: Callable[[str, str], Tensors]) -> None:
    trace = traced(name, "quick")
    assert {key: tensor.shape for key, tensor in trace.items()} == {
        **dict.fromkeys(("embeddings", "ln_1", "attn", "mlp", "block_0"), (3, 128)),
        **dict.fromkeys(("q", "k", "v"), (3, 2, 64)),
        **dict.fromkeys(("last_logits", "probs"), (50257,)),
        "scores": (2, 3, 3),
        "logits": (3, 50257),
        "next_token": (),
        "hidden": (5, 3, 128),
    }
    assert {key for key, tensor in trace.items() if tensor.dtype != np.float32} == {"next_token"}
    assert trace["next_token"].dtype == np.int64
    assert float(trace["probs"].astype(np.float64).sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_scores_are_those_before_the_mask(name: str, traced: Callable[[str, str], Tensors]) -> None:
    trace = traced(name, "quick")
    q, k = (trace[part].astype(np.float64).transpose(1, 0, 2) for part in "qk")
    # Any order of summing 64 products, then the scale: Higham 2002, section 3.1.
    bound = 66 * 2.0**-24 * np.abs(q) @ np.abs(k).transpose(0, 2, 1) / 8
    assert (np.abs(trace["scores"] - q @ k.transpose(0, 2, 1) / 8) <= bound).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_continuation_is_argmax_of_what_came_before(name: str, live: Callable[[str], Reference]) -> None:
    tokens = live(name).generate(CASES["hello"], 4)
    (margins,) = ARBITER.margins([CASES["hello"]], [tokens])
    assert margins.shape == (4,)
    assert margins.max() <= 2 * TOLERANCES["logits"], "neither float64's token nor nearly tied with it"
    assert live(name).generate(CASES["hello"], 0) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_in_half_precision(dtype: str, traced: Callable[[str, str], Tensors]) -> None:
    pytest.importorskip("transformers")
    half = load_reference("transformers", DEMO, dtype).trace(CASES["hello"])
    difference = largest_differences(half, traced(NAME, "hello"))["logits"]
    assert 1e-4 < difference < 1


# Forms of a model's files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random GPT-2 of odd shapes, as transformers writes it, in several forms."""
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPES, initializer_range=0.3))
    for parameter in model.parameters():  # biases start as zeros, which would hide one that is left out
        parameter.data += 0.01 * torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    folder = tmp_path_factory.mktemp("tiny")
    forms = {form: folder / form for form in ("prefixed", "plain", "shards", "float16", "bfloat16")}
    model.save_pretrained(forms["prefixed"])
    model.save_pretrained(forms["shards"], max_shard_size="20KB")
    assert len(list(forms["shards"].glob("*.safetensors"))) > 2
    forms["plain"].mkdir()
    shutil.copy(forms["prefixed"] / "config.json", forms["plain"])
    weights = load_file(forms["prefixed"] / "model.safetensors")
    assert all(name.startswith("transformer.") for name in weights)
    plain = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    plain["h.0.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), bool))  # old files have their masks among the weights
    save_file(plain, forms["plain"] / "model.safetensors", metadata={"format": "pt"})
    model.to(torch.float16).save_pretrained(forms["float16"])
    model.to(torch.bfloat16).save_pretrained(forms["bfloat16"])
    return forms


@pytest.mark.parametrize("form", ["prefixed", "plain", "shards", "float16", "bfloat16"])
@pytest.mark.parametrize("name", REFERENCES)
def test_every_form_of_file(name: str, form: str, tiny: dict[str, Path]) -> None:
    exact = Float64(tiny[form]).trace(TINY_PROMPT)
    assert_close(model_trace(load_model(tiny[form], device="cpu", dtype="float32"), TINY_PROMPT), exact)
    theirs = load_or_skip(name, tiny[form]).trace(TINY_PROMPT)
    assert_close(theirs, exact, WRONG)
    assert theirs["scores"].shape == (5, 5, 5)


def test_reader_gives_the_stored_numbers(tiny: dict[str, Path]) -> None:
    for form in ("plain", "shards", "float16", "bfloat16"):
        state = load_model(tiny[form], device="cpu", dtype="float32")
        weights, stored = read_weights(tiny[form]), StoredWeights(tiny[form])
        assert weights.keys() == stored.keys()
        assert all(np.array_equal(stored[name], weight) for name, weight in weights.items())
        assert not any(name.endswith(".attn.bias") for name in weights)
        np.testing.assert_array_equal(weights["wte.weight"], state.wte.numpy())
        np.testing.assert_array_equal(weights["h.1.attn.c_attn.weight"], state.blocks[1].c_attn.weight.numpy())


# What is refused


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="transformers, tinygrad, candle"):
        load_reference("mistral", DEMO)
    with pytest.raises(ValueError, match="float32, bfloat16, float16, int8"):
        load_reference("transformers", DEMO, "int4")


@pytest.mark.parametrize("name", LIBRARIES)
def test_half_precision_is_for_transformers_only(name: str) -> None:
    with pytest.raises(ReferenceUnavailable, match="float32 only"):
        load_reference(name, DEMO, "bfloat16")


@pytest.mark.parametrize("name", REFERENCES)
def test_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # an import of it now raises ImportError
    package, version = PACKAGES[name]
    with pytest.raises(ReferenceUnavailable, match=rf"{package}=={version}") as caught:
        load_reference(name, DEMO)
    assert "pip install '.[references]' -c constraints.txt` in a clone" in str(caught.value)


def test_tinygrad_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tinygrad")
    monkeypatch.setattr(shutil, "which", lambda command: None)
    with pytest.raises(ReferenceUnavailable, match="install clang"):
        load_reference("tinygrad", DEMO)


@pytest.mark.parametrize("name", REFERENCES)
def test_tokens_that_do_not_fit_are_refused(name: str, live: Callable[[str], Reference]) -> None:
    for token_ids, reason in (([], "no tokens"), ([50257], "50257"), ([-1], "-1"), ([0] * 1025, "1025")):
        with pytest.raises(ValueError, match=reason):
            live(name).trace(token_ids)
    with pytest.raises(ValueError, match="1025 tokens"):
        live(name).generate([0] * 1020, 6)


@pytest.mark.parametrize("name", REFERENCES)
def test_files_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_reference(name, tmp_path)
    config = json.loads((DEMO / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_reference(name, tmp_path)
    for field, value in (("activation_function", "mish"), ("model_type", "gptj"), ("add_cross_attention", True)):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(ValueError, match=field):
            load_reference(name, tmp_path)

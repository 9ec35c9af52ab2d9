"""Building an engine from the settings."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.client.wire.requests import parse_request
from headrace.config import Settings
from headrace.model import Decoder, ModelError, load_model, load_tokenizer
from headrace.model.adapters.packed import PackedAdapter
from headrace.model.generation_config import Ends
from headrace.model.kernels import isa
from headrace.model.tokenizer import TiktokenTokenizer
from headrace.model.tokenizers.base import Described
from headrace.worker.engine import build
from headrace.worker.engine.build import build_engine, check_vocabulary, default_budget, load_engine
from headrace.worker.engine.cache_slots import length_classes
from headrace.worker.engine.fingerprint import MACHINE_CODE_VARIABLES, NUMERICS, fingerprint
from headrace.worker.engine.self_test import is_batch_invariant
from tests.unit.model.references import random_reference, saved
from tests.unit.worker.engine.engine_helpers import ask, demo_engine, demo_model, demo_tokenizer, drive, torch_model


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("context", "classes"),
    [
        (2, [16]),
        (100, [112]),
        (128, [128]),
        (129, [128, 144]),
        (512, [128, 256, 512]),
        (1000, [128, 256, 512, 1008]),
        (1024, [128, 256, 512, 1024]),
        (2048, [128, 256, 512, 1024, 2048]),
    ],
)
def test_length_classes_end_at_the_context_in_steps_of_16(context: int, classes: list[int]) -> None:
    assert length_classes(context) == classes


def test_the_cache_takes_at_most_a_quarter_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("os.sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert default_budget(1_000_000, cpu) == 1_000_000
    assert default_budget(2_000_000, cpu) == 1_024_000


def test_settings_reach_the_engine() -> None:
    settings = Settings(
        model="demo", served_name="mine", slots=3, max_context=300, step_tokens=99, prefill_chunk=48, threads=1,
        kv_cache_bytes=10_000_000, draft_tokens=5, prefix_cache=False, device="cpu", dtype="float32",
    )  # fmt: skip
    engine = build_engine(settings)
    slots = engine.scheduler.slots
    assert (engine.model_name, engine.max_context, engine.scheduler.max_rows) == ("mine", 300, 3)
    assert (engine.scheduler.step_tokens, engine.scheduler.prefill_chunk) == (99, 48)
    assert engine.scheduler.draft_tokens == 5
    assert engine.scheduler.slots.prefixes.chunk == 0
    assert (list(slots.arenas), slots.budget_bytes) == ([128, 256, 304], 10_000_000)
    assert torch.get_num_threads() == 1
    assert {"float32", f"numerics-{NUMERICS}"} < set(engine.fingerprint.split("/"))
    (result,) = drive(engine, engine.submit(ask([1] * 290, max_tokens=10)))
    assert (result.model, result.fingerprint) == ("mine", engine.fingerprint)


@pytest.mark.parametrize("missing", ["invariance", "kernel"])
def test_no_tokens_are_proposed_without_batch_invariance(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "invariance":
        monkeypatch.setattr("headrace.worker.engine.build.is_batch_invariant", lambda *_: False)
    else:
        monkeypatch.setattr("headrace.model.kv_cache.KVCache.decode_kernel", lambda _: None)
    engine = build_engine(Settings(model="demo", device="cpu", dtype="float32"))
    assert engine.scheduler.draft_tokens == 0


@pytest.mark.parametrize("change", ["a link to the directory", "a file", "a new file", "a file that is read again"])
def test_a_model_that_is_replaced_while_it_is_loaded_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would have the weights of one version and the vocabulary or the end of text of the next."""
    first, second = tmp_path / "v1", tmp_path / "v2"
    for each in (first, second):
        saved(random_reference(vocab_size=50257), each)
    (current := tmp_path / "current").symlink_to(first)
    settings = Settings(model=str(current), served_name="tiny", device="cpu", dtype="float32")
    assert build_engine(settings).fingerprint
    real = build.load_tokenizer

    def load_while_it_changes(*args: Any, **options: Any) -> Any:
        if change == "a link to the directory":
            (staged := tmp_path / "staged").symlink_to(second)
            staged.replace(current)
        elif change == "a file":
            (second / "generation_config.json").replace(first / "generation_config.json")
        elif change == "a new file":
            (first / "chat_template.jinja").write_text("{{ messages }}")
        else:
            (second / "config.json").replace(first / "config.json")
        return real(*args, **options)

    monkeypatch.setattr(build, "load_tokenizer", load_while_it_changes)
    with pytest.raises(ModelError, match="changed or replaced while the model was loaded; start again"):
        build_engine(settings)


@pytest.mark.parametrize("name", ["MKL_CBWR", "ONEDNN_MAX_CPU_ISA"])
def test_variables_that_choose_other_machine_code_are_part_of_the_fingerprint(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MKL_CBWR=COMPATIBLE, for one, changes the last bits of torch's products, and none of the kernels'."""
    for variable in MACHINE_CODE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    given = torch_model(), demo_tokenizer(), Ends((50256,), 50256), 128, True
    plain = fingerprint(*given)
    assert "environment" not in plain
    monkeypatch.setenv(name, "")
    assert fingerprint(*given) == plain
    monkeypatch.setenv(name, "COMPATIBLE")
    changed = fingerprint(*given)
    assert set(plain.split("/")) < set(changed.split("/"))
    monkeypatch.setenv(name, "AVX2")
    assert len({fingerprint(*given), changed, plain}) == 3
    assert "environment" not in fingerprint(demo_model(), *given[1:])


def test_max_context_is_limited_by_the_models_positions() -> None:
    engine = load_engine(Settings(model="demo", max_context=5000, device="cpu", dtype="float32"))
    assert engine.max_context == 1024


def test_a_budget_that_does_not_hold_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="HEADRACE_KV_CACHE_BYTES is 1000; one sequence of 1024 tokens needs 4194304"):
        build_engine(Settings(model="demo", kv_cache_bytes=1000, device="cpu", dtype="float32"))


def test_the_default_engine_holds_its_slots_and_is_batch_invariant() -> None:
    engine = demo_engine()
    assert engine.scheduler.slots.budget_bytes == 64 * 1024 * 4096
    assert engine.fingerprint.endswith("/batch-invariant")


def test_the_fingerprint_differs_if_results_may_differ() -> None:
    model, tokenizer, ends = demo_model(), load_tokenizer("demo"), Ends((50256,), 50256)
    assert isinstance(tokenizer, TiktokenTokenizer)
    base = fingerprint(model, tokenizer, ends, 128, True)
    half = load_model("demo", device="cpu", dtype="bfloat16")
    other, again = (load_model("demo", device="cpu", dtype="float32") for _ in range(2))
    other.digest = "0" * 64
    again.config = replace(model.config, layer_norm_epsilon=1e-6)
    prints = {fingerprint(each, tokenizer, ends, 128, True) for each in (model, half, other, again)}
    prints |= {fingerprint(torch_model(), tokenizer, ends, chunk, True) for chunk in (64, 128)}
    prints |= {fingerprint(model, tokenizer, ends, 128, False)}
    prints |= {
        fingerprint(model, tokenizer, Ends((50256, 198), 50256), 128, True),
        fingerprint(model, tokenizer, Ends(), 128, True),
    }
    prints |= {fingerprint(model, TiktokenTokenizer(tokenizer._encoding, "0" * 64), ends, 128, True)}
    chatting = [
        tokenizer.described_by(Described({"eos_token": end}, "{{ eos_token }}"), parses_special_tokens=True)
        for end in ("a", "b")
    ]
    prints |= {fingerprint(model, each, ends, 128, True) for each in chatting}
    prints |= {fingerprint(model, tokenizer, ends, 128, True, parse_special_tokens=True)}
    assert len(prints) == 13
    assert fingerprint(model, tokenizer, ends, 128, True, parse_special_tokens=False) == base  # the default
    assert fingerprint(load_model("demo", device="cpu", dtype="float32"), tokenizer, ends, 128, True) == base
    assert f"weights-{model.digest[:12]}" in base


@pytest.mark.skipif(not isa.available(), reason="only the kernels have the same bits on every machine")
def test_the_fingerprint_of_float32_and_int8_names_the_arithmetic_and_no_machine() -> None:
    tokenizer, ends = demo_tokenizer(), Ends((50256,), 50256)
    for precision in ("float32", "int8"):
        prints = set()
        for rung in isa.available():
            for threads in (1, 2):
                isa.use(rung.name)
                torch.set_num_threads(threads)
                model = load_model("demo", device="cpu", dtype=precision)
                prints |= {fingerprint(model, tokenizer, ends, chunk, True) for chunk in (32, 128)}
        isa.use(isa.AUTO)
        (found,) = prints
        assert found.split("/")[1:3] == [f"numerics-{NUMERICS}", precision]
        assert len(found.split("/")) == 9


def test_the_self_test_finds_batch_invariance_on_this_machine() -> None:
    assert is_batch_invariant(demo_model())


class Noisy(Decoder):
    """A model whose logits depend, in their last bits, on how many rows are computed together."""

    def head(self, hidden: Tensor, adapters: Sequence[PackedAdapter | None] = ()) -> Tensor:
        return super().head(hidden, adapters) * (1.0 + 2.0**-22 * (len(hidden) > self.quiet_below))

    quiet_below = 1


def test_a_model_that_computes_no_numbers_is_refused_at_load() -> None:
    model = load_model("demo", device="cpu", dtype="float32")
    model.ln_f.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match="logits are not finite in float32: a weight is NaN"):
        is_batch_invariant(model)


@pytest.mark.parametrize("quiet_below", [1, 4, 20])
def test_the_self_test_detects_a_model_that_is_not_batch_invariant(quiet_below: int) -> None:
    model = load_model("demo", device="cpu", dtype="float32")
    model.__class__ = Noisy
    model.quiet_below = quiet_below  # type: ignore[attr-defined]
    assert not is_batch_invariant(model)


def test_a_vocabulary_larger_than_the_embedding_is_refused() -> None:
    config = replace(demo_model().config, vocab_size=50000)
    with pytest.raises(ModelError, match=r"has 50257 tokens and its embedding 50000; .*resize_token_embeddings"):
        check_vocabulary("x", config, demo_tokenizer())
    check_vocabulary("x", replace(config, vocab_size=50304), demo_tokenizer())


def test_the_engine_uses_the_configured_number_of_threads_from_its_first_gemm_on() -> None:
    """OpenMP has a setting for each thread, and new threads begin with the default."""
    seen: list[int] = []
    engine = load_engine(Settings(model="demo", threads=3, device="cpu", dtype="float32", slots=2))
    model: Any = engine.runner.model  # type: ignore[attr-defined]
    forward = model.forward

    def watched(*args: Any) -> Any:
        seen.append(openmp_threads())
        return forward(*args)

    model.forward = watched
    with engine:
        engine.submit(parse_request({"prompt": "Hello.", "max_tokens": 1})).result()
    assert seen == [3]


def openmp_threads() -> int:
    """The number of threads that oneDNN uses when this thread calls it."""
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    return int(ctypes.CDLL(sorted(paths, key=lambda path: "torch" not in path)[0]).omp_get_max_threads())

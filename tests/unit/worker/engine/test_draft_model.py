"""A draft model changes only the number of steps: whatever it proposes, results have the same bits without it."""

from __future__ import annotations

import functools
import gc
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.client.wire.requests import GenerateRequest
from headrace.config import Settings
from headrace.model import Decoder, ModelError
from headrace.worker.engine.build import build_engine, find_files
from headrace.worker.engine.draft_model import DraftModel
from headrace.worker.engine.draft_proposer import DRAFTED_SEQUENCES, DraftProposer
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.scheduler import ModelRunnerOutput, SchedulerOutput
from headrace.worker.engine.sequence import Sequence
from tests.unit.model.references import demo_reference, random_reference, saved
from tests.unit.worker.engine.engine_helpers import (
    ask,
    build,
    demo_engine,
    demo_model,
    drive,
    idle,
    substance,
    tokens_of,
)
from tests.unit.worker.engine.test_speculative_decoding import CHANT, texts


class Eager(DraftProposer):
    """Proposes as many tokens as it may, so that the tests do not depend on the clock; no n-grams."""

    def acceptance(self, sequence: Sequence) -> float:
        return 1.1

    def _best(self, load: int, acceptance: float, most: int) -> tuple[int, float]:
        return most, 2.0


@functools.cache
def stranger() -> Decoder:
    """A model with random weights, which is nearly always wrong, and shorter than the bundled one."""
    reference = random_reference(n_layer=1, n_head=1, n_embd=64, n_positions=200, vocab_size=50257)
    weights = {name.removeprefix("transformer."): tensor for name, tensor in reference.state_dict().items()}
    config = demo_model().config
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 64, "n_positions": 200}
    return Decoder(type(config)(**shape, vocab_size=config.vocab_size), weights)


def drafted(small: Decoder, *, proposer: type[DraftProposer] = Eager, **options: Any) -> Engine:
    """An engine of the bundled model with this draft model."""
    engine = build(draft_tokens=3, **options)
    draft = DraftModel(small, length=small.config.n_positions, slots=DRAFTED_SEQUENCES)
    engine.scheduler.drafts = proposer(draft)
    return engine


@functools.cache
def requests() -> list[GenerateRequest]:
    """Texts that the bundled model repeats and others, with every kind of parameter, end and prompt."""
    kinds: list[dict[str, Any]] = [
        {"logprobs": 2, "max_tokens": 20},
        {"temperature": 0.5, "n": 3, "logprobs": 1},
        {"temperature": 1.0, "top_p": 0.8, "top_k": 50, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 0.6, "frequency_penalty": 0.1, "logit_bias": {11: -1.5}},
        {"stop": ["King, said the"], "min_tokens": 3},
        {"stop_token_ids": [2677], "min_tokens": 6, "logprobs": 1},
        {"prompt": tokens_of(150), "temperature": 0.8, "logprobs": 0},
        {"prompt": tokens_of(150), "echo": True, "logprobs": 1},
        {"max_tokens": 2},
        {"max_tokens": 128 - len(CHANT)},  # to the very end of its slot
    ]
    return [ask(**{"prompt": CHANT, "max_tokens": 12, "ignore_eos": True, "seed": i, **k}) for i, k in enumerate(kinds)]


@functools.cache
def expected() -> list[dict[str, Any]]:
    """Their results without speculative decoding."""
    return texts(build(), requests())


@pytest.mark.parametrize(("kind", "slots"), [("itself", 4), ("stranger", 2)])
def test_tokens_and_log_probabilities_have_the_same_bits_with_a_draft_model(kind: str, slots: int) -> None:
    engine = drafted(demo_model() if kind == "itself" else stranger(), slots=slots)
    assert texts(engine, requests()) == expected()
    assert idle(engine)
    stats = engine.stats()
    assert stats.proposed > 50
    assert stats.accepted > 0.9 * stats.proposed if kind == "itself" else stats.accepted < 0.1 * stats.proposed


def test_texts_of_a_given_form_have_the_same_bits_with_a_draft_model() -> None:
    form = {"regex": "(said the King, |[a-z]{2,5} ){4,9}"}
    formed = [ask(CHANT, max_tokens=40, structured_outputs=form, temperature=h, seed=7, logprobs=1) for h in (0, 0.8)]
    found = []
    for engine in (build(), drafted(demo_model(), slots=2)):
        futures = [engine.submit(request) for request in formed]
        while len(engine._preparations):
            time.sleep(0.001)
        found.append([substance(result) for result in drive(engine, *futures)])
    assert found[0] == found[1]
    assert engine.stats().accepted > 2


def test_jobs_that_follow_a_cancelled_one_in_the_slots_of_the_draft_model_have_the_same_bits() -> None:
    engine = drafted(demo_model(), slots=2)
    doomed = engine.submit(ask(CHANT, max_tokens=90, ignore_eos=True))
    while engine.stats().accepted < 6:
        engine.step()
    doomed.cancel()
    assert texts(engine, requests()[:3]) == expected()[:3]


@pytest.mark.parametrize("heat", [0, 0.8])
def test_all_tokens_are_accepted_if_the_draft_model_is_the_model(heat: float) -> None:
    """Drawn with the same random numbers, they are the same."""
    engine = drafted(demo_model())
    drive(engine, engine.submit(ask(tokens_of(40), max_tokens=41, temperature=heat, seed=3, ignore_eos=True)))
    assert engine.stats().proposed == engine.stats().accepted
    # The first token comes with the prompt, each of the next ten steps gives four.
    assert (engine.stats().steps, engine.stats().accepted) == (11, 30)


def test_it_continues_a_text_as_transformers_does_whatever_was_accepted() -> None:
    reference = demo_reference()
    draft = DraftModel(demo_model(), length=256, slots=2)
    pair = [Sequence(ask(max_tokens=90), tokens_of(30, seed=i), 0, 0) for i in (1, 2)]
    for outputs in ([[5], [7]], [[5, 9], [7, 8, 11, 13]], [[5, 9, 2, 4, 4], [7]], [[5, 9, 2, 4, 4], [7, 1]]):
        for sequence, output in zip(pair, outputs, strict=True):
            sequence.output = output
        proposed = draft.propose({pair[0]: 3, pair[1]: 4})
        for sequence, count in zip(pair, (3, 4), strict=True):
            text = [*sequence.prompt, *sequence.output]
            for _ in range(count):
                with torch.inference_mode():
                    text.append(int(reference(torch.tensor([text])).logits[0, -1].argmax()))
            assert proposed[sequence] == text[-count:]
    assert draft.missing(pair[0]) == 1
    assert draft.missing(Sequence(ask(), [1, 2, 3], 0, 0)) == 3


def test_its_cache_has_the_size_that_it_says() -> None:
    draft = DraftModel(demo_model(), length=256, slots=2)
    assert draft.cache_bytes == 2 * 256 * (2 * 4 * 128 * 4)  # slots, positions, keys and values of 4 layers of 128


def test_a_draft_model_with_fewer_positions_stops_proposing_where_they_end() -> None:
    request = ask(tokens_of(190), max_tokens=30, ignore_eos=True)
    engine = drafted(stranger())
    assert texts(engine, [request]) == texts(build(), [request])
    assert 0 < engine.stats().proposed < 50


def test_more_texts_than_its_slots_get_no_proposed_tokens() -> None:
    engine = drafted(demo_model())
    texts(engine, [ask(tokens_of(20, seed=i), max_tokens=5, ignore_eos=True) for i in range(DRAFTED_SEQUENCES + 1)])
    assert engine.stats().proposed == 0


def test_a_draft_model_that_fails_is_not_asked_again_and_fails_no_job() -> None:
    calls = []

    class Broken(DraftModel):
        def propose(self, counts: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
            calls.append(len(counts))
            raise MemoryError

    engine = build(draft_tokens=5)
    engine.scheduler.drafts = Eager(Broken(demo_model(), length=1024, slots=4))
    assert texts(engine, requests()[:2]) == expected()[:2]
    assert len(calls) == 1


def test_a_step_that_fails_with_proposed_tokens_is_computed_without_them() -> None:
    class NoDrafts(ModelRunner):
        def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
            if step.proposed:
                raise RuntimeError("the kernel is not in the mood")
            return super().run(step)

    engine = drafted(demo_model(), runner=NoDrafts)
    assert texts(engine, requests()[:2]) == expected()[:2]
    assert engine.stats().accepted == 0


def test_a_job_that_has_ended_is_not_kept_alive() -> None:
    engine = drafted(demo_model())
    future = engine.submit(ask(CHANT, max_tokens=20, ignore_eos=True))
    (sequence,) = map(weakref.ref, engine._inbox[0].sequences)
    drive(engine, future)
    assert engine.stats().accepted > 0
    del future
    engine.step()
    gc.collect()
    assert sequence() is None


def test_the_settings_name_a_draft_model_whose_cache_counts_towards_the_budget(tmp_path: Path) -> None:
    reference = random_reference(n_layer=1, n_head=1, n_embd=64, n_positions=200, vocab_size=50257)
    options = {"device": "cpu", "dtype": "float32", "threads": 1, "kv_cache_bytes": 20_000_000}
    engine = build_engine(Settings(draft_model=str(saved(reference, tmp_path)), **options))
    taken = DRAFTED_SEQUENCES * 200 * (2 * 64 * 4)  # slots, positions, keys and values
    assert engine.scheduler.slots.budget_bytes == 20_000_000 - taken
    assert engine.fingerprint == demo_engine().fingerprint
    found = texts(engine, requests()[2:4])
    assert [result["choices"] for result in found] == [result["choices"] for result in expected()[2:4]]
    assert engine.stats().proposed > 0
    needed = 1024 * 4096
    with pytest.raises(ValueError, match=f"HEADRACE_DRAFT_MODEL takes {taken} of the {needed} bytes"):
        build_engine(Settings(draft_model=str(tmp_path), **{**options, "kv_cache_bytes": needed}))


def test_a_draft_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    reference = random_reference(n_layer=1, n_head=1, n_embd=64, n_positions=64, vocab_size=50304)
    with pytest.raises(ModelError, match=r"HEADRACE_DRAFT_MODEL is .* another vocabulary \(50304 tokens\) .*\(50257"):
        build_engine(Settings(draft_model=str(saved(reference, tmp_path)), device="cpu", dtype="float32"))
    with pytest.raises(ModelError, match=r"HEADRACE_DRAFT_MODEL: .*nowhere"):
        build_engine(Settings(draft_model=str(tmp_path / "nowhere"), device="cpu", dtype="float32"))
    with pytest.raises(ModelError, match=r"HEADRACE_DRAFT_MODEL: .*nowhere"):
        find_files(Settings(draft_model=str(tmp_path / "nowhere")), "demo")


def test_a_draft_model_is_not_loaded_where_no_tokens_are_proposed() -> None:
    engine = build_engine(Settings(draft_model="/nowhere", draft_tokens=0, device="cpu", dtype="float32"))
    assert engine.scheduler.drafts is None

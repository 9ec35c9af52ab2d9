"""The model runner alone: the tokens of steps, and the contents of the cache."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load

from headrace.model import Decoder, load_model
from headrace.model.kv_cache import Arena
from headrace.worker.engine.cache_slots import SlotMove
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.scheduler import PromptChunk, SchedulerOutput
from headrace.worker.engine.sequence import Sequence, Slot, TokenScore
from tests.unit.model.references import demo_reference
from tests.unit.worker.engine.engine_helpers import ask, demo_model, tokens_of


def runner(capacity: int = 4, model: Decoder | None = None) -> ModelRunner:
    made = ModelRunner(model or demo_model(), [128, 256])
    made.fit({128: capacity, 256: capacity})
    return made


def sequence(prompt: list[int], slot: Slot, **fields: object) -> Sequence:
    made = Sequence(ask(prompt, max_tokens=20, **fields), prompt, 0, 0, frozenset({50256}))
    made.slot = slot
    return made


def whole(*sequences: Sequence) -> SchedulerOutput:
    """A step that computes the whole prompts of these sequences."""
    return SchedulerOutput(chunks=[PromptChunk(each, 0, len(each.prompt)) for each in sequences])


def take(made: ModelRunner, step: SchedulerOutput) -> dict[Sequence, TokenScore]:
    scores = {}
    for each, score in made.run(step).tokens:
        assert score is not None
        each.append(score)
        scores[each] = score
    for chunk in step.chunks:
        chunk.sequence.prefilled = chunk.start + chunk.count
    return scores


def contents(arena: Arena) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in (*arena.k, *arena.v)]


def test_a_position_takes_keys_and_values_of_all_layers() -> None:
    assert runner().position_bytes == 2 * 4 * 128 * 4
    half = load_model("demo", device="cpu", dtype="bfloat16")
    assert runner(model=half).position_bytes == 2 * 4 * 128 * 2
    arena = runner(capacity=3).cache.arenas[128]
    assert sum(t.nbytes for t in (*arena.k, *arena.v)) == 3 * 128 * runner().position_bytes


def test_fit_resizes_every_arena_and_keeps_its_contents() -> None:
    made = runner(capacity=2)
    take(made, whole(sequence(tokens_of(5), Slot(128, 1))))
    before = contents(made.cache.arenas[128])
    made.fit({128: 5, 256: 0})
    assert {length: arena.capacity for length, arena in made.cache.arenas.items()} == {128: 5, 256: 0}
    assert all(torch.equal(new[:2], old) for new, old in zip(contents(made.cache.arenas[128]), before, strict=True))


def test_cached_steps_give_the_logits_of_transformers_in_float64() -> None:
    made = runner()
    rows = [
        sequence(tokens_of(60, seed=2), Slot(128, 1), logprobs=5),
        sequence(tokens_of(3, seed=3), Slot(128, 0), logprobs=5),
        sequence(tokens_of(180, seed=4), Slot(256, 0), logprobs=5),
    ]
    scores = [take(made, whole(*rows))]
    scores += [take(made, SchedulerOutput(decodes=rows)) for _ in range(3)]
    for each in rows:
        with torch.inference_mode():
            logits = demo_reference()(torch.tensor([each.prompt + each.output])).logits[0, len(each.prompt) - 1 : -1]
        for row, step in zip(logits.log_softmax(-1), scores, strict=True):
            assert step[each].token_id == int(row.argmax())
            assert step[each].logprob == pytest.approx(float(row.max()), abs=1e-4)


def test_a_step_writes_its_own_slots_and_positions_only() -> None:
    made = runner()
    take(made, whole(sequence(tokens_of(10), Slot(128, 2))))
    arena = made.cache.arenas[128]
    for tensor in contents(arena):
        assert tensor[2, :, :10].any(dim=-1).all()
        assert not tensor[2, :, 10:].any()
        assert not tensor[[0, 1, 3]].any()
    assert not any(tensor.any() for tensor in contents(made.cache.arenas[256]))


def test_a_moved_sequence_continues_with_the_same_bits_and_its_old_slot_is_cleared() -> None:
    made, still = runner(), runner()
    moved, stays = (sequence(tokens_of(20), Slot(128, 3), logprobs=3) for _ in range(2))
    take(made, whole(moved, sequence(tokens_of(40, seed=2), Slot(128, 0))))
    take(still, whole(stays))
    made.move(SlotMove(128, source=3, target=0, length=20))
    moved.slot = Slot(128, 0)
    assert not any(tensor[3].any() for tensor in contents(made.cache.arenas[128]))
    assert not any(tensor[0, :, 20:].any() for tensor in contents(made.cache.arenas[128])), (
        "data of the slot's previous sequence remain"
    )
    for _ in range(4):
        assert [*take(made, SchedulerOutput(decodes=[moved])).values()] == [
            *take(still, SchedulerOutput(decodes=[stays])).values()
        ]


def test_a_capture_restarted_in_another_slot_shows_that_slot_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made, traced = runner(), sequence(tokens_of(20), Slot(128, 1), checkpoints=[3])
    take(made, whole(sequence(tokens_of(40, seed=2), Slot(128, 2))))
    with monkeypatch.context() as patch:
        patch.delattr(ModelRunner, "_forward")
        with pytest.raises(AttributeError):
            made.run(whole(traced))
    traced.slot = Slot(128, 2)  # with nothing in the cache it is moved without a copy
    take(made, whole(traced))
    assert load(made.collect(traced)["cache_rest"])["tensor"] == 0


@pytest.mark.parametrize("target", [Slot(128, 3), Slot(256, 2)])
def test_a_prefill_is_copied_from_its_source_across_arenas(target: Slot) -> None:
    made = runner()
    leader = sequence(tokens_of(50), Slot(128, 0), logprobs=2)
    follower = sequence(leader.prompt, target, logprobs=2)
    step = whole(leader)
    step.same_prompt[leader] = [follower]
    first = take(made, step)
    follower.prefilled = leader.prefilled
    assert first[leader] == first[follower]
    for _ in range(3):
        scores = take(made, SchedulerOutput(decodes=[leader, follower]))
        assert scores[leader] == scores[follower]


def test_clear_wipes_one_slot() -> None:
    made = runner()
    take(made, whole(sequence(tokens_of(5), Slot(128, 0)), sequence(tokens_of(5), Slot(128, 1))))
    made.clear(Slot(128, 0))
    for tensor in contents(made.cache.arenas[128]):
        assert not tensor[0].any()
        assert tensor[1].any()


def test_scores_of_a_prompt_come_chunk_by_chunk() -> None:
    made = runner()
    each = sequence(tokens_of(150), Slot(256, 0), echo=True, logprobs=1)
    parts = []
    for start, count in ((0, 64), (64, 64), (128, 22)):
        outcome = made.run(SchedulerOutput(chunks=[PromptChunk(each, start, count)]))
        parts.append([score.token_id for _, scores in outcome.prompt_scores for score in scores])
    assert [len(part) for part in parts] == [65, 64, 21]
    assert sum(parts, []) == each.prompt  # noqa: RUF017

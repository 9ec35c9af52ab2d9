"""Decisions about what runs next, on plain sequences: no tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.worker.engine.cache_slots import SlotTable
from headrace.worker.engine.oom import row_count, split
from headrace.worker.engine.scheduler import PromptChunk, Scheduler, SchedulerOutput
from headrace.worker.engine.sequence import Sequence, TokenScore
from tests.unit.worker.engine.engine_helpers import ask


def scheduler(
    *, rows: int = 64, step_tokens: int = 512, chunk: int = 128, budget_positions: int = 64 * 1024, drafts: int = 0
) -> Scheduler:
    slots = SlotTable((128, 256, 512, 1024), position_bytes=1, budget_bytes=budget_positions)
    return Scheduler(slots, max_rows=rows, step_tokens=step_tokens, prefill_chunk=chunk, draft_tokens=drafts)


#: No adapter, and two.
ADAPTERS = (None, SimpleNamespace(digest="a"), SimpleNamespace(digest="b"))


def sequence(read: int, write: int = 4, first: int = 0, adapter: object = None, **fields: object) -> Sequence:
    """A sequence of `read` prompt tokens; different `first` are different prompts."""
    prompt = [first] + [7] * (read - 1)
    return Sequence(ask(prompt, max_tokens=write, ignore_eos=True, **fields), prompt, 0, 0, adapter=adapter)


def several(*reads: int, write: int = 4) -> list[Sequence]:
    return [sequence(read, write, first=i + 1) for i, read in enumerate(reads)]


def borders(step: SchedulerOutput, of: Sequence) -> list[tuple[int, int]]:
    return [(chunk.start, chunk.count) for chunk in step.chunks if chunk.sequence is of]


def run(scheduler: Scheduler, step: SchedulerOutput) -> list[Sequence]:
    """Process a step as the engine does, with token 5 for every sequence. Returns the finished sequences."""
    for chunk in step.chunks:
        scheduler.advance(chunk)
    for each in step.sampled_sequences:
        each.append(TokenScore(5, None, []))
    scheduler.reuse_prefixes()
    gone = [each for each in step.sampled_sequences if each.finish_reason]
    for each in gone:
        scheduler.remove(each)
    return gone


def test_admission_is_by_priority_then_arrival() -> None:
    line = scheduler(rows=4)
    sequences = several(3, 3, 3, 3, 3)
    for each, priority in zip(sequences, (9, 3, 0, 3, 0), strict=True):
        line.add(each, priority)
    assert line.admit() == [sequences[i] for i in (2, 4, 1, 3)]
    assert line.waiting == 1
    assert line.admit() == []
    line.remove(sequences[2])
    assert line.admit() == [sequences[0]]


def test_a_long_sequence_first_in_line_is_not_overtaken_by_short_ones() -> None:
    line = scheduler(budget_positions=1024)
    running, long, *short = several(100, 900, 3, 3, 3)
    for each in (running, long, *short):
        line.add(each, 3)
    assert line.admit() == [running]
    assert line.admit() == [], "short ones overtake the long one"
    line.remove(running)
    assert line.admit() == [long]


def test_sequences_removed_while_waiting_are_skipped() -> None:
    line = scheduler(rows=1)
    first, second, third = several(3, 3, 3)
    for each in (first, second, third):
        line.add(each, 3)
    assert line.remove(first) is None
    assert line.waiting == 2
    assert line.admit() == [second]
    line.remove(third)
    assert line.waiting == 0
    line.remove(second)
    assert line.admit() == []
    assert not line.schedule()


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (1, [(0, 1)]),
        (128, [(0, 128)]),
        (129, [(0, 128), (128, 1)]),
        (300, [(0, 128), (128, 128), (256, 44)]),
    ],
)
@pytest.mark.parametrize("company", [0, 1, 30])
@pytest.mark.parametrize("step_tokens", [16, 128, 200, 2000])
def test_chunk_borders_depend_on_the_prompt_alone(
    read: int, expected: list[tuple[int, int]], company: int, step_tokens: int
) -> None:
    line = scheduler(step_tokens=step_tokens)
    others = several(*[3 + i for i in range(company)], write=30)
    watched = sequence(read, first=999)
    for each in (*others, watched):
        line.add(each, 3)
    line.admit()
    seen = []
    while watched.prefilling:
        step = line.schedule()
        seen += borders(step, watched)
        run(line, step)
    assert seen == expected


def test_a_step_holds_all_decoding_rows_and_chunks_within_the_budget() -> None:
    line = scheduler(step_tokens=300)
    decoding = several(*[2] * 100, write=50)
    for each in decoding:
        line.add(each, 3)
    line.max_rows = 200
    while line.admit() or any(each.prefilling for each in decoding):
        run(line, line.schedule())
    first, second = sequence(200, first=500), sequence(200, first=501)
    line.add(first, 3)
    line.add(second, 3)
    line.admit()
    step = line.schedule()
    assert step.decodes == decoding
    assert borders(step, first) == [(0, 128), (128, 72)]
    assert borders(step, second) == [], "100 rows and 200 tokens of prompts are the whole budget"


def test_one_chunk_goes_in_however_many_rows_decode() -> None:
    line = scheduler(step_tokens=16)
    decoding = several(*[2] * 40, write=50)
    for each in decoding:
        line.add(each, 3)
    line.admit()
    while any(each.prefilling for each in decoding):
        run(line, line.schedule())
    late = sequence(400, first=500)
    line.add(late, 3)
    line.admit()
    assert borders(line.schedule(), late) == [(0, 128)]


def test_equal_prompts_share_one_prefill() -> None:
    line = scheduler(step_tokens=128)
    leader, follower, scoring, other = (
        sequence(200),
        sequence(200, write=300),
        sequence(200, echo=True, logprobs=1),
        sequence(200, first=9),
    )
    for each in (leader, follower, scoring, other):
        line.add(each, 3)
    line.admit()
    step = line.schedule()
    assert [chunk.sequence for chunk in step.chunks] == [leader]
    assert step.same_prompt == {}
    run(line, step)
    late = sequence(200)
    line.add(late, 3)
    line.admit()
    step = line.schedule()
    assert step.same_prompt == {leader: [follower, late]}
    assert step.prefilled == [leader, follower, late]
    run(line, step)
    assert [s.prefilling for s in (leader, follower, late, scoring, other)] == [False, False, False, True, True]
    assert [len(s.output) for s in (leader, follower, late)] == [1, 1, 1]
    after = sequence(200)
    line.add(after, 3)
    line.admit()
    assert (after.prefix_source, after.prefix_length) == (leader, 128), (
        "the whole chunk is reused; the rest is computed again"
    )


def test_if_a_prefix_source_ends_early_the_first_dependent_computes_the_prompt_for_the_others() -> None:
    line = scheduler(step_tokens=128)
    leader, second, third = sequence(200), sequence(200), sequence(200)
    for each in (leader, second, third):
        line.add(each, 3)
    line.admit()
    run(line, line.schedule())
    line.remove(leader)
    assert (second.prefix_source, third.prefix_source) == (None, second)
    step = line.schedule()
    assert borders(step, second) == [(0, 128)]
    run(line, step)
    step = line.schedule()
    assert step.same_prompt == {second: [third]}
    run(line, step)
    assert not third.prefilling


def test_a_dependent_may_end_before_its_prefix_source() -> None:
    line = scheduler(step_tokens=128)
    leader, second, third = sequence(200), sequence(200), sequence(200)
    for each in (leader, second, third):
        line.add(each, 3)
    line.admit()
    run(line, line.schedule())
    line.remove(second)
    step = line.schedule()
    assert step.same_prompt == {leader: [third]}


def beginning(common: int, rest: int, first: int, write: int = 4, **fields: object) -> Sequence:
    """A sequence whose prompt shares its first `common` tokens with the others."""
    prompt = [7] * common + [first] * rest
    return Sequence(ask(prompt, max_tokens=write, ignore_eos=True, **fields), prompt, 0, 0)


def test_a_common_prefix_is_computed_once() -> None:
    line = scheduler()
    leader, second, third = (beginning(300, 20, first) for first in (1, 2, 3))
    other, scoring = beginning(0, 320, 4), beginning(300, 20, 5, echo=True, logprobs=1)
    for each in (leader, second, third, other, scoring):
        line.add(each, 3)
    line.admit()
    assert [(s.prefix_source, s.prefix_length) for s in (second, third)] == [(leader, 256)] * 2
    assert (other.prefix_source, scoring.prefix_source) == (None, None)
    assert line.reuse_prefixes() == [], "the prefix is not computed yet"
    step = line.schedule()
    assert borders(step, leader) == [(0, 128), (128, 128), (256, 64)]
    assert not borders(step, second)
    for chunk in step.chunks:
        line.advance(chunk)
    assert [(c.source, c.target, c.length) for c in line.reuse_prefixes()] == [
        (leader, second, 256),
        (leader, third, 256),
    ]
    step = line.schedule()
    assert borders(step, second) == borders(step, third) == [(256, 64)]


def test_nothing_is_shared_between_adapters() -> None:
    line = scheduler()
    alike = [sequence(300, adapter=adapter) for adapter in (*ADAPTERS, *ADAPTERS)]
    for each in alike:
        line.add(each, 3)
    line.admit()
    assert [each.prefix_source for each in alike] == [None, None, None, *alike[:3]]
    longer = [sequence(400, adapter=adapter) for adapter in ADAPTERS]
    for each in longer:
        line.add(each, 3)
    line.admit()
    assert [(each.prefix_source, each.prefix_length) for each in longer] == [(each, 256) for each in alike[:3]]


def test_a_later_sequence_reuses_the_prefix_of_a_decoding_one() -> None:
    line = scheduler()
    leader, late, last = beginning(256, 10, 1), beginning(256, 10, 2), beginning(128, 0, 3)
    line.add(leader, 3)
    line.admit()
    run(line, line.schedule())
    for each in (late, last):
        line.add(each, 3)
    line.admit()
    assert [(c.target, c.length) for c in line.reuse_prefixes()] == [(late, 256)], (
        "the first token needs a row to be sampled from"
    )
    step = line.schedule()
    assert borders(step, late) == [(256, 10)]
    assert borders(step, last) == [(0, 128)]


def test_if_the_prefix_source_ends_the_next_sequence_computes_the_prefix() -> None:
    line = scheduler(step_tokens=128)
    leader, second, third = (beginning(256, 20, first) for first in (1, 2, 3))
    for each in (leader, second, third):
        line.add(each, 3)
    line.admit()
    run(line, line.schedule())
    line.remove(leader)
    assert (second.prefix_source, second.prefilled) == (None, 0)
    assert (third.prefix_source, third.prefix_length) == (second, 256)
    while second.prefilling or third.prefilling:
        run(line, line.schedule())


def test_after_stop_sharing_dependents_compute_their_own_prefill() -> None:
    line = scheduler()
    leader, second = sequence(20), sequence(20)
    for each in (leader, second):
        line.add(each, 3)
    line.admit()
    step = line.schedule()
    line.stop_sharing(step)
    assert step.prefilled == [leader]
    line.remove(leader)
    assert borders(line.schedule(), second) == [(0, 20)]


def test_a_step_split_by_sequence_has_each_sequence_once() -> None:
    a, b, c = several(3, 300, 5)
    parts = SchedulerOutput(
        decodes=[a], chunks=[PromptChunk(b, 0, 128), PromptChunk(b, 128, 128), PromptChunk(c, 0, 5)]
    )
    assert [(part.decodes, [chunk.start for chunk in part.chunks]) for part in parts.by_sequence()] == [
        ([a], []),
        ([], [0, 128]),
        ([], [0]),
    ]


def repeating(write: int = 50, **fields: object) -> Sequence:
    """A sequence whose text repeats token 5."""
    return Sequence(ask([5] * 9, max_tokens=write, ignore_eos=True, **fields), [5] * 9, 0, 0)


def decoding(line: Scheduler, *sequences: Sequence) -> SchedulerOutput:
    """The step in which these sequences decode for the first time."""
    for each in sequences:
        line.add(each, priority=0)
    line.admit()
    run(line, line.schedule())
    return line.schedule()


@pytest.mark.parametrize(
    ("texts", "drafts", "counts"),
    [
        (1, 3, [3]),
        (1, 15, [4]),  # 0.6**5 is less than a tenth
        (3, 7, [4, 4, 4]),
        (5, 7, [2, 2, 2, 2, 3]),  # what is left of 16 rows
        (8, 7, [1] * 8),
        (10, 7, [1] * 6),
        (16, 7, []),
        (40, 7, []),
        (3, 0, []),
    ],
)
def test_few_decoding_sequences_share_the_rows_for_proposed_tokens(texts: int, drafts: int, counts: list[int]) -> None:
    step = decoding(scheduler(drafts=drafts), *(repeating() for _ in range(texts)))
    assert len(step.decodes) == texts
    assert [len(guesses) for guesses in step.proposed.values()] == counts
    assert step.decode_rows == texts + sum(counts) <= max(16, texts)


def test_a_sequence_without_proposals_leaves_its_rows_to_others() -> None:
    speechless = Sequence(ask([1, 2, 3], max_tokens=9), [1, 2, 3], 0, 0)
    eager = repeating()
    line = scheduler(drafts=7)
    step = decoding(line, speechless, eager)
    eager.note_accepted(100, 100)
    assert {each: len(guesses) for each, guesses in line.schedule().proposed.items()} == {eager: 7}
    assert step.proposed.keys() == {eager}


@pytest.mark.parametrize(("write", "count"), [(2, 0), (3, 1), (4, 2), (50, 4)])
def test_proposals_end_before_the_last_requested_token(write: int, count: int) -> None:
    step = decoding(scheduler(drafts=7), repeating(write))
    assert sum(map(len, step.proposed.values())) == count


def test_a_captured_sequence_proposes_no_tokens() -> None:
    assert not decoding(scheduler(drafts=7), repeating(checkpoints=[2])).proposed


def test_proposed_tokens_count_in_the_token_budget_and_are_dropped_from_split_steps() -> None:
    line = scheduler(drafts=7, step_tokens=130)
    writing, reading = repeating(), sequence(300, first=3)
    decoding(line, writing)
    line.add(reading, priority=0)
    line.admit()
    step = line.schedule()
    assert (row_count(step), len(step.proposed[writing])) == (133, 4)
    assert split(step, 133) == [step]
    assert [(part.decodes, part.proposed, len(part.chunks)) for part in split(step, 132)] == [([writing], {}, 1)]
    assert [part.proposed for part in step.by_sequence()] == [{}, {}]


@settings(max_examples=40, deadline=None)
@given(
    reads=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 100), st.integers(0, 3)), min_size=1, max_size=40),
    rows=st.integers(1, 12),
    budget=st.integers(1024, 6000),
    seed=st.integers(0, 1000),
)
def test_every_sequence_is_served_in_any_order_of_events(
    reads: Rows[tuple[int, int, int]], rows: int, budget: int, seed: int
) -> None:
    draw = random.Random(seed)
    line = scheduler(rows=rows, budget_positions=budget, step_tokens=256)
    arriving = [sequence(read, write, first=first, adapter=draw.choice(ADAPTERS)) for read, write, first in reads]
    left, cancelled = set(), set()
    for _ in range(20_000):
        if arriving and draw.random() < 0.5:
            line.add(arriving.pop(), draw.choice([0, 3, 9]))
        line.admit()
        for copy in line.reuse_prefixes():
            assert copy.source in line.running
            assert copy.source.prefilled >= copy.length
            assert copy.target.prompt[: copy.length] == copy.source.prompt[: copy.length]
            assert copy.target.adapter is copy.source.adapter
        if line.running and draw.random() < 0.02:
            gone = draw.choice(line.running)
            cancelled.add(gone)
            line.remove(gone)
        step = line.schedule()
        rows_in_step = len(step.decodes) + sum(chunk.count for chunk in step.chunks)
        assert rows_in_step <= max(256, len(step.decodes) + 128)
        assert bool(step) == bool(line.running), "something runs, and the step is empty"
        taken = [each.slot for each in line.running]
        assert None not in taken
        assert len(set(taken)) == len(taken) <= rows
        assert all(s.slot is not None and s.slot.index < line.slots.capacity[s.slot.length_class] for s in line.running)
        assert line.slots.used_bytes <= budget
        left.update(run(line, step))
        if not (arriving or line.waiting or line.running):
            break
    assert len(left | cancelled) == len(reads)
    assert all(len(each.output) == each.request.max_tokens for each in left)
    assert not line._prefilling, "a prefill belongs to a sequence that was removed"

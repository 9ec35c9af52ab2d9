"""A job's events -> its text: each token once and in order, however often and in whatever pieces it was written."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client import Event, StreamChanged
from headrace.client.jobs.handle import Handle, job_in_errors
from headrace.client.jobs.stream import StreamReader
from headrace.client.wire.results import Choice, Result, StreamEvent, StreamPiece, Timings, TokenLogprob, Usage

TEXTS = ["He", "ll", "o", " w", "", "", "é", "!"]  # of eight tokens; two in the middle complete no character
LOGPROBS = [TokenLogprob(token_id=i, token=text, logprob=-float(i)) for i, text in enumerate(TEXTS)]


def reader() -> StreamReader:
    return StreamReader("a")


def piece(start: int, end: int, index: int = 0) -> StreamPiece:
    return StreamPiece(
        index=index,
        at=start,
        text_at=len("".join(TEXTS[:start])),
        text="".join(TEXTS[start:end]),
        token_ids=list(range(start, end)),
        logprobs=LOGPROBS[start:end],
        finish_reason="length" if end == len(TEXTS) else None,
    )


def entry(*pieces: StreamPiece) -> str:
    return StreamEvent(pieces=list(pieces)).model_dump_json(exclude_defaults=True)


def result(count: int = 1) -> Result:
    whole = piece(0, len(TEXTS))
    choices = [
        Choice(index=i, text=whole.text, token_ids=whole.token_ids, finish_reason="length", logprobs=list(LOGPROBS))
        for i in range(count)
    ]
    usage = Usage(prompt_tokens=0, completion_tokens=8, total_tokens=8)
    timings = Timings(waiting_s=0, prefill_s=0, decode_s=0)
    return Result(id="a", model="m", choices=choices, usage=usage, seed=0, timings=timings)


def check(events: list[Event], index: int = 0) -> None:
    mine = [event for event in events if event.index == index and event.result is None]
    assert [token for event in mine for token in event.token_ids] == list(range(len(TEXTS)))
    assert "".join(event.text for event in mine) == "".join(TEXTS)
    assert [score for event in mine for score in event.logprobs or []] == LOGPROBS
    assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + ["length"]


@given(st.randoms(use_true_random=False), st.integers(1, 3), st.floats(0, 1))
def test_several_writers_and_lost_entries_make_one_text(dice: random.Random, writers: int, lost: float) -> None:
    """Each writer splits the text at other places; their entries are interleaved, and some are lost."""
    lanes = []
    for _ in range(writers):
        cuts = [0, *sorted(dice.sample(range(1, len(TEXTS)), dice.randint(0, 6))), len(TEXTS)]
        lanes.append([entry(piece(a, b), piece(a, b, 1)) for a, b in itertools.pairwise(cuts)])
    under_test, events = reader(), []
    while any(lanes):
        written = dice.choice([lane for lane in lanes if lane]).pop(0)
        if dice.random() >= lost:
            events += under_test.take(written)
    events += under_test.finish(result(2))
    assert events[-1].result == result(2)
    for index in (0, 1):
        check(events, index)


def test_the_last_event_of_a_sample_says_what_ended_it() -> None:
    ended = piece(4, 8).model_copy(update={"finish_reason": "stop", "stop_reason": "\n", "complete": True})
    under_test = reader()
    events = [*under_test.take(entry(piece(0, 4))), *under_test.take(entry(ended))]
    assert [event.stop_reason for event in events] == [None, "\n"]
    assert [event.complete for event in events] == [None, True]
    whole = result()
    whole.choices[0].finish_reason, whole.choices[0].stop_reason, whole.choices[0].complete = "stop", 7, False
    assert [event.stop_reason for event in reader().finish(whole)] == [7, None]
    assert [event.complete for event in reader().finish(whole)] == [False, None]


def test_text_after_a_gap_waits_for_the_result() -> None:
    under_test = reader()
    assert [e.token_ids for e in under_test.take(entry(piece(0, 2)))] == [[0, 1]]
    assert list(under_test.take(entry(piece(3, 5)))) == []
    assert [e.token_ids for e in under_test.finish(result())] == [[2, 3, 4, 5, 6, 7], []]


@pytest.mark.parametrize(
    "other",
    [
        {"token_ids": [0, 9], "text": "Hell"},
        {"token_ids": [0, 1], "text": "Help"},
        {"token_ids": [0], "text": "He", "finish_reason": "stop"},
    ],
    ids=["another token", "another text", "an earlier end"],
)
def test_text_that_contradicts_earlier_text_is_an_error_with_the_job(other: dict[str, object]) -> None:
    under_test = reader()
    list(under_test.take(entry(piece(0, 3))))
    with pytest.raises(StreamChanged, match=r"job\.result\(\)") as caught, job_in_errors(lambda name: Handle(name, "")):
        list(under_test.take(entry(StreamPiece.model_validate(other))))
    assert (caught.value.code, caught.value.job.id) == ("stream_changed", "a")


def test_the_result_is_compared_too() -> None:
    under_test = reader()
    list(under_test.take(entry(StreamPiece(token_ids=[5], text="Ha"))))
    with pytest.raises(StreamChanged):
        list(under_test.finish(result()))


@pytest.mark.parametrize(
    "junk", ["", "null", "[]", '{"pieces": 3}', '{"pieces": [{"at": -1, "text": "x"}]}', "[" * 999]
)
def test_unreadable_entries_are_skipped(junk: str) -> None:
    under_test = reader()
    assert list(under_test.take(junk)) == []
    check(list(under_test.finish(result())))

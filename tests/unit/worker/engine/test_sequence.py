"""Text, stop strings and deltas of one sequence, with a vocabulary of bytes, so that tokens can end anywhere."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.model.tokenizer import PATTERN, TiktokenTokenizer
from headrace.worker.engine.input_batch import SampledRow
from headrace.worker.engine.requests import RequestState
from headrace.worker.engine.sequence import Sequence, TokenScore
from headrace.worker.engine.sequence_text import SequenceText, TextDelta
from tests.unit.worker.engine.engine_helpers import ask

END = 300
#: 256 tokens of one byte, some of several, and the end of text.
PIECES = {256: b"ab", 257: b"abc", 258: b"st", 259: b"op", 260: b"stop", 261: "é!".encode(), 262: b" the"}
VOCABULARY = TiktokenTokenizer(
    tiktoken.Encoding(
        "bytes",
        pat_str=PATTERN,
        mergeable_ranks={bytes([i]): i for i in range(256)} | {piece: i for i, piece in PIECES.items()},
        special_tokens={"<|endoftext|>": END},
    )
)


class Sample:
    """A sequence with its text, as the engine's output processor keeps them."""

    def __init__(self, max_tokens: int = 100, prompt_text: str = "", **fields: Any) -> None:
        self.sequence = Sequence(ask([1, 2], max_tokens=max_tokens, **fields), [1, 2], 0, 0, frozenset({END}))
        self.decoded = SequenceText(self.sequence, VOCABULARY, prompt_text)

    def append(self, score: TokenScore) -> None:
        self.sequence.append(score)
        self.decoded.decode_last_token()

    @property
    def text(self) -> str:
        return self.decoded.text

    @property
    def output(self) -> list[int]:
        return self.sequence.output

    @property
    def finish_reason(self) -> str | None:
        return self.sequence.finish_reason

    @property
    def stop_reason(self) -> str | int | None:
        return self.sequence.stop_reason

    def banned(self) -> tuple[int, ...]:
        """The tokens that must not be sampled next."""
        return SampledRow(self.sequence, 0, []).draw().params.banned


def sequence(max_tokens: int = 100, **fields: Any) -> Sample:
    return Sample(max_tokens, **fields)


def feed(sequence: Sample, tokens: list[int]) -> list[TextDelta]:
    """Append tokens until the sequence ends. Returns the deltas."""
    deltas = []
    for token in tokens:
        if sequence.finish_reason:
            break
        sequence.append(TokenScore(token, -1.0, []))
        if (delta := sequence.decoded.take_delta()) is not None:
            deltas.append(delta)
    return deltas


def spell(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize(
    ("stop", "tokens", "text", "reason"),
    [
        pytest.param(["stop"], spell("go stop now"), "go ", "stop", id="over four tokens"),
        pytest.param(["stop"], [*spell("go "), 260, *spell("now")], "go ", "stop", id="in one token"),
        pytest.param(["o s"], [*spell("go "), 258, 259], "g", "o s", id="from one token into another"),
        pytest.param(["b"], [257], "a", "b", id="inside a token"),
        pytest.param(["c", "b"], [257], "a", "b", id="the earliest of two"),
        pytest.param(["bc", "abc"], [257], "", "abc", id="the earliest of two that overlap"),
        pytest.param(["aab"], spell("aaab"), "a", "aab", id="after a false start"),
        pytest.param(["é"], spell("xéy"), "x", "é", id="of more than one byte"),
        pytest.param(["é"], [ord("x"), 261], "x", "é", id="with more than one byte in a token"),
        pytest.param(["stop", "stopped"], spell("stopped"), "", "stop", id="the shorter comes first"),
    ],
)
def test_a_stop_string_cuts_the_text_where_it_begins(
    stop: list[str], tokens: list[int], text: str, reason: str
) -> None:
    each = sequence(stop=stop)
    feed(each, tokens)
    assert (each.text, each.finish_reason, each.stop_reason) == (text, "stop", reason)


def test_a_stop_string_in_the_last_token_counts_as_stop() -> None:
    each = sequence(max_tokens=4, stop=["stop"])
    feed(each, spell("stop"))
    assert (each.text, each.finish_reason) == ("", "stop")


def test_without_a_stop_the_end_is_max_tokens() -> None:
    each = sequence(max_tokens=3)
    feed(each, spell("abcdef"))
    assert (each.text, each.finish_reason, each.stop_reason, len(each.output)) == ("abc", "length", None, 3)


def test_end_of_text_ends_and_is_not_in_the_text() -> None:
    each = sequence()
    feed(each, [*spell("hi"), END, *spell("more")])
    assert (each.text, each.finish_reason, each.stop_reason) == ("hi", "stop", None)
    assert each.output == [*spell("hi"), END]


@pytest.mark.parametrize(("skip", "text"), [(True, "hi!"), (False, "hi<|endoftext|>!")])
def test_end_of_text_can_be_ignored_and_is_then_text_if_special_tokens_are_not_skipped(skip: bool, text: str) -> None:
    each = sequence(max_tokens=4, ignore_eos=True, skip_special_tokens=skip)
    feed(each, [*spell("hi"), END, *spell("!")])
    assert (each.text, each.finish_reason) == (text, "length")


@pytest.mark.parametrize("stop", ["<|endoftext|>", "f<|endoftext|>", "oftext|>!", "<|endoftext|>!", "f<|end"])
def test_a_stop_string_sees_the_special_tokens_that_the_text_leaves_out(stop: str) -> None:
    each = sequence(max_tokens=20, ignore_eos=True, stop=[stop])
    deltas = feed(each, [*spell("of"), END, *spell("!more")])
    assert (each.text, each.finish_reason, each.stop_reason) == ("o" if stop[0] == "f" else "of", "stop", stop)
    assert "".join(delta.text for delta in deltas) == each.text


def test_a_stop_token_is_named_and_its_text_left_out() -> None:
    each = sequence(stop_token_ids=[262])
    feed(each, [*spell("of"), 262])
    assert (each.text, each.finish_reason, each.stop_reason) == ("of", "stop", 262)


def test_min_tokens_bans_ends_and_overlooks_stop_strings_until_then() -> None:
    each = sequence(min_tokens=6, stop=["stop"], stop_token_ids=[7])
    assert each.banned() == (7, END)
    feed(each, spell("stop s"))
    assert (each.text, each.finish_reason) == ("stop s", None)
    assert each.banned() == ()
    feed(each, spell("top"))
    assert (each.text, each.finish_reason) == ("stop ", "stop")


def test_the_token_that_reaches_min_tokens_may_complete_a_stop_string() -> None:
    each = sequence(min_tokens=4, stop=["op"])
    feed(each, [*spell("abc"), 259])
    assert (each.text, each.finish_reason, len(each.output)) == ("abc", "stop", 4)


def test_bytes_of_an_unfinished_character_are_held_back_and_shown_as_a_mark_at_the_end() -> None:
    each = sequence(max_tokens=3)
    euro = "€".encode()
    assert [delta.text for delta in feed(each, [ord("x"), *euro[:2]])] == ["x", "\ufffd"]
    whole = sequence(max_tokens=5)
    deltas = feed(whole, [ord("x"), *euro, ord("y")])
    assert [delta.text for delta in deltas] == ["x", "€", "y"]
    assert [delta.token_ids for delta in deltas] == [[ord("x")], [*euro], [ord("y")]]


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    each = sequence(stop=["stop it"], max_tokens=12)
    deltas = feed(each, spell("a stop at it"))
    assert [delta.text for delta in deltas] == ["a", " ", "stop a", "t", " ", "i", "t"]
    assert each.text == "a stop at it"


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.one_of(st.sampled_from([*PIECES, *b"abcstop ", END]), st.integers(0, 255)), max_size=40),
    stop=st.lists(
        st.text(st.sampled_from("abcstope é<|>"), min_size=1, max_size=5) | st.just("b<|endoftext|>"), max_size=4
    ),
    min_tokens=st.integers(0, 10),
    max_tokens=st.integers(10, 30),
    skip=st.booleans(),
)
def test_deltas_join_to_the_text_and_never_contain_text_that_a_stop_string_removes(
    tokens: list[int], stop: list[str], min_tokens: int, max_tokens: int, skip: bool
) -> None:
    fields = {"stop": stop, "min_tokens": min_tokens, "stop_token_ids": [262], "ignore_eos": skip}
    each = sequence(max_tokens, **fields, skip_special_tokens=skip)
    deltas = feed(each, tokens)
    shown = "".join(delta.text for delta in deltas)
    assert each.text.startswith(shown)
    assert [token for delta in deltas for token in delta.token_ids] == each.output[
        : sum(len(d.token_ids) for d in deltas)
    ]
    if each.finish_reason is None:
        return
    assert shown == each.text
    assert deltas[-1].finish_reason == each.finish_reason
    # The text is that of all tokens, cut at the first stop string if one ended it.
    by_token = each.finish_reason == "stop" and not isinstance(each.stop_reason, str)  # its text is left out
    whole = VOCABULARY.decode(each.output[:-1] if by_token else each.output, skip_special_tokens=skip)
    if isinstance(each.stop_reason, str):
        assert each.stop_reason in stop
        assert whole.startswith(each.text)
        assert whole.startswith(each.text + each.stop_reason) or "\ufffd" in whole or (skip and END in each.output)
        assert min_tokens > 0 or not any(s in each.text for s in stop)
    else:
        assert each.text == whole
        assert min_tokens > 0 or each.stop_reason == 262 or not any(s in whole for s in stop)


def test_a_choice_begins_with_the_prompt_if_echo_is_set() -> None:
    each = sequence(max_tokens=2, prompt_text="\x01\x02", echo=True, logprobs=1)
    each.sequence.prompt_scores = [TokenScore(1, None, []), TokenScore(2, -2.0, [(9, -0.1), (8, -0.2)])]
    each.append(TokenScore(ord("a"), -1.0, [(ord("a"), -1.0), (ord("b"), -1.5)]))
    each.append(TokenScore(ord("b"), -3.0, []))
    choice = each.decoded.choice()
    assert (choice.text, choice.token_ids) == ("\x01\x02ab", [1, 2, 97, 98])
    assert choice.logprobs is not None
    assert [score.logprob for score in choice.logprobs] == [None, -2.0, -1.0, -3.0]
    assert [[top.token_id for top in score.top] for score in choice.logprobs] == [[], [9], [97], []]
    assert choice.logprobs[2].token == "a"


def test_without_logprobs_none_are_kept() -> None:
    each = sequence(max_tokens=2)
    feed(each, spell("ab"))
    assert each.sequence.scores == []
    assert each.decoded.choice().logprobs is None


def test_a_request_tells_partial_texts_only_once_something_is_written() -> None:
    pair = [sequence(), sequence()]
    job = RequestState(
        "id",
        pair[0].sequence.request,
        [each.sequence for each in pair],
        [each.decoded for each in pair],
        seed=0,
        future=Future(),
        arrived_at=0.0,
    )
    assert job.partial == []
    feed(pair[1], spell("ab"))
    assert job.partial == ["", "ab"]
    assert not job.finished

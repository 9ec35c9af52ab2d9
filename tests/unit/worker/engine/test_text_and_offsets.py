"""What a caller sees of a sample's tokens: text, names and offsets, in results, streams and the OpenAI format.

The tokens are given, so no model is computed. Expected values come from the bytes of all tokens together.
"""

from __future__ import annotations

import bisect
import codecs
import functools
import json
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Peer

from headrace.client.batch.openai import completion
from headrace.client.http.completion_answer import CompletionChunks
from headrace.client.jobs.stream import Event, StreamReader
from headrace.client.wire.requests import GenerateRequest, parse_request
from headrace.client.wire.results import Choice, Result, StreamEvent, StreamPiece
from headrace.model.generation_config import Ends
from headrace.model.tokenizer import PATTERN, TiktokenTokenizer, Tokenizer, gpt2_tokenizer
from headrace.model.tokenizers.base import Described
from headrace.model.tokenizers.library import LibraryTokenizer
from headrace.worker.engine.requests import RequestState, prepare
from headrace.worker.engine.sequence import TokenScore
from headrace.worker.engine.sequence_text import TextDelta
from tests.unit.model.tokenizer_makers import llama, unigram, word_piece

END = 50256
#: More ids than tokens, as in a padded embedding.
VOCAB_SIZE = 50304
UNKNOWN = 50300
#: `\xe2\x80`, the first bytes of dashes and quotes.
DASHES = 447
#: The two tokens of "😀".
FACE = [47249, 222]


@functools.cache
def byte_tokens() -> list[int]:
    """The tokens that are not whole characters."""
    tokenizer = gpt2_tokenizer()
    return [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.token_text(i)]


# --- expected values ------------------------------------------------------------------------------------------------


def character_starts(data: bytes) -> list[int]:
    """The byte at which each character of `data.decode(errors="replace")` begins."""
    starts: list[int] = []
    at = 0
    while at < len(data):
        try:
            valid, skip = data[at:].decode(), 0
        except UnicodeDecodeError as error:
            valid, skip = data[at : at + error.start].decode(), error.end - error.start
        for character in valid:
            starts.append(at)
            at += len(character.encode())
        if skip:
            starts.append(at)
            at += skip
    return starts


@dataclass
class Expected:
    """The text of a prompt's tokens and of the output's, decoded together."""

    text: str
    #: Characters before the output. One that the output continues is part of the output.
    output_at: int
    #: Where each token begins.
    offsets: list[int]

    @classmethod
    def of(cls, prompt: list[int], output: list[int], *, skip: bool = True) -> Expected:
        data = [gpt2_tokenizer().known_bytes(token) for token in prompt]
        data += [b"" if skip and token == END else gpt2_tokenizer().known_bytes(token) for token in output]
        whole = b"".join(data)
        starts = character_starts(whole)
        offsets, at = [], 0
        for piece in data:
            if piece:
                offsets.append(bisect.bisect_right(starts, at) - 1)
            else:  # an id without bytes: after the characters that are complete
                offsets.append(len(codecs.utf_8_decode(whole[:at], "replace", False)[0]))
            at += len(piece)
        first = sum(map(len, data[: len(prompt)]))
        output_at = bisect.bisect_right(starts, first) - 1 if first < len(whole) else len(starts)
        return cls(whole.decode(errors="replace"), output_at, offsets)


# --- requests whose tokens are given --------------------------------------------------------------------------------


def state_of(request: GenerateRequest, tokenizer: Tokenizer | None = None) -> RequestState:
    return prepare(
        request,
        "job",
        Future(),
        tokenizer=tokenizer or gpt2_tokenizer(),
        ends=Ends((50256,), 50256),
        vocab_size=VOCAB_SIZE,
        max_context=10_000,
    )


def score(token: int, top: list[tuple[int, float]] | None = None) -> TokenScore:
    return TokenScore(token, -float(token), top or [])


def compute(
    prompt: str | list[int], output: list[int], every: int = 1, tokenizer: Tokenizer | None = None, **fields: Any
) -> tuple[Result, list[TextDelta]]:
    """The result for these tokens, and the deltas of a stream that takes one after every `every` tokens."""
    request = parse_request({"prompt": prompt, "max_tokens": len(output), "echo": not output, "logprobs": 2, **fields})
    state = state_of(request, tokenizer)
    deltas = []
    for sequence, text in zip(state.sequences, state.texts, strict=True):
        if sequence.scores_prompt:
            first, *others = sequence.prompt
            sequence.prompt_scores = [TokenScore(first, None, []), *map(score, others)]
        for count, token in enumerate(output, 1):
            sequence.append(score(token))
            text.decode_last_token()
            if count % every == 0 or sequence.finish_reason:
                deltas.append(text.take_delta())
            if sequence.finish_reason:
                break
        if sequence.finish_reason is None:
            sequence.finish("length")
    return state.result("demo", "same", time.monotonic()), [delta for delta in deltas if delta is not None]


def events_of(deltas: list[TextDelta], result: Result) -> list[Event]:
    """The events that a reader of the stream gets; every third entry is lost."""
    reader, events = StreamReader("job"), []
    for number, delta in enumerate(deltas):
        piece = StreamPiece(
            index=delta.index,
            at=delta.at,
            text_at=delta.text_at,
            text=delta.text,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            finish_reason=delta.finish_reason,
        )
        if number % 3 != 2:
            events += reader.take(StreamEvent(pieces=[piece]).model_dump_json(exclude_defaults=True))
    return [event for event in [*events, *reader.finish(result)] if event.result is None]


def streamed(events: list[Event], index: int, **options: bool) -> dict[str, Any]:
    """The chunks of one choice, joined."""
    encoder = CompletionChunks("job", "demo", 1, include_usage=False, **options)
    chunks = [json.loads(encoder.encode(0, event).removeprefix(b"data: ")) for event in events if event.index == index]
    choices = [chunk["choices"][0] for chunk in chunks]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    joined = {name: [item for choice in choices for item in choice["logprobs"][name]] for name in names}
    return {"text": "".join(choice["text"] for choice in choices), "logprobs": joined}


def offsets_of(choice: Choice) -> list[int | None]:
    return [each.text_offset for each in choice.logprobs or []]


tokens = st.one_of(
    st.integers(0, END - 1),
    st.sampled_from([*FACE, DASHES, 22757, 21253, 169, 94, 222, 4210, 6353, END, UNKNOWN, 11, 257]),
    st.integers(0, 343).map(lambda number: byte_tokens()[number]),
)
#: Tokens of any text, of none, and of texts that are cut anywhere.
token_lists = st.one_of(
    st.lists(tokens, min_size=1, max_size=12),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).map(
        lambda t: gpt2_tokenizer().encode(t)
    ),
    st.text("é漢😀👩‍🚀 a", min_size=1, max_size=8).map(lambda text: gpt2_tokenizer().encode(text)),
)


# --- text and offsets -----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    prompt=token_lists,
    output=token_lists,
    echo=st.booleans(),
    every=st.integers(1, 5),
    samples=st.integers(1, 2),
    skip=st.booleans(),
)
def test_prompt_and_output_are_decoded_together_and_offsets_are_positions_in_the_text(
    prompt: list[int], output: list[int], echo: bool, every: int, samples: int, skip: bool
) -> None:
    result, deltas = compute(prompt, output, every, echo=echo, n=samples, ignore_eos=True, skip_special_tokens=skip)
    expected = Expected.of(prompt, output, skip=skip)
    events = events_of(deltas, result)
    for index, choice in enumerate(result.choices):
        if echo:
            assert choice.text == expected.text
            shown = [t for t in choice.token_ids[len(prompt) :] if not (skip and t == END)]
            assert UNKNOWN in prompt + shown or choice.text == gpt2_tokenizer().decode(prompt + shown)
            assert offsets_of(choice) == expected.offsets
        else:
            assert choice.text == expected.text[expected.output_at :]
            offsets = [at - expected.output_at for at in expected.offsets[len(prompt) :]]
            assert offsets_of(choice) == [max(at, 0) for at in offsets]
        in_format = completion(result)["choices"][index]
        assert in_format["logprobs"]["text_offset"] == offsets_of(choice)
        assert streamed(events, index) == {"text": choice.text, "logprobs": in_format["logprobs"]}


@settings(max_examples=200, deadline=None)
@given(
    prompt=token_lists,
    output=token_lists,
    echo=st.booleans(),
    every=st.integers(1, 5),
    stop=st.lists(st.text("é漢😀 a,\ufffd", min_size=1, max_size=3), max_size=3),
    end=st.sampled_from([END, 222, 257]),
    min_tokens=st.integers(0, 2),
)
def test_what_a_stop_removes_from_the_text_is_at_its_end(
    prompt: list[int], output: list[int], echo: bool, every: int, stop: list[str], end: int, min_tokens: int
) -> None:
    fields = {"echo": echo, "stop": stop, "stop_token_ids": [end], "min_tokens": min(min_tokens, len(output))}
    result, deltas = compute(prompt, output, every, **fields)
    (choice,) = result.choices
    by_token = choice.finish_reason == "stop" and not isinstance(choice.stop_reason, str)
    output = choice.token_ids[len(prompt) if echo else 0 :]
    expected = Expected.of(prompt, output[:-1] if by_token else output)
    whole = expected.text if echo else expected.text[expected.output_at :]
    assert whole.startswith(choice.text)
    if isinstance(choice.stop_reason, str):
        assert whole.startswith(choice.stop_reason, len(choice.text)) or whole.endswith("\ufffd")
        assert len(choice.text) >= (expected.output_at if echo else 0)  # the prompt is not searched
    else:
        assert choice.text == whole
    start = 0 if echo else expected.output_at
    at = [max(offset - start, 0) for offset in expected.offsets[0 if echo else len(prompt) :]]
    assert offsets_of(choice) == [min(offset, len(choice.text)) for offset in at] + [len(choice.text)] * by_token
    assert streamed(events_of(deltas, result), 0)["logprobs"] == completion(result)["choices"][0]["logprobs"]


@pytest.mark.parametrize(
    ("prompt", "output", "echo", "text", "offsets"),
    [
        pytest.param("😀 and", [], True, "😀 and", [0, 0, 1], id="a character of two tokens"),
        pytest.param(FACE[:1], FACE[1:], True, "😀", [0, 0], id="over the border"),
        pytest.param(FACE[:1], FACE[1:], False, "😀", [0], id="over the border, without echo"),
        pytest.param(FACE[:1], [11], True, "\ufffd,", [0, 1], id="a character that the output does not continue"),
        pytest.param(FACE[:1], [11], False, ",", [0], id="the same without echo"),
        pytest.param(FACE[:1], [FACE[0]], True, "\ufffd\ufffd", [0, 1], id="another character begins"),
        pytest.param(FACE[:1], [], True, "\ufffd", [0], id="nothing follows"),
        pytest.param(FACE[:1], [UNKNOWN, FACE[1], 11], True, "😀,", [0, 0, 0, 1], id="an id without bytes between"),
        pytest.param(FACE[:1], [UNKNOWN], True, "\ufffd", [0, 0], id="nothing but an id without bytes"),
        pytest.param(FACE[:1], [END], True, "\ufffd", [0, 1], id="the end of text follows"),
        pytest.param(FACE[:1], [END], False, "", [0], id="the end of text, without echo"),
        pytest.param("", [464], True, "<|endoftext|>The", [0, 13], id="the empty prompt"),
        pytest.param([END], [464], True, "<|endoftext|>The", [0, 13], id="its token"),
        pytest.param("", [464], False, "The", [0], id="the empty prompt, without echo"),
        pytest.param([DASHES, DASHES], [242, 11], True, "\ufffd\u2014,", [0, 1, 1, 2], id="an incomplete one before"),
        pytest.param([164, 99], [22757, 11], True, "覚醒,", [0, 0, 0, 2], id="a token that ends one and has another"),
        pytest.param([164, 99], [21253, 228], False, "覚\ufffd", [0, 1], id="a token that ends one and begins another"),
        pytest.param([169, 94], [0, 222, 0], True, "\ufffd\ufffd!\ufffd!", [0, 1, 2, 3, 4], id="bytes of a surrogate"),
        pytest.param([169, 94], [222, 0], False, "\ufffd!", [0, 1], id="the last byte of a surrogate in the output"),
        pytest.param([187], [4210], True, "\ufffd\ufffd", [0, 1], id="a byte of no character and a real U+FFFD"),
    ],
)
def test_known_texts_and_offsets(
    prompt: str | list[int], output: list[int], echo: bool, text: str, offsets: list[int]
) -> None:
    (choice,) = compute(prompt, output, echo=echo)[0].choices
    assert (choice.text, offsets_of(choice)) == (text, offsets)


def test_a_stop_string_is_not_found_in_the_prompt() -> None:
    (choice,) = compute("go st", gpt2_tokenizer().encode("op stop"), stop=["stop"], echo=True)[0].choices
    assert (choice.text, choice.stop_reason) == ("go stop ", "stop")
    (choice,) = compute(FACE[:1], FACE[1:], stop=["😀"], echo=True)[0].choices
    assert (choice.text, choice.stop_reason, offsets_of(choice)) == ("", "😀", [0, 0])
    (choice,) = compute(FACE[:1], [11, 11], stop=["\ufffd"], echo=True)[0].choices
    assert (choice.text, choice.stop_reason) == ("\ufffd,,", None)


def test_a_long_prompt_is_decoded_once() -> None:
    prompt = gpt2_tokenizer().encode("😀 and " * 1_000)
    decoded = 0

    class Counting(TiktokenTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            nonlocal decoded
            decoded += 1
            return super().token_bytes(token_id)

    tokenizer = Counting(gpt2_tokenizer()._encoding)
    result, _ = compute(prompt, [257] * 200, tokenizer=tokenizer, n=8, echo=True, logprobs=None)
    assert all(choice.text.endswith(" a" * 200) for choice in result.choices)
    assert decoded <= len(prompt) + 8 * 200


# --- other tokenizers -----------------------------------------------------------------------------------------------


@functools.cache
def own(name: str) -> tuple[Peer, Tokenizer]:
    """A tokenizer that is not byte-level, of the library and ours."""
    made = {"llama": llama, "unigram": unigram, "word_piece": word_piece}[name]()
    return made, LibraryTokenizer(made, "", Described())


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["llama", "unigram", "word_piece"]),
    draws=st.lists(st.integers(0, 10**6), min_size=2, max_size=14),
    echo=st.booleans(),
    skip=st.booleans(),
    every=st.integers(1, 4),
)
def test_other_tokenizers_stream_the_text_that_their_library_gives(
    name: str, draws: list[int], echo: bool, skip: bool, every: int
) -> None:
    peer, tokenizer = own(name)
    prompt, output = peer.encode("the king", add_special_tokens=False).ids, [i % tokenizer.vocab_size for i in draws]
    result, deltas = compute(
        prompt, output, every, tokenizer=tokenizer, echo=echo, skip_special_tokens=skip, ignore_eos=True
    )
    (choice,) = result.choices
    whole, start = (peer.decode(ids, skip_special_tokens=skip) for ids in (prompt + output, prompt))
    assert choice.text == (whole if echo else whole.removeprefix(start))
    assert streamed(events_of(deltas, result), 0)["text"] == choice.text
    offsets = offsets_of(choice)
    assert offsets == sorted(offsets, key=lambda at: at or 0)
    assert all(0 <= (at or 0) <= len(choice.text) for at in offsets)


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_of_byte_tokens_are_their_bytes_and_all_names_differ() -> None:
    tokenizer = gpt2_tokenizer()
    assert tokenizer.token_name(13) == "."
    assert tokenizer.token_name(DASHES) == r"bytes:\xe2\x80"
    assert tokenizer.token_name(12520) == r"bytes:\x20\xf0\x9f"
    assert tokenizer.token_name(4210) == "\ufffd"
    assert tokenizer.token_name(UNKNOWN) == "token_id:50300"
    names = [tokenizer.token_name(token) for token in range(VOCAB_SIZE)]
    assert len(set(names)) == len(names)
    for token in byte_tokens():
        if names[token].startswith("bytes:"):
            assert bytes.fromhex(names[token][6:].replace(r"\x", "")) == tokenizer.token_bytes(token)


def awkward() -> Tokenizer:
    """A vocabulary with tokens that look like names of others, and with two tokens of the same bytes."""
    texts = [r"bytes:\xe2", "bytes:", "token_id:7", "a b"]
    ranks = {bytes([i]): i for i in range(256)} | {text.encode(): 256 + i for i, text in enumerate(texts)}
    specials = {"<|endoftext|>": 260, "a b": 261}
    return TiktokenTokenizer(
        tiktoken.Encoding("awkward", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    )


def maps_of(result: Result, **options: bool) -> list[tuple[str, float, dict[str, float]]]:
    """Name, value and map of each token with a context."""
    logprobs = completion(result, **options)["choices"][0]["logprobs"]
    found = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return [each for each in found if each[1] is not None]


@settings(max_examples=150, deadline=None)
@given(
    chosen=st.lists(st.integers(0, 265), min_size=1, max_size=4),
    top=st.lists(st.sampled_from([*range(250, 268), 0xE2, 0x80, 97]), min_size=1, max_size=20, unique=True),
    as_token_ids=st.booleans(),
    old=st.booleans(),
)
def test_no_two_tokens_of_a_map_share_a_name(chosen: list[int], top: list[int], as_token_ids: bool, old: bool) -> None:
    tokenizer = awkward()
    request = parse_request({"prompt": [97], "max_tokens": len(chosen), "logprobs": len(top), "ignore_eos": True})
    state = state_of(request, tokenizer)
    for token in chosen:
        state.sequences[0].append(TokenScore(token, -float(token), [(other, -float(other)) for other in top]))
        state.texts[0].decode_last_token()
    result = state.result("demo", "same", 0.0)
    for each in result.choices[0].logprobs or [] if old else []:  # older workers sent the text
        for item in (each, *each.top):
            item.token = tokenizer.token_text(item.token_id)
    for token, (name, logprob, found) in zip(chosen, maps_of(result, as_token_ids=as_token_ids), strict=True):
        assert logprob == -float(token) == found[name]
        assert sorted(found.values()) == sorted(-float(each) for each in {token, *top})
        if as_token_ids:
            assert found == {f"token_id:{each}": -float(each) for each in {token, *top}}


def test_the_likeliest_tokens_of_one_text_keep_their_values() -> None:
    top = [(FACE[0], -4.286), (222, -5.5)]
    state = state_of(parse_request({"prompt": "a", "max_tokens": 1, "logprobs": 2}))
    state.sequences[0].append(TokenScore(DASHES, -8.908, top))
    state.texts[0].decode_last_token()
    (found,) = maps_of(state.result("demo", "same", 0.0))
    name = r"bytes:\xe2\x80"
    assert found == (name, -8.908, {name: -8.908, r"bytes:\xf0\x9f\x98": -4.286, r"bytes:\x80": -5.5})
    (found,) = maps_of(state.result("demo", "same", 0.0), as_token_ids=True)
    assert found == ("token_id:447", -8.908, {"token_id:447": -8.908, "token_id:47249": -4.286, "token_id:222": -5.5})


def test_streams_name_tokens_by_their_ids_too() -> None:
    result, deltas = compute([11, DASHES], [*FACE, 11], echo=True)
    whole = completion(result, as_token_ids=True)["choices"][0]["logprobs"]
    assert streamed(events_of(deltas, result), 0, as_token_ids=True)["logprobs"] == whole
    assert whole["tokens"] == ["token_id:11", "token_id:447", "token_id:47249", "token_id:222", "token_id:11"]
    assert whole["top_logprobs"][0] is None

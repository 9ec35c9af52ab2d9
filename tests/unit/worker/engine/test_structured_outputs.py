"""Texts of a given form: every one that ends because its grammar is complete matches, alone and in a batch."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Peer

from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.results import Choice, Result
from headrace.model.generation_config import Ends
from headrace.model.tokenizers.base import Described
from headrace.model.tokenizers.library import LibraryTokenizer
from headrace.worker.engine import grammars
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.helper_process import Helpers
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.scheduler import ModelRunnerOutput, SchedulerOutput
from headrace.worker.engine.sequence_text import TextDelta
from headrace.worker.engine.token_rules import TokenRules
from tests.unit.model.tokenizer_makers import added, byte_level, llama, unigram, word_level, word_piece
from tests.unit.worker.engine.engine_helpers import ask, build, demo_tokenizer, drive, substance, tokens_of

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "tall": {"type": "boolean"}},
    "required": ["name", "tall"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    """One engine for most tests, with proposed tokens, so that its grammars and vocabulary are made once."""
    return build(draft_tokens=4)


def compute(engine: Engine, *requests: GenerateRequest) -> list[Result]:
    """The results of some requests that are computed together."""
    futures = [engine.submit(request) for request in requests]
    prepared(engine)
    return drive(engine, *futures)


def prepared(engine: Engine) -> None:
    """Wait until the grammars are compiled."""
    deadline = time.monotonic() + 60
    while len(engine._preparations):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def write(engine: Engine, form: dict[str, Any], **fields: Any) -> list[Choice]:
    """The choices of one request with a form."""
    (result,) = compute(engine, ask("She said:", structured_outputs=form, **{"seed": 1, "max_tokens": 24, **fields}))
    return result.choices


def error_of(engine: Engine, **fields: Any) -> JobFailed:
    """How a request fails."""
    with pytest.raises(JobFailed) as caught:
        compute(engine, ask(**fields))
    return caught.value


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": r"[A-Z][a-z]{2,8} \d{4}"}, r"[A-Z][a-z]{2,8} [0-9]{4}"),
        ({"grammar": 'start: noun " " verb\nnoun: "cat" | "dog"\nverb: "sat" | "ran"'}, "(cat|dog) (sat|ran)"),
    ],
)
def test_a_text_has_the_form_that_was_asked_for(engine: Engine, form: dict[str, Any], pattern: str) -> None:
    for choice in [*write(engine, form), *write(engine, form, temperature=1, n=4)]:
        assert re.fullmatch(pattern, choice.text)
        assert (choice.finish_reason, choice.stop_reason, choice.complete) == ("stop", None, True)
        assert demo_tokenizer().decode(choice.token_ids).removesuffix("<|endoftext|>") == choice.text


def test_json_has_the_schema(engine: Engine) -> None:
    for choice in write(engine, {"json": PERSON}, temperature=1, n=6, max_tokens=60):
        assert choice.complete
        jsonschema.validate(json.loads(choice.text), PERSON)
        assert json.dumps(json.loads(choice.text), ensure_ascii=False) == choice.text or "\\" in choice.text


def test_a_text_that_is_cut_says_so(engine: Engine) -> None:
    form = {"regex": "[a-z ]{40,}"}
    (cut,) = write(engine, form, max_tokens=3)
    assert (cut.finish_reason, cut.complete) == ("length", False)
    (long_enough,) = write(engine, form, max_tokens=40)
    assert (long_enough.finish_reason, long_enough.complete) == ("length", True)
    (stopped,) = write(engine, {"choice": ["no way"]}, stop=["w"], logprobs=1)
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason, stopped.complete) == ("no ", "stop", "w", False)
    the = demo_tokenizer().encode(" the")
    (ended,) = write(engine, {"choice": [" to the"]}, stop_token_ids=the, logprobs=1)
    assert (ended.text, ended.stop_reason, ended.complete) == (" to", the[0], False)
    assert ended.logprobs is not None
    assert [score.text_offset for score in ended.logprobs] == [0, 3]


def test_the_last_piece_of_a_stream_says_whether_the_text_has_the_form(engine: Engine) -> None:
    request = ask("She said:", structured_outputs={"regex": "[a-z]{6}"}, n=2, temperature=1, max_tokens=3)
    deltas: list[TextDelta] = []
    engine.submit(request).cancel()  # compiles the form
    prepared(engine)
    (result,) = drive(engine, engine.submit(request, on_text=deltas.append))
    assert {d.index: d.complete for d in deltas if d.finish_reason} == {c.index: c.complete for c in result.choices}
    assert {d.complete for d in deltas if not d.finish_reason} == {None}


@pytest.mark.parametrize("more", [{"min_tokens": 8}, {"ignore_eos": True}])
def test_nothing_forces_text_outside_the_form(engine: Engine, more: dict[str, Any]) -> None:
    for form, texts in (({"choice": ["yes", "no"]}, {"yes", "no"}), ({"choice": [""]}, {""})):
        for choice in write(engine, form, temperature=1, n=3, **more):
            assert choice.text in texts
            assert (choice.finish_reason, choice.complete) == ("stop", True)


def test_choices_that_begin_alike_all_occur_and_the_empty_one(engine: Engine) -> None:
    form = {"choice": ["", "a", "ab", "abc", "é", "a|b(c)"]}
    texts = {choice.text for choice in write(engine, form, temperature=2, n=64)}
    assert texts <= set(form["choice"])
    assert {"", "ab"} <= texts


def test_max_tokens_that_hold_no_choice_are_refused(engine: Engine) -> None:
    refused = error_of(engine, structured_outputs={"choice": ["international waters", "abcdefghijk"]}, max_tokens=1)
    assert refused.code == "invalid_request"
    assert str(refused).startswith("max_tokens: got 1; expected at least 2, the fewest tokens")
    (choice,) = write(engine, {"choice": ["international waters"]}, max_tokens=2)
    assert choice.complete is (choice.text == "international waters")  # it may have begun with a shorter token


@pytest.mark.parametrize(
    ("form", "fewest"),
    [
        ({"regex": "international waters[a-z]*"}, 2),
        ({"regex": "(internat|internal)x"}, 1),  # of "interna", with which a token begins
        ({"json": PERSON}, 4),  # {" name ": "
        ({"grammar": f'start: "{"- " * 40}" /[a-z]/'}, 33),  # of the first 64 bytes: "-", 31 times " -", " "
        ({"grammar": 'start: "a" start'}, 79),  # has no end; of 10,001 bytes, which are known, 128 in a token
    ],
)
def test_max_tokens_that_do_not_hold_the_beginning_are_refused(
    engine: Engine, form: dict[str, Any], fewest: int
) -> None:
    if fewest > 1:
        refused = error_of(engine, structured_outputs=form, max_tokens=fewest - 1)
        (kind,) = form
        assert refused.code == "invalid_request"
        assert f"max_tokens: got {fewest - 1}; expected at least {fewest}, the fewest tokens of '" in str(refused)
        assert str(refused).endswith(f"with which each text of structured_outputs.{kind} begins [invalid_request]")
    (choice,) = write(engine, form, max_tokens=fewest)
    assert len(choice.token_ids) <= fewest


def test_log_probabilities_are_those_of_the_model(engine: Engine) -> None:
    free, formed = compute(
        engine,
        ask("The river", max_tokens=1, logprobs=3),
        ask("The river", max_tokens=1, logprobs=3, structured_outputs={"regex": "[0-9]"}),
    )
    first, second = free.choices[0].logprobs, formed.choices[0].logprobs
    assert first is not None
    assert second is not None
    assert second[0].top == first[0].top
    assert second[0].token.isdigit()
    assert second[0].logprob not in {top.logprob for top in first[0].top}


def test_plain_masks_need_no_grammar(engine: Engine) -> None:
    (free,) = compute(engine, ask("The river", max_tokens=6))
    first = free.choices[0].token_ids[0]
    word = demo_tokenizer().decode([first]).strip()
    allowed, without = compute(
        engine,
        ask("The river", max_tokens=6, allowed_token_ids=[262, 290, first], temperature=1, n=3),
        ask("The river", max_tokens=6, bad_words=[word]),
    )
    assert all(set(choice.token_ids) <= {262, 290, first} for choice in allowed.choices)
    assert word in free.text
    assert first not in without.choices[0].token_ids
    assert allowed.choices[0].complete is None
    alike = error_of(engine, prompt="a", allowed_token_ids=[50256], min_tokens=2)
    assert alike.code == "no_token_allowed"
    assert error_of(engine, prompt="a", allowed_token_ids=[50257]).code == "invalid_token_id"


def test_the_same_bits_alone_and_in_a_batch(engine: Engine) -> None:
    common: dict[str, Any] = {"temperature": 0.9, "max_tokens": 20, "logprobs": 2, "repetition_penalty": 1.2}
    requests = [
        ask("The king", seed=3, structured_outputs={"json": PERSON}, **common),
        ask("The king", seed=3, structured_outputs={"regex": "( [a-z]+)+"}, n=2, logit_bias={262: 2}, **common),
        ask("The king and " * 60, seed=4, structured_outputs={"regex": "( [a-z]+)+"}, min_tokens=5, **common),
        ask("The king", seed=5, **common),
        ask("The king", seed=6, bad_words=["the"], temperature=0, max_tokens=20),
    ]
    alone = [substance(compute(build(), request)[0]) for request in requests]
    together = [substance(result) for result in compute(build(), *requests)]
    assert alone == together
    drafted = [substance(result) for result in compute(engine, *requests)]
    assert drafted == alone


def test_proposed_tokens_outside_the_grammar_are_not_computed(engine: Engine) -> None:
    before = engine.stats()
    (choice,) = write(engine, {"regex": "(ab){40}"}, max_tokens=80)
    after = engine.stats()
    assert choice.text == "ab" * 40
    assert after.accepted - before.accepted == after.proposed - before.proposed > 10  # each is the only one possible


def test_a_step_that_fails_is_repeated_without_following_a_token_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(ModelRunner):
        steps = 0

        def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
            outcome = super().run(step)
            Failing.steps += 1
            if len(step.sampled_sequences) > 1 and Failing.steps % 3 == 0:
                raise RuntimeError("a kernel failed")
            return outcome

    requests = [ask("A", structured_outputs={"json": PERSON}, temperature=1, seed=i, max_tokens=40) for i in range(3)]
    expected = [substance(result) for result in compute(build(), *requests)]
    assert [substance(result) for result in compute(build(runner=Failing), *requests)] == expected


def test_a_grammar_that_is_compiled_holds_up_its_own_job_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first: Future[None] = Future()
    compile_now = grammars.Grammar.compile

    def slow(self: grammars.Grammar) -> Any:
        first.result(timeout=60)
        return compile_now(self)

    monkeypatch.setattr(grammars.Grammar, "compile", slow)
    waiting = engine.submit(ask("a", structured_outputs={"regex": "x[a-z]y"}))
    other = engine.submit(ask("a", max_tokens=2))
    drive(engine, other)
    assert not waiting.done()
    assert engine.stats().waiting == 1
    first.set_result(None)
    prepared(engine)
    assert re.fullmatch("x[a-z]y", drive(engine, waiting)[0].text)


def test_a_form_on_which_the_library_panics_fails_its_own_job(engine: Engine) -> None:
    failed = error_of(engine, structured_outputs={"json": {"required": "\N{THUMBS UP SIGN}" * 40}})
    assert (failed.code, str(failed)) == (
        "invalid_request",
        "structured_outputs.json: llguidance cannot read it [invalid_request]",
    )


def test_without_the_library_the_job_fails_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "find_spec", lambda _: None)
    failed = error_of(build(), structured_outputs={"choice": ["a"]})
    assert failed.code == "structured_outputs_missing"
    assert "lacks llguidance" in str(failed)


def test_a_grammar_that_exceeds_its_bounds_fails_its_own_job(engine: Engine) -> None:
    exploding = ask("a", structured_outputs={"regex": "(.*a.{30})|(.*b.{31})|(.*c.{32})"}, max_tokens=60, temperature=2)
    unlucky = engine.submit(exploding.model_copy(update={"n": 16, "logit_bias": {64: 9.0, 65: 9.0, 66: 9.0}}))
    other = engine.submit(ask("a", structured_outputs={"choice": ["yes"]}))
    prepared(engine)
    with pytest.raises(JobFailed) as caught:
        drive(engine, unlucky)
    assert caught.value.code == "grammar_too_complex"
    assert drive(engine, other)[0].text == "yes"


def test_a_grammar_that_nothing_matches_is_refused(engine: Engine) -> None:
    for form in ({"regex": r"[^\x00-\U0010ffff]"}, {"grammar": "start: start"}):
        assert "no text matches it" in str(error_of(engine, structured_outputs=form))


@pytest.fixture
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Helpers]:
    """Processes for grammars that have a tenth of the time."""
    program = tmp_path / "program.py"
    program.write_text(
        grammars.helpers.program.read_text().replace("CPU_S = 512 * 2**20, 1.0", "CPU_S = 512 * 2**20, 0.1")
    )
    assert program.read_text() != grammars.helpers.program.read_text()
    helpers = Helpers(program)
    monkeypatch.setattr(grammars, "helpers", helpers)
    yield helpers
    helpers.close()


def test_a_grammar_that_would_take_minutes_to_compile_fails_its_own_job(engine: Engine, impatient: Helpers) -> None:
    multiple = {"type": "integer", "multipleOf": 970001}  # 8 s and 545 MB, whatever the limits of llguidance
    hostile = engine.submit(ask("a", structured_outputs={"json": multiple}))
    other = engine.submit(ask("a", structured_outputs={"regex": "ok{1,3}"}))
    prepared(engine)
    with pytest.raises(JobFailed) as caught:
        drive(engine, hostile)
    assert caught.value.code == "grammar_too_complex"
    assert drive(engine, other)[0].text.startswith("ok")
    assert [process.lives() for process in impatient._idle] == [True]


def test_a_grammar_that_ends_the_process_is_refused(impatient: Helpers) -> None:
    chain = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(20_000)) + 'r20000: "a"\n'
    with pytest.raises(JobFailed, match="compiling it takes more time or memory"):
        grammars.Grammars(demo_tokenizer(), 50257).get({"grammar": chain})


def test_a_grammar_that_others_have_worn_out_is_compiled_again(engine: Engine) -> None:
    form = {"regex": "[a-z]{3,9}!"}
    first = engine.grammars.get(form)
    assert engine.grammars.get(form) is first
    rules = TokenRules(50257, grammar=first)
    token = demo_tokenizer().encode("ab")
    assert not rules.advance(token[0])
    assert rules.restart()
    assert rules.possible(demo_tokenizer().encode("c!")) == 2  # the new matcher has followed the text
    assert not rules.restart()
    assert not engine.grammars.knows(form)
    assert engine.grammars.get(form) is not first


@pytest.mark.parametrize("make", [llama, unigram, word_piece, word_level, lambda: byte_level(added)])
def test_other_tokenizers_write_the_form_too(make: Callable[[], Peer]) -> None:
    other = build(ends=Ends())
    tokenizer = LibraryTokenizer(make(), "digest", Described())
    other.tokenizer, other.grammars = tokenizer, grammars.Grammars(tokenizer, other.vocab_size)
    special, form = min(tokenizer.special_ids), {"regex": "( [a-z]+){2}"}
    for prompt in ([special], [special, 300]):  # the first text after special tokens alone may lose its space
        (result,) = compute(
            other,
            ask(prompt, structured_outputs={"regex": "( [a-z]+){2}"}, temperature=1.5, n=8, seed=1, max_tokens=24),
        )
        for choice in result.choices:
            assert (re.fullmatch(form["regex"], choice.text) is not None) is choice.complete, choice
        assert any(choice.complete for choice in result.choices)


# Random forms


LETTERS = st.sampled_from(["a", "b", "ab", " the", "é", "東", "🙂", "0", "\n", ".", "-"])
#: Parts of patterns that mean the same in Python and in Rust.
PATTERNS = st.recursive(
    LETTERS.map(re.escape) | st.sampled_from(["[a-c]", "[^a]", "[0-9é]", "[東-椅]", ".", ""]),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})")
        | st.lists(inner, min_size=2, max_size=3).map("".join)
        | st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{0,3}", "{1,}"])).map(
            lambda part: f"(?:{part[0]}){part[1]}"
        )
    ),
    max_leaves=8,
)
STEMS = st.lists(LETTERS, max_size=4).map("".join)
#: Texts that begin alike, whole ones that others continue, and the empty one.
CHOICES = st.tuples(STEMS, st.lists(STEMS, min_size=1, max_size=5)).map(
    lambda parts: [parts[0] + end for end in parts[1]]
)
SCHEMAS = st.recursive(
    st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 4)})
    | st.tuples(st.integers(-20, 20), st.integers(0, 40)).map(
        lambda bounds: {"type": "integer", "minimum": bounds[0], "maximum": sum(bounds)}
    )
    | st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["a", 5, None]}, {"const": "é\n"}])
    | st.just({"type": "string", "pattern": "^[ab]{2,3}$"}),
    lambda inner: (
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)})
        | st.fixed_dictionaries({"type": st.just("array"), "items": inner, "maxItems": st.integers(0, 2)})
        | st.dictionaries(st.sampled_from(["a", "b", "é"]), inner, max_size=2).map(
            lambda given: (
                {"type": "object", "properties": given, "required": sorted(given)[:1]} | {"additionalProperties": False}
            )
        )
    ),
    max_leaves=4,
)


#: Each example has several forms.
FEWER = settings(deadline=None, max_examples=settings.default.max_examples // 2)


def samples(engine: Engine, forms: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Choice]]:
    """Two choices for each form, all computed together."""
    forms = [form for form in forms if len(engine.grammars.get(form).beginning) <= 20]  # others may be refused
    requests = [
        ask("The", structured_outputs=form, n=2, temperature=1.5, seed=i, max_tokens=20, min_tokens=i % 3)
        for i, form in enumerate(forms)
    ]
    results = compute(engine, *requests)
    return [(form, choice) for form, result in zip(forms, results, strict=True) for choice in result.choices]


@FEWER
@given(st.lists(PATTERNS, min_size=2, max_size=5))
def test_every_complete_text_matches_its_pattern(engine: Engine, patterns: list[str]) -> None:
    for form, choice in samples(engine, [{"regex": pattern} for pattern in patterns]):
        matches = re.fullmatch(form["regex"], choice.text) is not None
        assert choice.complete or choice.finish_reason == "length"
        assert matches or not choice.complete, (form, choice.text)
        assert choice.complete or not matches or "\ufffd" in choice.text, (form, choice.text)


@FEWER
@given(st.lists(CHOICES, min_size=2, max_size=5))
def test_every_complete_text_is_a_choice(engine: Engine, lists: list[list[str]]) -> None:
    for form, choice in samples(engine, [{"choice": choices} for choices in lists]):
        assert choice.complete, (form, choice)
        assert choice.text in form["choice"]


@FEWER
@given(st.lists(SCHEMAS, min_size=2, max_size=5))
def test_every_complete_text_is_valid_by_its_schema(engine: Engine, schemas: list[dict[str, Any]]) -> None:
    for form, choice in samples(engine, [{"json": schema} for schema in schemas]):
        if choice.finish_reason == "stop":
            assert choice.complete
            jsonschema.validate(json.loads(choice.text), form["json"])


@pytest.fixture(scope="module")
def uncached() -> Engine:
    """One engine that keeps no prefixes."""
    return build(prefix_cache=False)


@pytest.fixture(scope="module")
def cached() -> Engine:
    """One engine that keeps prefixes of 16 tokens and more."""
    return build(prefill_chunk=16)


@settings(deadline=None, max_examples=settings.default.max_examples // 8)
@given(st.lists(st.tuples(PATTERNS, st.integers(1, 70)), min_size=2, max_size=4))
def test_texts_are_the_same_after_a_cached_prefix(
    cached: Engine, uncached: Engine, cases: list[tuple[str, int]]
) -> None:
    requests = [
        ask(
            tokens_of(length), structured_outputs={"regex": pattern}, temperature=1.5, seed=i, max_tokens=20, logprobs=1
        )
        for i, (pattern, length) in enumerate(cases)
        if len(uncached.grammars.get({"regex": pattern}).beginning) <= 20
    ]
    expected = [substance(result) for result in compute(uncached, *requests)]
    for _ in range(2):
        results = compute(cached, *requests)
        assert [substance(result) for result in results] == expected
    for request, result in zip(requests, results, strict=True):
        assert result.usage.cached_tokens >= (len(request.prompt) - 1) // 16 * 16

"""The completions API of `headrace serve`, driven by the official `openai` package, against a real worker."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from headrace.client import Client, Result
from headrace.model import load_tokenizer
from headrace.worker.redis_server import EmbeddedRedis
from tests.chat_model import make_chat_model, rendered
from tests.integration.http_server import HttpServer, events_of
from tests.integration.processes import worker_on
from tests.patience import PATIENCE_S

MODEL: dict[str, Any] = {"model": "demo"}
SHORT: dict[str, Any] = {**MODEL, "prompt": "Hello.", "max_tokens": 4}


@pytest.fixture(scope="module")
def http(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    directory = tmp_path_factory.mktemp("http")
    models = f"demo,chat={make_chat_model(directory / 'chat')}"
    with worker_on(server, directory / "worker.log", HEADRACE_LEASE_S="30", HEADRACE_MODEL=models) as worker:
        worker.wait_ready()
        with HttpServer(directory, server.url) as process:
            yield process


@pytest.fixture
def client(server: EmbeddedRedis) -> Iterator[Client]:
    with Client(redis_url=server.url) as made:
        yield made


@pytest.fixture(scope="module")
def api(http: HttpServer) -> Iterator[openai.OpenAI]:
    with http.openai() as made:
        yield made


def texts(completion: Any) -> list[tuple[int, str, str]]:
    return [(choice.index, choice.text, choice.finish_reason) for choice in completion.choices]


def texts_of(*results: Result) -> list[tuple[int, str, str]]:
    choices = [choice for result in results for choice in result.choices]
    return [(index, choice.text, choice.finish_reason) for index, choice in enumerate(choices)]


def test_a_completion_has_the_fields_of_openais(api: openai.OpenAI) -> None:
    """Other tests compare this text, which the README shows, with transformers."""
    found = api.completions.create(**MODEL, prompt="Hello.", max_tokens=10, temperature=0)
    assert texts(found) == [(0, '\n\n"I am not going to see,"', "length")]
    assert found.id.startswith("cmpl-")
    assert (found.object, found.model) == ("text_completion", "demo")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (2, 10, 12)
    assert found.system_fingerprint
    assert found._request_id == found.id.removeprefix("cmpl-")


PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_p": 0.9, "seed": 11, "max_tokens": 12},
    {"n": 3, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.5, "max_tokens": 8},
    {"temperature": 0, "stop": ["am"], "max_tokens": 20},
    {"temperature": 0, "stop": "not", "max_tokens": 20},
    {"temperature": 0, "logit_bias": {"198": -100}, "max_tokens": 6},
    {"seed": 3, "extra_body": {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 4}},
    {"temperature": 0, "extra_body": {"ignore_eos": True, "stop_token_ids": [40], "priority": "interactive"}},
    {
        "seed": 9,
        "user": "somebody",
        "best_of": 1,
        "stream": False,
        "suffix": None,
        "logprobs": None,
        "max_tokens": None,
    },
    {"temperature": 0, "echo": True, "max_tokens": 3, "extra_body": {"timeout_s": 30}},
]


@pytest.mark.parametrize("given", PARAMETERS, ids=lambda given: "+".join(given))
def test_every_parameter_does_what_it_does_in_the_client(
    api: openai.OpenAI, client: Client, given: dict[str, Any]
) -> None:
    plain = {**given, **given.get("extra_body", {})}
    for name in ("extra_body", "user", "best_of", "stream", "suffix"):
        plain.pop(name, None)
    found = api.completions.create(**MODEL, prompt="Hello.", **given)
    assert texts(found) == texts_of(client.submit("Hello.", **plain).result(PATIENCE_S))


def test_values_that_ask_for_nothing_change_nothing(api: openai.OpenAI) -> None:
    nothing = {"use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True, "priority": 0, "tools": []}
    nothing |= {"response_format": {"type": "text"}, "stream_options": {}, "guided_json": None, "max_tokens": 4.0}
    nothing |= {"max_completion_tokens": 4, "seed": 7.0, "metadata": {"a": "b"}, "bad_words": [], "min_p": 0}
    given: Any = {"suffix": "", "best_of": 1, "n": None, "user": "u", "stop": None, "logit_bias": {}, "echo": None}
    found = api.completions.create(**MODEL, prompt="Hello.", **given, extra_body=nothing)
    assert texts(found) == texts(api.completions.create(**SHORT, seed=7))


@pytest.mark.parametrize("seed", [-1, None])
def test_a_sampled_stream_can_be_had_again(api: openai.OpenAI, http: HttpServer, client: Client, seed: Any) -> None:
    asked: dict[str, Any] = {**SHORT, "temperature": 1.5, "n": 2, "max_tokens": 12, "stop": ["e"]}
    chunks = list(api.completions.create(**asked, seed=seed, stream=True))
    assert len({choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason}) == 2
    ends = {c.index: (c.finish_reason, c.stop_reason) for k in chunks for c in k.choices if c.finish_reason}  # type: ignore[attr-defined]
    last: Any = chunks[-1]
    assert last.seed != -1
    streamed = {index: "".join(c.text for k in chunks for c in k.choices if c.index == index) for index in (0, 1)}
    again: Any = api.completions.create(**asked, seed=last.seed)
    assert {choice.index: choice.text for choice in again.choices} == streamed
    assert {choice.index: (choice.finish_reason, choice.stop_reason) for choice in again.choices} == ends
    assert (again.seed, again.system_fingerprint) == (last.seed, last.system_fingerprint)
    with http.http() as plain, plain.stream("POST", "/execute", json={**asked, "seed": seed}) as response:
        *_, (_, end) = events_of(response)
    executed = Result.model_validate_json(end)
    repeated = client.submit(**{**asked, "seed": executed.seed}).result(PATIENCE_S)
    assert repeated.choices == executed.choices


def test_prompts_of_one_request_can_be_had_again_one_by_one(api: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**MODEL, "max_tokens": 8, "seed": -1}
    found: Any = api.completions.create(**asked, prompt=["The river", "The sea"])
    for prompt, choice in zip(("The river", "The sea"), found.choices, strict=True):
        again = api.completions.create(**{**asked, "seed": choice.seed}, prompt=prompt)
        assert again.choices[0].text == choice.text


def test_the_usage_says_how_much_of_a_prompt_an_ended_job_has_left(api: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**MODEL, "prompt": list(range(1000, 1300)), "max_tokens": 2, "temperature": 0}
    first, again = (api.completions.create(**asked) for _ in range(2))
    *_, last = api.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    both = api.completions.create(**{**asked, "prompt": [asked["prompt"], list(range(5))]})
    usages = [first.usage, again.usage, last.usage, both.usage]
    assert [usage.prompt_tokens_details.cached_tokens for usage in usages if usage] == [0, 256, 256, 256]  # type: ignore[union-attr]
    assert texts(first) == texts(again) == texts(both)[:1]


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(api: openai.OpenAI, client: Client) -> None:
    same: dict[str, Any] = {"n": 2, "seed": 5, "max_tokens": 6}
    prompts = ["The river", "The sea", "Hello."]
    alone = [client.submit(prompt, **same).result(PATIENCE_S) for prompt in prompts]
    found = api.completions.create(**MODEL, prompt=prompts, **same)
    assert texts(found) == texts_of(*alone)
    assert found.usage is not None
    assert found.usage.total_tokens == sum(result.usage.total_tokens for result in alone)
    encode = load_tokenizer("demo").encode
    assert texts(api.completions.create(**MODEL, prompt=[encode(p) for p in prompts], **same)) == texts(found)
    assert texts(api.completions.create(**MODEL, prompt=encode("The sea"), **same)) == texts_of(alone[1])
    one = api.completions.create(**MODEL, prompt=["The sea"], **same)
    assert texts(one) == texts_of(alone[1])


def test_an_echoed_prompt_is_scored(api: openai.OpenAI, client: Client) -> None:
    found = api.completions.create(**MODEL, prompt="Hello. Hello.", echo=True, logprobs=2, max_tokens=0)
    (choice,), scores = found.choices, found.choices[0].logprobs
    assert scores is not None
    assert choice.text == "Hello. Hello."
    assert scores.tokens == ["Hello", ".", " Hello", "."]
    assert scores.text_offset == [0, 5, 6, 12]
    assert scores.token_logprobs is not None
    assert scores.top_logprobs is not None
    assert scores.token_logprobs[0] is None
    assert scores.top_logprobs[0] is None
    own = client.submit("Hello. Hello.", echo=True, logprobs=2, max_tokens=0).result(PATIENCE_S).choices[0].logprobs
    assert own is not None
    assert scores.token_logprobs == [score.logprob for score in own]
    for score, top in list(zip(own, scores.top_logprobs, strict=True))[1:]:
        assert top == {score.token: score.logprob} | {other.token: other.logprob for other in score.top}


def test_the_prompt_has_log_probabilities_in_the_form_of_vllm(api: openai.OpenAI, client: Client) -> None:
    asked = {"prompt": ["Hello there", "The king"], "max_tokens": 0, "extra_body": {"prompt_logprobs": 1}}
    found = api.completions.create(**MODEL, **asked)  # type: ignore[call-overload]
    for choice, prompt in zip(found.choices, ("Hello there", "The king"), strict=True):
        _, *scores = client.submit(prompt, max_tokens=0, prompt_logprobs=1).result(PATIENCE_S).prompt_logprobs or []
        expected = [
            {score.token_id: (score.logprob, score.rank, score.token)}
            | {top.token_id: (top.logprob, 1, top.token) for top in score.top}
            for score in scores
        ]
        first, *others = choice.prompt_logprobs
        assert first is None
        assert [{int(name): tuple(entry.values()) for name, entry in each.items()} for each in others] == expected
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs: got 1; expected no such field beside stream"):
        api.completions.create(**MODEL, stream=True, **{**asked, "max_tokens": 1})  # type: ignore[call-overload]


def test_tokens_that_are_parts_of_a_character_have_names_and_offsets(api: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**MODEL, "echo": True, "logprobs": 5, "max_tokens": 0}
    (choice,) = api.completions.create(prompt="😀 and", **asked).choices
    scores = choice.logprobs
    assert scores is not None
    assert (choice.text, scores.text_offset) == ("😀 and", [0, 0, 1])
    assert scores.tokens == [r"bytes:\xf0\x9f\x98", r"bytes:\x80", " and"]
    (named,) = api.completions.create(prompt="😀 and", **asked, extra_body={"return_tokens_as_token_ids": True}).choices
    assert named.logprobs is not None
    assert named.logprobs.tokens == ["token_id:47249", "token_id:222", "token_id:290"]
    for each in (scores, named.logprobs):
        assert each.tokens is not None
        assert each.token_logprobs is not None
        assert each.top_logprobs is not None
        values = [top[name] for name, top in zip(each.tokens[1:], each.top_logprobs[1:], strict=True)]
        assert values == scores.token_logprobs[1:]  # type: ignore[index]
    forced = {"extra_body": {"logit_bias": {"222": 100}}, "temperature": 0, "max_tokens": 1}
    whole = [api.completions.create(**MODEL, prompt=[47249], echo=e, **forced).choices[0].text for e in (False, True)]
    assert whole == ["😀", "😀"]


def test_a_stream_is_the_completion_in_pieces(api: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**MODEL, "prompt": ["The river 😀", "The sea"], "n": 2, "seed": 5, "max_tokens": 30}
    asked |= {"logprobs": 1, "echo": True}
    whole = api.completions.create(**asked)
    pieces: dict[int, list[Any]] = {}
    chunks = list(api.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            pieces.setdefault(choice.index, []).append(choice)
    assert sorted(pieces) == [0, 1, 2, 3]
    for choice in whole.choices:
        mine = pieces[choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        assert [piece.finish_reason for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [item for piece in mine if piece.logprobs for item in getattr(piece.logprobs, name)]
            assert joined == getattr(choice.logprobs, name), name
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    counted: dict[int, Any] = {}
    options: Any = {"include_usage": True, "continuous_usage_stats": True}  # as guidellm sends them
    for chunk in api.completions.create(**asked, stream=True, stream_options=options):
        assert chunk.usage is not None
        for choice in chunk.choices:
            counted[choice.index] = chunk.usage
    assert whole.usage is not None
    assert sum(usage.completion_tokens for usage in counted.values()) == whole.usage.completion_tokens
    assert counted[0].prompt_tokens + counted[2].prompt_tokens == whole.usage.prompt_tokens


def test_a_completion_has_the_form_that_was_asked_for(api: openai.OpenAI, client: Client) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["é", "e"]}}, "required": ["a"]} | {
        "additionalProperties": False
    }
    format_: Any = {"type": "json_schema", "json_schema": {"name": "letter", "schema": schema, "strict": True}}
    found = api.completions.create(**SHORT | {"max_tokens": 20}, n=2, seed=1, extra_body={"response_format": format_})
    same = client.submit("Hello.", structured_outputs={"json": schema}, n=2, seed=1, max_tokens=20).result(PATIENCE_S)
    assert texts(found) == texts_of(same)
    assert {choice.text for choice in found.choices} <= {'{"a": "é"}', '{"a": "e"}'}
    assert all(choice.complete for choice in found.choices)
    asked = {**SHORT, "max_tokens": 12, "extra_body": {"structured_outputs": {"choice": ["the river", "the sea"]}}}
    *pieces, last = list(api.completions.create(**asked, stream=True))
    text = "".join(piece.choices[0].text for piece in (*pieces, last))
    assert text in ("the river", "the sea")
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].complete
    chat = api.chat.completions.create(model="chat", messages=CHAT, max_tokens=12, extra_body=asked["extra_body"])
    assert chat.choices[0].message.content in ("the river", "the sea")
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(**SHORT, extra_body={"structured_outputs": {"regex": "(a"}})
    assert caught.value.param == "structured_outputs.regex"
    assert "unclosed group, at character 0" in str(caught.value)


def test_a_stream_ends_as_openais_does(http: HttpServer) -> None:
    asked = {**SHORT, "temperature": 0, "stream": True}
    with http.http() as plain, plain.stream("POST", "/v1/completions", json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [data for _, data in events_of(response)]
    assert data[-1] == "[DONE]"
    assert all("usage" not in json.loads(piece) for piece in data[:-1])


def test_asyncio_streams_many_at_once(http: HttpServer, client: Client) -> None:
    async def one(api: openai.AsyncOpenAI, seed: int) -> str:
        stream = await api.completions.create(**SHORT, seed=seed, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with http.async_openai() as api:
            return await asyncio.gather(*(one(api, seed) for seed in range(20)))

    expected = [client.submit("Hello.", max_tokens=4, seed=seed) for seed in range(20)]
    assert asyncio.run(all_of_them()) == [job.result(PATIENCE_S).text for job in expected]


WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"prompt": "Hello.", "max_tokens": -1}, 400, "max_tokens", "max_tokens: got -1; expected a whole number"),
    ({"prompt": "Hello.", "temperature": 3}, 400, "temperature", "0 (always the most probable token) to 2"),
    ({"prompt": "Hello.", "max_new_tokens": 3}, 400, "max_new_tokens", "did you mean max_tokens?"),
    ({"prompt": "Hello.", "best_of": 3}, 400, "best_of", "all n samples are returned"),
    ({"prompt": "Hello.", "suffix": "world"}, 400, "suffix", "GPT-2 can only continue the prompt"),
    ({"prompt": "Hello.", "id": "mine"}, 400, "id", "no such parameter"),
    ({"prompt": "Hello.", "function": "f", "self": 1}, 400, "function", "expected one of"),
    ({"prompt": "Hello.", "stream": "yes"}, 400, "stream", "True or False"),
    ({"prompt": "Hello.", "stream_options": {"include_usage": True}}, 400, "stream_options", "only with stream"),
    ({"prompt": "Hello.", "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "include_usage"),
    ({}, 400, "prompt", "got nothing"),
    ({"prompt": []}, 400, "prompt", "an empty list"),
    ({"prompt": ["a", [1]]}, 400, "prompt", "mixed types"),
    ({"prompt": ["a", "\ud800"]}, 400, "prompt[1]", "surrogate"),
    ({"prompt": [[15496], []]}, 400, "prompt[1]", "0 token ids"),
    ({"prompt": ["a"] * 1025}, 400, "prompt", "at most 1024"),
    ({"prompt": ["a", "b"], "top_p": 0}, 400, "top_p", "top_p: got 0"),
    ({"prompt": "Hello.", "model": "gpt-5"}, 404, "model", "served: chat, demo"),
    ({"prompt": "Hello.", "model": "./demo"}, 404, "model", "served: chat, demo"),
    ({"prompt": "Hello.", "model": "~\u0000"}, 404, "model", "served: chat, demo"),
    ({"prompt": "Hello.", "max_tokens": 4.5}, 400, "max_tokens", "whole number"),
    ({"prompt": "Hello.", "skip_special_tokens": 2}, 400, "skip_special_tokens", "True or False"),
    ({"prompt": "Hello.", "messages": [{}]}, 400, "messages", "send messages to /v1/chat/completions"),
    ({"prompt": "Hello.", "max_tokens": 4, "max_completion_tokens": 5}, 400, "max_completion_tokens", "is 4"),
    ({"prompt": "Hello.", "temperature": float("nan")}, 400, None, "NaN is not a JSON value"),
    ({"prompt": "Hello.", "model": 5}, 400, "model", "the name of a model"),
    ({"prompt": [60_000]}, 400, "prompt", "60000"),
    ({"prompt": "Hello.", "logit_bias": {"60000": 1}}, 400, "logit_bias", "60000"),
    ({"prompt": "Hello.", "max_tokens": 5000}, 400, "prompt", "1024"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "status", "param", "part"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_an_invalid_field_is_named(
    http: HttpServer, body: dict[str, Any], status: int, param: str | None, part: str, stream: bool
) -> None:
    if stream and "stream" not in body:
        body = {**body, "stream": True}
        if "stream_options" in body:
            return
    with http.http() as plain:
        response = plain.post("/v1/completions", content=json.dumps(body))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert part in error["message"]


def test_the_openai_package_raises_its_own_errors(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        api.completions.create(**{**SHORT, "max_tokens": 5000})
    assert (wrong.value.code, wrong.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.NotFoundError) as unknown:
        api.completions.create(**{**SHORT, "model": "gpt-5"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="send messages to /v1/chat/completions"):
        api.embeddings.create(model="demo", input="Hello.")


def test_a_body_that_is_not_json_is_refused(http: HttpServer) -> None:
    with http.http() as plain:
        for content in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"):
            response = plain.post("/v1/completions", content=content)
            assert response.status_code == 400, content[:20]
            assert response.json()["error"]["type"] == "invalid_request_error"
        assert plain.delete("/v1/completions").status_code == 405


def test_models_are_those_that_workers_serve(api: openai.OpenAI) -> None:
    first, second = api.models.list().data
    assert (first.id, first.object, first.owned_by, second.id) == ("demo", "model", "headrace", "chat")
    assert first.created > 1_600_000_000
    assert api.models.retrieve("demo") == first
    with pytest.raises(openai.NotFoundError, match="served: chat, demo"):
        api.models.retrieve("openai/gpt2")


def test_execute_streams_start_tokens_and_end(http: HttpServer, client: Client) -> None:
    body = {"prompt": [15496, 13], "max_tokens": 10, "temperature": 0, "logprobs": 0}
    with http.http() as plain, plain.stream("POST", "/execute", json=body) as response:
        found = [(name, json.loads(data)) for name, data in events_of(response)]
    names = [name for name, _ in found]
    assert names == ["started", *["token"] * (len(found) - 2), "end"]
    result = client.job(found[0][1]["id"]).result(PATIENCE_S)
    assert Result.model_validate(found[-1][1]) == result
    tokens = [data for name, data in found if name == "token"]
    assert "".join(token["text"] for token in tokens) == result.text
    assert [i for token in tokens for i in token["token_ids"]] == result.choices[0].token_ids
    assert len([score for token in tokens for score in token["logprobs"]]) == 10
    assert tokens[-1]["finish_reason"] == "length"


def test_execute_streams_errors(http: HttpServer) -> None:
    with http.http() as plain:
        refused = plain.post("/execute", json={"prompt": "Hello.", "n": 0})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        failed = plain.post("/execute", json={"prompt": "Hello.", "max_tokens": 5000})
    found = list(events_of(failed))
    assert [name for name, _ in found] == ["started", "error"]
    assert json.loads(found[1][1])["error"]["code"] == "context_length_exceeded"


def test_health_is_answered_and_requests_are_logged(http: HttpServer) -> None:
    with http.http() as plain:
        assert plain.get("/health").json() == {"status": "ok"}
        assert plain.post("/v1/completions", json={**SHORT, "prompt": "Zanzibar"}).status_code == 200
        assert plain.get("/nowhere").json()["error"]["code"] == "unknown_url"
    lines = [json.loads(line) for line in http.said().splitlines() if line.startswith("{")]
    wanted = {"path": "/v1/completions", "method": "POST", "status": 200}
    assert any(wanted.items() <= line.items() for line in lines[-3:])  # a line of the previous test may follow
    assert "Zanzibar" not in http.said()
    assert "Traceback" not in http.said()
    assert not [line for line in lines if line["event"] == "http.failed"]


# --- chats -----------------------------------------------------------------------------------------------------------

CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the river?"}]
ASKED: dict[str, Any] = {"n": 2, "seed": 5, "max_tokens": 12, "stop": ["e"], "presence_penalty": 0.5}


def test_an_answer_in_a_chat_is_the_text_after_the_rendered_messages(api: openai.OpenAI, client: Client) -> None:
    own = client.submit(rendered(CHAT), model="chat", **ASKED, logprobs=2).result(PATIENCE_S)
    found = api.chat.completions.create(model="chat", messages=CHAT, **ASKED, logprobs=True, top_logprobs=2)
    assert [(c.index, c.message.content, c.finish_reason) for c in found.choices] == texts_of(own)
    assert {choice.message.role for choice in found.choices} == {"assistant"}
    assert (found.object, found.model, found.system_fingerprint) == ("chat.completion", "chat", own.fingerprint)
    assert found.id == f"chatcmpl-{found._request_id}"
    assert found.usage is not None
    assert found.usage.model_dump(exclude_none=True) == own.usage.as_openai()
    for choice, mine in zip(found.choices, own.choices, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert mine.logprobs is not None
        scores = [(t.token, t.logprob, [(o.token, o.logprob) for o in t.top_logprobs]) for t in choice.logprobs.content]
        assert scores == [(t.token, t.logprob, [(o.token, o.logprob) for o in t.top]) for t in mine.logprobs]
        data = b"".join(bytes(t.bytes or ()) for t in choice.logprobs.content)
        assert data.decode(errors="replace").startswith(choice.message.content or "")
    parts: list[Any] = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT]
    again = api.chat.completions.create(model="chat", messages=parts, **ASKED, extra_body={"top_k": 0, "echo": False})
    assert [choice.message.content for choice in again.choices] == [c.text for c in own.choices]


def test_a_streamed_chat_is_the_answer_in_pieces(api: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "chat", "messages": CHAT, **ASKED, "logprobs": True, "top_logprobs": 1}
    whole = api.chat.completions.create(**asked)
    chunks = list(api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {(chunk.object, chunk.id) for chunk in chunks} == {("chat.completion.chunk", chunks[0].id)}
    for choice in whole.choices:
        mine = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert {piece.delta.role for piece in mine[1:]} == {None}
        assert "".join(piece.delta.content or "" for piece in mine) == choice.message.content
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert mine[-1].delta.content is None
        scores = [score for piece in mine if piece.logprobs for score in piece.logprobs.content or ()]
        assert choice.logprobs is not None
        assert scores == choice.logprobs.content
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


IMAGE = {"type": "image_url", "image_url": {"url": "https://pictures.example/a"}}
WRONG_CHATS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"model": "demo"}, "messages", "no_chat_template", "chat template"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]", "invalid_request", "image_url"),
    ({"messages": [{"content": "Hello."}]}, "messages[0].role", "invalid_request", "got nothing"),
    ({"messages": [{"role": "user", "content": "a " * 2_000}]}, "messages", "context_length_exceeded", "1024"),
    ({"max_tokens": 5_000}, "messages", "context_length_exceeded", "1024"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "invalid_request", "no such parameter"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "param", "code", "part"), WRONG_CHATS, ids=[w[1] for w in WRONG_CHATS])
def test_what_is_wrong_in_a_chat_is_named(
    api: openai.OpenAI, body: dict[str, Any], param: str, code: str, part: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(**{"model": "chat", "messages": CHAT, "stream": stream, **body})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert part in caught.value.message


def test_prompts_and_messages_are_tokenized_and_tokens_detokenized(http: HttpServer, api: openai.OpenAI) -> None:
    encode = load_tokenizer("demo").encode
    with http.http() as plain:
        found = plain.post("/tokenize", json={"prompt": "The river 😀", "model": "demo"}).json()
        ids = encode("The river 😀")
        assert found == {"count": len(ids), "max_model_len": 1024, "tokens": ids, "token_strs": None}
        named = plain.post("/tokenize", json={"prompt": "The river", "return_token_strs": True}).json()
        assert named["token_strs"] == ["The", " river"]
        chat = plain.post("/tokenize", json={"messages": CHAT, "model": "chat"}).json()
        assert chat["tokens"] == encode(rendered(CHAT))
        answer = api.chat.completions.create(model="chat", messages=CHAT, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == chat["count"]
        assert plain.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "The river 😀"}
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": "a", "messages": CHAT}, "messages"),
            ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
            ("/tokenize", {"prompt": "a", "max_tokens": 5}, "max_tokens"),
            ("/tokenize", {"messages": CHAT, "model": "demo"}, "messages"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": "a"}, "tokens"),
            ("/detokenize", {"tokens": [60_000]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens"),
        ):
            response = plain.post(path, json=body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param), (path, body)
        assert plain.post("/tokenize", json={"prompt": "a", "model": "gpt-5"}).status_code == 404


def test_rows_of_a_batch_are_chats(api: openai.OpenAI, tmp_path: Path) -> None:
    def run(*rows: dict[str, Any]) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"method": "POST", **row}) + "\n" for row in rows))
        file = api.files.create(file=path, purpose="batch")
        batch = api.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        deadline = time.monotonic() + PATIENCE_S
        while batch.status not in ("completed", "failed"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
            batch = api.batches.retrieve(batch.id)
        return batch

    chat = {"custom_id": "a", "url": "/v1/chat/completions"}
    body = {"model": "chat", "messages": CHAT, "max_tokens": 4, "logprobs": True}
    batch = run({**chat, "body": body}, {**chat, "custom_id": "b", "body": {**body, "model": "demo"}})
    assert (batch.endpoint, batch.request_counts.completed, batch.request_counts.failed) == (chat["url"], 1, 1)
    line = json.loads(api.files.content(batch.output_file_id).text)
    found = ChatCompletion.model_validate(line["response"]["body"], strict=True)
    again = api.chat.completions.create(**body, seed=line["response"]["body"]["seed"])
    assert found.choices == again.choices
    failure = json.loads(api.files.content(batch.error_file_id).text)["response"]
    assert (failure["status_code"], failure["body"]["error"]["code"]) == (400, "no_chat_template")
    text = {"custom_id": "b", "url": "/v1/completions", "body": {"model": "demo", "prompt": "a"}}
    (fault,) = run({**chat, "body": body}, text).errors.data
    assert (fault.line, fault.param) == (2, "url")
    assert "the endpoint of the batch" in fault.message

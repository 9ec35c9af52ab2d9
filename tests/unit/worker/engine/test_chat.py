"""Chats: the text that a template makes is that of transformers, and a bad template fails its own job alone."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken
from tokenizers import Tokenizer as Peer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from headrace.client.wire.errors import JobCancelled, JobExpired, JobFailed
from headrace.client.wire.requests import parse_request
from headrace.model.generation_config import Ends
from headrace.model.tokenizers.base import Described as BaseDescribed
from headrace.model.tokenizers.ids_only import TokenIdsOnly
from headrace.model.tokenizers.library import LibraryTokenizer
from headrace.worker.engine import chat
from headrace.worker.engine.adapters import Adapters
from headrace.worker.engine.chat import render
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.engine.grammars import Grammars
from headrace.worker.engine.helper_process import HelperProcess
from headrace.worker.engine.preparation import prepared
from tests.patience import PATIENCE_S
from tests.unit.worker.engine.engine_helpers import build

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = '<<SYS>>\n' + messages[0]['content'].strip() + '\n<</SYS>>\n\n' %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = '' %}
{% endif %}
{%- for message in loop_messages -%}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 %}{% set content = system_message + message['content'] %}
    {% else %}{% set content = message['content'] %}{% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}"""
LOOPS = """{%- set ns = namespace(found=false, last=0) -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{%- continue -%}{%- endif -%}
{%- set ns.last = loop.index -%}
{{ loop.index }}/{{ loop.length }}:{{ m.role | upper }}:{{ m.content | trim }}
{% if ns.last > 3 %}{% break %}{% endif %}
{%- endfor -%}
{{ messages | tojson }}{{ tools | tojson(indent=2) if tools else 'no tools' }}{{ messages[0] | length }} {{ ns.last }}
{%- if date is defined %}{{ date }}{% endif %}"""
PARTS = """{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{% for part in m.content %}{{ part.text if part.type == 'text' else '?' }};{% endfor %}{% endif %}
</{{ m.role }}>{% endfor %}{{ strftime_now('%Y') }}{{ dict(a=1) | tojson }}"""
DIALOG = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
TEMPLATES = {"ChatML": CHATML, "Llama 2": LLAMA, "loops": LOOPS, "parts": PARTS, "DialoGPT": DIALOG}

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Grüße, \U0001f600 <b>&amp;</b> "}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "  2 "},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the answer is ", "name": "x"}],
]


def rendered(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """What transformers gives."""
    return str(render_jinja_template([messages], chat_template=template, **options, **SPECIAL)[0][0])


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", CHATS, ids=range(len(CHATS)))
def test_the_text_of_a_chat_is_that_of_transformers(template: str, messages: list[dict[str, Any]]) -> None:
    for begin in (True, False):
        assert render(template, messages, SPECIAL, add_generation_prompt=begin) == rendered(
            template, messages, add_generation_prompt=begin
        )
    if "bos_token" not in template:  # Llama's template trims what it continues
        ours = render(template, messages, SPECIAL, add_generation_prompt=False, continue_final_message=True)
        assert ours == rendered(template, messages, continue_final_message=True)


def test_variables_and_tools_reach_the_template_as_in_transformers() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    variables = {"tools": tools, "date": "today"}
    assert render(LOOPS, CHATS[0], SPECIAL, variables) == rendered(
        LOOPS, CHATS[0], tools=tools, date="today", add_generation_prompt=True
    )


def test_a_whole_tokenizer_of_transformers_gives_the_same_text() -> None:
    from tokenizers import Tokenizer, models

    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
    fast.chat_template = LLAMA
    assert render(LLAMA, CHATS[1], SPECIAL) == fast.apply_chat_template(
        CHATS[1], tokenize=False, add_generation_prompt=True
    )


def test_text_parts_are_joined_for_a_template_that_reads_only_text_and_kept_for_one_that_reads_parts() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    joined = [{"role": "user", "content": "a\nb"}]
    assert render(CHATML, messages, {}) == render(CHATML, joined, {})
    assert render(PARTS, messages, {}) == rendered(PARTS, messages)
    aliased = (
        "{% for m in messages %}{% set c = m['content'] %}{% for p in c %}[{{ p['text'] }}]{% endfor %}{% endfor %}"
    )
    assert render(aliased, messages, {}) == "[a][b]"


@pytest.mark.parametrize(
    ("template", "code", "part"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "failed",
            "longer than 0.5 s",
        ),
        ("{{ 10 ** (10 ** 10) }}", "failed", "longer than 0.5 s"),
        ("{{ 'a' * 10 ** 10 }}", "failed", "of memory"),
        ("{{ 'a'.center(10 ** 9) }}", "failed", "of memory"),
        ("{% for i in range(99999) %}{{ 'abcdefgh' * 9 }}{% endfor %}", "failed", "more than 262144 bytes"),
        ("{{ '\u00e9' * 200000 }}", "failed", "more than 262144 bytes"),
        ("{{ range(10 ** 9) | list }}", "failed", "Range too big"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "failed", "RecursionError"),
        ("{{ raise_exception('roles must\nalternate') }}", "failed", "roles must alternate"),
        ("{{ messages[0].nothing.at_all }}", "failed", "has no attribute"),
        ("{{ ''.__class__.__mro__ }}", "failed", "unsafe"),
        ("{{ namespace(_a=1) }}", "failed", "underscore"),
        ("{{ messages.append(1) }}", "failed", "unsafe"),
        ("{{ messages[0].content + 1 }}", "failed", "TypeError"),
        ("{% if %}", "invalid", "(line 1)"),
        ("{% unknown %}", "invalid", "unknown tag"),
        ("{% include 'x' %}", "failed", "no loader"),
    ],
)
def test_a_bad_template_fails_its_chat_and_says_why(template: str, code: str, part: str) -> None:
    with pytest.raises(JobFailed) as caught:
        render(template, CHATS[0], SPECIAL, limit_s=0.5)
    assert caught.value.code == {"failed": "chat_template_failed", "invalid": "invalid_chat_template"}[code]
    assert part in caught.value.message
    assert render("{{ messages[0].content }}", CHATS[0], SPECIAL) == "Hi"


def test_a_template_sees_no_secret_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_SIGNING_KEY", "secret")
    process = HelperProcess(chat._PROGRAM)
    try:
        with open(f"/proc/{process._process.pid}/environ", "rb") as file:
            assert b"HEADRACE" not in file.read()
    finally:
        process.end()


def test_a_process_that_was_killed_is_replaced() -> None:
    assert render("a", CHATS[0], {}) == "a"
    for process in chat.renderer.processes._idle:
        process._process.kill()
        process._process.wait()
    assert render("b", CHATS[0], {}) == "b"


def test_a_process_whose_worker_was_killed_ends_although_its_template_does_not() -> None:
    source = Path(chat._PROGRAM).read_text().replace("LIMIT_S = 10.0", "LIMIT_S = 0.2")
    process = subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    request: dict[str, Any] = {
        "template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    }
    request |= {"messages": [], "special_tokens": {}, "variables": {}, "max_bytes": 9}
    request |= {"add_generation_prompt": False, "continue_final_message": False}
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.close()  # as the worker's end does
    assert process.wait(PATIENCE_S) == -signal.SIGALRM
    assert process.stdout is not None
    process.stdout.close()


# --- in the engine ---------------------------------------------------------------------------------------------------


@functools.cache
def chatting(template: str | None = DIALOG) -> Engine:
    engine = build()
    own = engine.tokenizer
    described = SimpleNamespace(chat_template=template, special_tokens={"eos_token": "<|endoftext|>"})
    engine.tokenizer = Described(own, described)  # type: ignore[assignment]
    engine.start()
    return engine


class Described:
    """A tokenizer with a chat template."""

    def __init__(self, tokenizer: Any, described: Any) -> None:
        self._tokenizer, self._described = tokenizer, described

    def __getattr__(self, name: str) -> Any:
        return getattr(self._described if hasattr(self._described, name) else self._tokenizer, name)


def ask(engine: Engine, **fields: Any) -> Any:
    return engine.submit(parse_request({"max_tokens": 3, "temperature": 0, **fields})).result(PATIENCE_S)


def test_messages_are_the_prompt_that_the_template_writes() -> None:
    engine = chatting()
    messages = [{"role": "user", "content": "Does money buy happiness?"}, {"role": "user", "content": "Yes"}]
    text = "Does money buy happiness?<|endoftext|>Yes<|endoftext|>"
    chat_result, plain = ask(engine, messages=messages), ask(engine, prompt=text, parse_special_tokens=True)
    assert chat_result.choices == plain.choices
    assert chat_result.usage == plain.usage
    assert chat_result.usage.prompt_tokens == len(engine.tokenizer.encode(text, parse_special_tokens=True))
    assert chat_result.usage.prompt_tokens < ask(engine, prompt=text, parse_special_tokens=False).usage.prompt_tokens
    echoed = ask(engine, messages=messages, echo=True)
    assert echoed.usage.prompt_tokens == chat_result.usage.prompt_tokens


def test_the_setting_says_how_special_tokens_are_read_where_the_request_does_not() -> None:
    engine = chatting()

    def count(parse: bool | None) -> int:
        prompt = "a<|endoftext|>b"
        return int(ask(engine, prompt=prompt, parse_special_tokens=parse, operation="tokenize").usage.prompt_tokens)

    counts = []
    for default in (None, False, True):
        engine.parse_special_tokens = default
        counts.append([count(parse) for parse in (None, False, True)])
    engine.parse_special_tokens = None
    assert [row[0] for row in counts] == [counts[0][1], counts[0][1], 3]
    assert all(row[1] > row[2] == 3 for row in counts)


def test_a_model_without_a_template_refuses_messages() -> None:
    with pytest.raises(JobFailed, match="no chat template") as caught:
        ask(chatting(None), messages=CHATS[0])
    assert caught.value.code == "no_chat_template"


def test_token_ids_and_texts_are_answered_while_every_slot_is_taken() -> None:
    engine = build(slots=1)  # it is not started: it computes nothing
    engine.submit(parse_request({"prompt": "Hello.", "max_tokens": 9}))
    found = ask(engine, prompt="Hello. caf\u00e9 \U0001f600", operation="tokenize")
    ids = found.tokenized.tokens
    assert ids == engine.tokenizer.encode("Hello. caf\u00e9 \U0001f600")
    assert found.tokenized.token_strs == [engine.tokenizer.token_name(token) for token in ids]
    assert (found.tokenized.count, found.tokenized.max_model_len) == (len(ids), engine.max_context)
    assert ask(engine, prompt=ids, operation="detokenize").text == "Hello. caf\u00e9 \U0001f600"
    end = [*ids, 50256]
    assert ask(engine, prompt=end, operation="detokenize", skip_special_tokens=False).text.endswith("<|endoftext|>")
    assert not ask(engine, prompt=end, operation="detokenize").text.endswith("<|endoftext|>")
    with pytest.raises(JobFailed, match="token_ids names token id 1000000; this model's vocabulary ends at"):
        ask(engine, prompt=[10**6], operation="detokenize")
    engine.stop()


def test_a_model_without_a_tokenizer_computes_prompts_of_token_ids_alone() -> None:
    engine = build()
    engine.tokenizer = TokenIdsOnly("the model has spiece.model only; send token ids")
    cases: list[dict[str, Any]] = [
        {"prompt": "Hello."},
        {"prompt": "Hello.", "operation": "tokenize"},
        {"prompt": [5], "operation": "detokenize"},
    ]
    for fields in cases:
        with pytest.raises(JobFailed, match="spiece") as caught:
            ask(engine, **fields)
        assert caught.value.code == "no_tokenizer"
    assert ask(engine, prompt=[5, 6], operation="tokenize").tokenized.tokens == [5, 6]
    engine.start()
    assert len(ask(engine, prompt=[5]).choices[0].token_ids) == 3
    engine.stop()


def test_ids_without_a_token_have_no_text_and_texts_without_tokens_are_refused_by_name() -> None:
    library = Peer(WordLevel({"a": 0, "b": 3}))
    library.add_special_tokens([AddedToken("<s>")])
    tokenizer = LibraryTokenizer(library, "digest", BaseDescribed(chat_template="{{ messages[0].content }}"))
    model: Any = SimpleNamespace(
        tokenizer=tokenizer, ends=Ends(), defaults={}, vocab_size=8, max_context=9, model_name="m"
    )
    model.parse_special_tokens, model.grammars, model.adapters = None, Grammars(tokenizer, 8), Adapters()

    def outcome(**fields: Any) -> Any:
        return prepared(parse_request(fields), "job", Future(), model)

    assert outcome(prompt=[0, 7, 2, 3], operation="detokenize").choices[0].text == "a b"
    for fields in ({"prompt": "c"}, {"messages": [{"role": "user", "content": "c"}]}):
        for operation in ({}, {"operation": "tokenize"}):
            failed = outcome(**fields, **operation)
            assert (type(failed), failed.code) == (JobFailed, "invalid_request")
            assert f"{next(iter(fields))}: the model's tokenizer cannot encode the text" in failed.message


def test_a_request_for_token_ids_whose_time_has_passed_is_not_answered() -> None:
    engine = build()
    with pytest.raises(JobExpired, match="timeout_s passed"):
        ask(engine, prompt="Hello.", operation="tokenize", expires_at=1.0)
    assert ask(engine, prompt="Hello.", operation="tokenize", expires_at=time.time() + 60).tokenized.count == 2
    engine.stop()


def test_a_slow_template_holds_up_no_other_job_and_its_job_can_be_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    engine = chatting(endless)
    monkeypatch.setattr(chat.render, "__kwdefaults__", {**chat.render.__kwdefaults__, "limit_s": 2.0})
    request = parse_request({"messages": CHATS[0], "max_tokens": 3})
    started = time.monotonic()
    slow = [engine.submit(request, job_id=str(i)) for i in range(3)]
    assert engine.stats().waiting == 3
    assert ask(engine, prompt="Hello.").choices
    assert not any(future.done() for future in slow)
    engine.cancel("0")
    with pytest.raises(JobCancelled):
        slow[0].result(0.1)
    assert slow[1].cancel()
    with pytest.raises(JobFailed, match="longer than 2 s"):
        slow[2].result(PATIENCE_S)
    assert time.monotonic() - started < PATIENCE_S
    last = engine.submit(request)
    engine.stop()
    with pytest.raises(EngineStopped):
        last.result(PATIENCE_S)


def test_chats_that_do_not_end_hold_up_no_quick_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    engine = chatting("{% if messages[0].content == 'loop' %}" + loop + "{% endif %}{{ messages[0].content }}")
    monkeypatch.setattr(chat.render, "__kwdefaults__", {**chat.render.__kwdefaults__, "limit_s": 3.0})
    bad, good = (parse_request({"messages": [{"role": "user", "content": text}]}) for text in ("loop", "hi"))
    endless = [engine.submit(bad) for _ in range(4)]
    assert engine.submit(good).result(PATIENCE_S).choices
    assert not endless[-1].done()
    engine.stop()


TEXTS = st.text(st.sampled_from("ab \n\t{}%<|>'\"\u00e9\U0001f600&\\"), max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), TEXTS), min_size=1, max_size=4))
def test_any_chat_gives_the_text_of_transformers_or_its_error(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    for template in TEMPLATES.values():
        for options in ({"add_generation_prompt": True}, {"continue_final_message": True}):
            given_options = {"add_generation_prompt": False, **options}
            try:
                expected = rendered(template, messages, **given_options)
            except (ValueError, TemplateError):
                with pytest.raises(JobFailed):
                    render(template, messages, SPECIAL, **given_options)
            else:
                assert render(template, messages, SPECIAL, **given_options) == expected

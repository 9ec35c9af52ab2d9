"""The engine under vLLM's names, compared with transformers on the same weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from headrace.client import InvalidRequest, JobFailed
from headrace.client.wire.requests import parse_request
from headrace.model.hub import ModelError
from headrace.worker.engine import offline
from headrace.worker.engine.offline import LLM, SamplingParams, StructuredOutputsParams, TokensPrompt

PROMPTS = ["Hello, my name is", "The river", "The capital of France is"]


@pytest.fixture(scope="module", autouse=True)
def _leave_logging_alone() -> Iterator[None]:
    """Keep the logging configuration of the test suite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.worker.engine.offline.setup_logging", lambda settings: None)
        yield


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model="demo", dtype="float32", gpu_memory_utilization=0.9, tensor_parallel_size=1) as made:
        yield made


@pytest.fixture(scope="module")
def reference() -> Any:
    import torch
    from transformers import GPT2LMHeadModel

    from headrace.model.hub import DEMO

    return GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float64).eval()


def test_a_script_written_for_vllm_runs_with_the_import_changed(capsys: pytest.CaptureFixture[str]) -> None:
    script = """
from headrace.worker.engine.offline import LLM, SamplingParams
prompts = ["Hello, my name is", "The future of AI is"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
llm = LLM(model="demo", enforce_eager=True, max_model_len=256)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
llm.close()
"""
    exec(compile(script, "script", "exec"), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if "model.loaded" not in line]
    assert [line.split(",")[0] for line in lines] == ["Prompt: 'Hello", "Prompt: 'The future of AI is'"]


def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(llm: LLM, reference: Any) -> None:
    import torch

    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=8, logprobs=2), use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt == prompt
        tokens = llm.get_tokenizer().encode(prompt)
        assert output.prompt_token_ids == tokens
        (sample,) = output.outputs
        with torch.no_grad():
            logits = reference(torch.tensor([tokens + sample.token_ids])).logits[0, len(tokens) - 1 : -1]
        expected = logits.log_softmax(-1)
        assert sample.token_ids == expected.argmax(-1).tolist()
        chosen = [expected[at, token].item() for at, token in enumerate(sample.token_ids)]
        assert sample.logprobs is not None
        assert [scores[token].logprob for scores, token in zip(sample.logprobs, sample.token_ids, strict=True)] == (
            pytest.approx(chosen, abs=1e-4)
        )
        assert all(scores[token].rank == 1 for scores, token in zip(sample.logprobs, sample.token_ids, strict=True))
        assert sample.cumulative_logprob == pytest.approx(math.fsum(chosen), abs=1e-3)
        assert sample.finish_reason == "length"
        assert output.finished


def test_it_is_the_engine_that_serves_jobs(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=7, top_p=0.9, stop=[","], max_tokens=12)
    (output,) = llm.generate("The old house", params)
    fields = {"prompt": "The old house", "n": 2, "seed": 7, "top_p": 0.9, "stop": [","], "max_tokens": 12}
    result = llm._engine.submit(parse_request(fields)).result()
    assert [sample.text for sample in output.outputs] == [choice.text for choice in result.choices]
    assert [sample.stop_reason for sample in output.outputs] == [choice.stop_reason for choice in result.choices]
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_prompts_come_in_all_the_forms_of_vllm(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=3)
    tokens = llm.get_tokenizer().encode("Hello.")
    forms = ["Hello.", {"prompt": "Hello."}, {"prompt_token_ids": tokens}, tokens]
    outputs = [llm.generate(form, greedy)[0] for form in forms] + llm.generate(forms, [greedy] * 4)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert all(output.prompt_token_ids == tokens for output in outputs)
    assert llm.generate([], greedy) == []


def test_a_character_may_begin_in_the_prompt(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, logit_bias={222: 100.0}, logprobs=0)
    (output,) = llm.generate([47249], params)
    (sample,) = output.outputs
    assert (sample.text, sample.token_ids) == ("😀", [222])
    assert sample.logprobs is not None
    assert sample.logprobs[0][222].decoded_token == r"bytes:\x80"


def test_seeds_follow_from_that_of_the_llm() -> None:
    def texts(seed: int) -> list[str]:
        with LLM(model="demo", seed=seed) as made:
            return [output.outputs[0].text for output in made.generate(["The river"] * 3)]

    first = texts(1)
    assert first == texts(1)
    assert len(set(first)) == 3
    assert first != texts(2)


def test_a_prompt_that_is_too_long_is_refused_and_nothing_is_computed(llm: LLM) -> None:
    before = llm._engine.stats().tokens
    with pytest.raises(JobFailed, match="context_length_exceeded"):
        llm.generate(["The river " * 600, "The river"])
    llm.generate("The river", SamplingParams(max_tokens=1))
    assert llm._engine.stats().tokens <= before + 17


@pytest.mark.parametrize(
    ("params", "part"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_values_out_of_range_are_refused(params: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidRequest, match=part):
        SamplingParams(**params)


def test_unknown_arguments_are_refused_by_name(llm: LLM) -> None:
    with pytest.raises(TypeError, match="SamplingParams takes no argument 'best_off'; did you mean best_of"):
        SamplingParams(best_off=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="stop_tokens'; did you mean stop_token_ids"):
        SamplingParams(stop_tokens=[1])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean max_model_len"):
        LLM(model="demo", max_model_length=5)
    with pytest.raises(InvalidRequest, match="2 for 1 prompts"):
        llm.generate("a", [SamplingParams(), SamplingParams()])


# Everything that vLLM's classes take


NEUTRAL_SAMPLING: dict[str, Any] = {
    "prompt_logprobs": None, "detokenize": True, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False, "truncate_prompt_tokens": None, "output_kind": object(), "best_of": 1,
    "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "structured_outputs": None,
    "guided_decoding": None, "logits_processors": [], "allowed_token_ids": None, "bad_words": [], "extra_args": {},
    "flat_logprobs": False, "logprob_token_ids": None, "stream_interval": None, "repetition_detection": None,
    "thinking_token_budget": None, "skip_clone": True, "top_k": -1, "seed": -1, "stop": None, "min_p": 0,
    "temperature": None, "logit_bias": {}, "max_tokens": 4.0,
}  # fmt: skip


def test_sampling_parameters_of_vllm_that_ask_for_nothing_are_accepted(llm: LLM) -> None:
    greedy = SamplingParams(**{**NEUTRAL_SAMPLING, "temperature": 0})
    (output,) = llm.generate("The river", greedy)
    assert (
        output.outputs[0].text
        == llm.generate("The river", SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].text
    )
    for name, value in NEUTRAL_SAMPLING.items():
        assert isinstance(SamplingParams(**{name: value}).clone(), SamplingParams), name
    assert SamplingParams.from_optional(max_tokens=None, top_p=None) == SamplingParams()


def test_outputs_have_the_form_that_was_asked_for(llm: LLM) -> None:
    choices = [" river", " sea"]
    for form in (StructuredOutputsParams(choice=choices), {"choice": choices}):
        (output,) = llm.generate("The", SamplingParams(structured_outputs=form, temperature=0))
        assert output.outputs[0].text in choices
        assert output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("params", "instead"),
    [
        ({"prompt_logprobs": 21}, "0 to 20"),
        ({"bad_words": [""]}, "none empty"),
        ({"use_beam_search": True}, "samples"),
        ({"best_of": 3}, "all n samples"),
        ({"guided_decoding": {"regex": "a"}}, "use structured_outputs"),
        ({"allowed_token_ids": [-5]}, "token ids"),
        ({"include_stop_str_in_output": True}, "stop_reason"),
        ({"max_tokens": 4.5}, "whole number"),
        ({"n": True}, "whole number"),
        ({"min_tokens": "many"}, "whole number"),
        ({"min_tokens": 5, "max_tokens": 4}, "at most max_tokens"),
        ({"temperature": "hot", "max_tokens": None}, "a number"),
    ],
)
def test_sampling_parameters_that_are_not_computed_are_value_errors_with_the_name(
    params: dict[str, Any], instead: str
) -> None:
    with pytest.raises(ValueError, match=instead) as caught:
        SamplingParams(**params)
    assert str(caught.value).startswith(f"{next(iter(params))}: got ")


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokenizer": None, "quantization": None, "revision": None, "trust_remote_code": True, "seed": 0},
        {"enforce_eager": False, "gpu_memory_utilization": 0.5, "swap_space": 4, "enable_prefix_caching": True},
        {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "load_format": "auto", "task": "generate"},
        {"runner": "auto", "convert": "auto", "enable_lora": True, "max_loras": 2, "max_lora_rank": 16},
        {"enable_lora": False, "fully_sharded_loras": False, "hf_overrides": {}, "download_dir": None},
        {"max_model_len": None, "device": "cpu", "seed": -1, "max_num_batched_tokens": 512, "kv_cache_dtype": "auto"},
    ],
)
def test_arguments_of_vllm_that_ask_for_nothing_are_accepted(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    class Started:
        def start(self) -> None: ...

    monkeypatch.setattr("headrace.worker.engine.offline.load_engine", lambda settings: Started())
    LLM("demo", **arguments)
    for dtype in ("auto", "half", "float", torch.float32, None):
        LLM("demo", dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"tensor_parallel_size": 2}, "computed whole"),
        ({"quantization": "awq"}, "int8"),
        ({"tokenizer": "gpt2"}, "the model's own"),
        ({"revision": "v2"}, "directory"),
        ({"enable_prompt_adapter": True}, "LoRA"),
        ({"task": "embed"}, "generates text"),
        ({"max_model_len": -5}, "whole number from 2"),
        ({"max_num_seqs": "many"}, "whole number"),
        ({"dtype": "float8"}, "bfloat16"),
        ({"seed": "x"}, "64 bits"),
        ({"seed": True}, "64 bits"),
        ({"hf_overrides": {"n_layer": 2}}, "files of the model"),
    ],
)
def test_arguments_that_are_not_computed_are_value_errors_with_the_name(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        LLM("demo", **arguments)
    assert str(caught.value).startswith(f"{next(iter(arguments))}: got ")


def test_text_ends_with_the_context_whatever_max_tokens_is() -> None:
    with LLM(model="demo", max_model_len=40) as made:
        limits = [SamplingParams(max_tokens=n, min_tokens=30, ignore_eos=True, temperature=0) for n in (500, None, 38)]
        outputs = made.generate(["The river"] * 3, limits)
        with pytest.raises(ValueError, match="context_length_exceeded"):
            made.generate("The river " * 40)
        with pytest.raises(ValueError, match="context_length_exceeded"):
            made.generate(list(range(40)), SamplingParams(max_tokens=1))
        (last,) = made.generate(list(range(39)), SamplingParams(max_tokens=9, min_tokens=2, ignore_eos=True))
    for output in outputs:
        assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 40
        assert output.outputs[0].finish_reason == "length"
    assert len(last.outputs[0].token_ids) == 1


@pytest.mark.parametrize(
    "prompts",
    [
        None, 5, b"x", bytearray(b"x"), memoryview(b"x"), [memoryview(b"x")], [None], [b"x"], [{"prompt": 5}],
        [{"prompt_embeds": [1.0]}], [{}], [[]], [["a"]], [[1.5]], [[-1]],
        [{"prompt_token_ids": "text"}], [{"prompt": "a", "multi_modal_data": {"image": 1}}], ["\ud83d"],
        {"encoder_prompt": "a", "decoder_prompt": "b"}, [[99_999]], object(), [{"prompt_token_ids": [10**400]}],
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_read_are_value_errors(llm: LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        llm.generate(prompts, SamplingParams(max_tokens=1))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampling_params": {"temperature": 0}}, "sampling_params"),
        ({"sampling_params": [5]}, "sampling_params"),
        ({"lora_request": "adapter"}, "lora_request"),
        ({"priority": [1]}, "priority"),
        ({"priority": 1}, "priority"),
        ({"prompt_token_ids": [[1]]}, "prompt_token_ids"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
    ],
)
def test_options_of_generate_that_are_not_computed_are_value_errors(
    llm: LLM, options: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got "):
        llm.generate(["a"], **options)
    with pytest.raises(TypeError, match="did you mean use_tqdm"):
        llm.generate(["a"], use_tqd=False)


def test_options_of_generate_that_ask_for_nothing_pass(llm: LLM) -> None:
    nothing = {"prompt_token_ids": None, "mm_processor_kwargs": {}, "tokenization_kwargs": None}
    params = SamplingParams(max_tokens=1, temperature=0, stop_token_ids=())
    for options in ({"lora_request": [None], "priority": np.array([0])}, {"lora_request": [], "priority": []}, nothing):
        assert len(llm.generate(["a"], params, **options)) == 1
    llm.reset_mm_cache()
    llm.reset_encoder_cache()
    with pytest.raises(InvalidRequest, match=r"^prompts: got nothing"):
        llm.generate(sampling_params=params)


def test_a_model_that_is_no_name_and_no_path_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"^model: got 'demo,gpt2'; expected one model"):
        LLM("demo,gpt2")
    for name in ("~\0", "a\0b", "/\0"):
        with pytest.raises(ModelError, match=r"^model '.*\\x00.*': there is no such directory"):
            LLM(name)


def test_outputs_have_the_fields_of_vllm(llm: LLM) -> None:
    asked = [
        TokensPrompt(prompt_token_ids=[15496, 13], prompt="Hello."),
        {"prompt": "Hello.", "multi_modal_data": None},
    ]
    params = [SamplingParams(temperature=0, max_tokens=3, stop=["\0"]), SamplingParams(temperature=0, max_tokens=3)]
    first, second = llm.generate(asked, params, use_tqdm=False, lora_request=None, priority=[0, 0])
    assert first.outputs == second.outputs
    assert first.request_id != second.request_id
    assert (first.prompt, first.prompt_token_ids) == ("Hello.", [15496, 13]) == (second.prompt, second.prompt_token_ids)
    for name in ("metrics", "lora_request", "encoder_prompt", "encoder_prompt_token_ids", "prompt_logprobs"):
        assert getattr(first, name) is None
    assert first.num_cached_tokens == 0
    assert first.outputs[0].stop_reason is None
    assert first.outputs[0].lora_request is None
    assert first.outputs[0].finished()


@pytest.mark.parametrize(
    "method", ["beam_search", "encode", "embed", "classify", "score", "apply_model", "enqueue_chat"]
)
def test_methods_of_vllm_that_are_not_computed_say_what_to_use(llm: LLM, method: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"LLM.{method} is not computed here: \w+"):
        getattr(llm, method)(["a"], use_tqdm=False)
    assert llm.get_default_sampling_params() == SamplingParams()


def test_a_random_seed_is_meant_by_minus_one(llm: LLM) -> None:
    texts = {o.outputs[0].text for o in llm.generate(["The river"] * 4, SamplingParams(seed=-1, max_tokens=8))}
    assert len(texts) > 1


TURNS = (
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ x }}"
)


def test_chats_are_written_by_a_template_and_answered(llm: LLM) -> None:
    chats = [
        [{"role": "user", "content": "Hello."}],
        [{"role": "user", "content": "A"}, {"role": "user", "content": "B"}],
    ]
    params = SamplingParams(temperature=0, max_tokens=4)
    answers = llm.chat(chats, params, False, chat_template=TURNS, chat_template_kwargs={"x": "!"})
    assert [answer.prompt for answer in answers] == ["Hello.<|endoftext|>>!", "A<|endoftext|>B<|endoftext|>>!"]
    encode = llm.get_tokenizer().encode
    tokens = [*encode("Hello."), 50256, *encode(">!")]
    assert answers[0].prompt_token_ids == tokens
    (expected,) = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
    assert answers[0].outputs == expected.outputs
    (one,) = llm.chat(chats[0], params, use_tqdm=False, chat_template=TURNS, add_generation_prompt=False)
    assert one.prompt == "Hello.<|endoftext|>"


def test_a_chat_that_cannot_be_written_says_why(llm: LLM) -> None:
    chat = [{"role": "user", "content": "Hello."}]
    with pytest.raises(offline.InvalidPrompt, match="no chat template") as caught:
        llm.chat(chat)
    assert caught.value.code == "no_chat_template"
    for messages in ([], "Hello.", [chat, chat[0]], [{"content": "no role"}], None):
        with pytest.raises(InvalidRequest, match="messages"):
            llm.chat(messages, chat_template=TURNS)
    with pytest.raises(InvalidRequest, match="tools"):
        llm.chat(chat, chat_template=TURNS, tools=[{"type": "function"}])
    with pytest.raises(TypeError, match="chat takes no argument 'templates'"):
        llm.chat(chat, templates=TURNS)


def test_special_tokens_are_left_out_unless_asked_for(llm: LLM) -> None:
    params = {"ignore_eos": True, "logit_bias": {50256: 100.0}, "max_tokens": 2, "temperature": 0}
    texts = [
        llm.generate("Hello.", SamplingParams(**params, skip_special_tokens=skip), use_tqdm=False)[0].outputs[0].text
        for skip in (True, False)
    ]
    assert texts == ["", "<|endoftext|>" * 2]

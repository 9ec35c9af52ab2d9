"""The engine under vLLM's names, compared with transformers on the same weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from headrace.client import InvalidRequest, JobFailed
from headrace.client.wire.requests import parse_request
from headrace.worker.engine.offline import LLM, SamplingParams

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


def test_without_max_tokens_the_context_is_filled() -> None:
    with LLM(model="demo", max_model_len=40) as made:
        (output,) = made.generate("The river", SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 40


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
    with pytest.raises(TypeError, match="SamplingParams takes no argument 'best_off'"):
        SamplingParams(best_off=2)  # type: ignore[call-arg]
    for name, value, near in (("prompt_logprobs", 1, "logprobs"), ("stop_tokens", [1], "stop_token_ids")):
        with pytest.raises(TypeError, match=f"{name}'; did you mean {near}"):
            SamplingParams(**{name: value})
    with pytest.raises(TypeError, match="bad_words"):
        SamplingParams(bad_words=["a"])  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean max_model_len"):
        LLM(model="demo", max_model_length=5)
    with pytest.raises(InvalidRequest, match="tensor_parallel_size"):
        LLM(model="demo", tensor_parallel_size=2)
    with pytest.raises(InvalidRequest, match="2 for 1 prompts"):
        llm.generate("a", [SamplingParams(), SamplingParams()])

"""Adapters in the offline engine: vLLM's names, compared with PEFT on the same weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.client import InvalidRequest, JobFailed
from headrace.model.hub import DEMO
from headrace.worker.engine.offline import LLM, LoRARequest, SamplingParams
from tests.adapter_files import write_adapter

PROMPTS = ["Hello, my name is", "The river", "The capital of France is"]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.worker.engine.offline.setup_logging", lambda settings: None)
        with LLM(model="demo", dtype="float32", enable_lora=True, max_lora_rank=16) as made:
            yield made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    return [write_adapter(place / f"a{seed}", seed, rank=8, std=0.1) for seed in range(2)]


def of_peft(folder: Path | None, prompt: list[int], count: int = 8) -> list[int]:
    """Greedy tokens of transformers, with an adapter that PEFT loads."""
    import peft
    import torch
    from transformers import GPT2LMHeadModel

    warnings.simplefilter("ignore")  # what PEFT says of transformers, until the end of the test
    model: Any = GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float64)
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, str(folder))
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_each_prompt_has_its_own_adapter(llm: LLM, folders: list[Path]) -> None:
    asked = [LoRARequest("one", 1, str(folders[0])), None, LoRARequest("two", 2, lora_path=str(folders[1]))]
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=asked)
    for output, request, folder in zip(outputs, asked, [folders[0], None, folders[1]], strict=True):
        assert output.lora_request is output.outputs[0].lora_request is request
        assert output.outputs[0].token_ids == of_peft(folder, output.prompt_token_ids)
    alike = llm.generate(PROMPTS, GREEDY, use_tqdm=False, lora_request=asked[0])
    assert alike[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert alike[1].outputs[0].token_ids != outputs[1].outputs[0].token_ids


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("one", "lora_request: got 'one'; expected a LoRARequest"),
        ([None, 5], "lora_request: got 5"),
        ([None, None], "lora_request: got 2 for 1 prompts"),
        (LoRARequest("a/b", 1, "/"), "lora_name: got 'a/b'"),
        (LoRARequest("a", 1, "/missing"), "lora_path: got '/missing'; expected the directory of an adapter"),
    ],
)
def test_what_is_no_adapter_is_refused_by_name(llm: LLM, given: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(["a"], GREEDY, lora_request=given)
    assert str(caught.value).startswith(problem)


def test_a_name_has_one_directory_and_a_number(llm: LLM, folders: list[Path]) -> None:
    with pytest.raises(InvalidRequest, match="for two directories"):
        llm.generate(["a", "b"], GREEDY, lora_request=[LoRARequest("x", 1, str(folder)) for folder in folders])
    with pytest.raises(InvalidRequest, match="lora_int_id: got 0"):
        LoRARequest("x", 0, str(folders[0]))


def test_an_adapter_that_is_not_there_or_wrong_fails_the_call(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="adapter: 'unknown' is none"):
        llm.generate(["a"], GREEDY, use_tqdm=False, lora_request=LoRARequest("unknown", 1))
    with pytest.raises(JobFailed, match=r"adapter 'empty' cannot be loaded: empty/adapter_"):
        llm.generate(["a"], GREEDY, use_tqdm=False, lora_request=LoRARequest("empty", 1, str(tmp_path)))

"""The two common sizes, the larger with two of its layers, and random weights as transformers itself writes them.

One is in one file, the other in several.

Twenty prompts of mixed lengths in one batch must come out as float64's greedy tokens, one prompt at a time. Where two
logits differ by less than float32 can tell, either token is right.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from headrace.client.wire.requests import parse_request
from headrace.config import Settings
from headrace.worker.engine.build import load_engine
from headrace.worker.fidelity.references.float64 import Float64

SHAPES = {"124M": (12, 12, 768, "5GB"), "355M": (2, 16, 1024, "200MB")}
NEW_TOKENS = 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_twenty_prompts_in_one_batch_give_the_likeliest_tokens(name: str, tmp_path: Path) -> None:
    layers, heads, width, shard = SHAPES[name]
    torch.manual_seed(1)
    reference = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width)).eval()
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (name == "355M")
    rng = random.Random(4)
    prompts = [[rng.randrange(50257) for _ in range(rng.randint(1, 40))] for _ in range(20)]
    engine = load_engine(Settings(model=str(tmp_path), slots=20))
    request = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    futures = [engine.submit(parse_request({**request, "prompt": prompt})) for prompt in prompts]
    while engine.step():
        pass
    outputs = [future.result().choices[0].token_ids for future in futures]
    assert {len(tokens) for tokens in outputs} == {NEW_TOKENS}
    margins = np.array(Float64(tmp_path).margins(prompts, outputs))
    assert (margins > 0).sum() <= 2, "near ties are rare"
    # A logit is a sum of `width` products: off by about the square root of as many roundings of its own size.
    largest = 8 * 2.0**-24 * width**0.5 * float(reference.lm_head.weight.detach().norm(dim=1).max()) * width**0.5
    assert margins.max() <= 2 * largest

"""The two common sizes, the larger with a quarter of its layers, and random weights as transformers itself writes them.

One is in one file, the other in several.

Twenty prompts of mixed lengths in one batch must come out as transformers' greedy tokens, one prompt at a time.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from headrace.client.wire.requests import parse_request
from headrace.config import Settings
from headrace.worker.engine.build import load_engine

SHAPES = {"124M": (12, 12, 768, "5GB"), "355M": (6, 16, 1024, "400MB")}
NEW_TOKENS = 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_twenty_prompts_in_one_batch_equal_transformers(name: str, tmp_path: Path) -> None:
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
    for prompt, future in zip(prompts, futures, strict=True):
        ours = future.result().choices[0].token_ids
        assert len(ours) == NEW_TOKENS
        # Greedy, each token after those before it: in one pass instead of one for each.
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + ours[:-1]])).logits[0, len(prompt) - 1 :]
        assert ours == logits.argmax(-1).tolist()

"""Show how much two models differ at each checkpoint.

Run `python examples/compare_two_models.py gpt2 ./my-fine-tuned-gpt2`. It needs neither Redis nor a worker: two engines
run in this process. Both get the same token ids, so the models must have the same vocabulary.
"""

import sys

import torch
from safetensors.torch import load

from headrace.client.wire.activations import CHECKPOINT_TENSORS
from headrace.client.wire.requests import parse_request
from headrace.config import load_settings
from headrace.worker.engine.build import load_engine

NAMES = list(dict.fromkeys(name for names in CHECKPOINT_TENSORS.values() for name in names))


def tensors_of(model: str, prompt: list[int]) -> dict[str, torch.Tensor]:
    kept: dict[str, bytes] = {}
    request = parse_request({"prompt": prompt, "max_tokens": 10, "temperature": 0, "checkpoints": "all"})
    with load_engine(load_settings(model=model)) as engine:
        engine.submit(request, on_activations=kept.update).result()
    return {name: load(data)["tensor"].float() for name, data in kept.items()}


def main(one: str, other: str) -> None:
    prompt = [15496, 13]  # "Hello."
    left, right = tensors_of(one, prompt), tensors_of(other, prompt)
    for name in NAMES:
        if name not in left or name not in right:
            continue
        a, b = left[name], right[name]
        if a.shape != b.shape:
            print(f"{name:12} {tuple(a.shape)} and {tuple(b.shape)}")
        else:
            print(f"{name:12} {(a - b).abs().max().item() if a.numel() else 0.0:.3g}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Make the pair of models of `benchmarks.drafts`: the bundled model in a larger shape, and a draft model for it.

python -m benchmarks.draft_pair BOOKS OUT --shape 124M --seconds 840

The larger model computes the same function: its widths are repeated, which changes no norm, and layers that add nothing
are put between its own. The draft model has two of the bundled model's four layers, and is trained on the books to
give the probabilities that the bundled model gives, among the 3,000 tokens that are most frequent there.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from torch import Tensor

from benchmarks.models import SHAPES, demo_model
from headrace.model.tokenizer import load_tokenizer

#: Training of the draft model: layers that it takes over, rows and tokens of a step, rate, tokens that are compared.
PICKED, ROWS, WINDOW, RATE, COMPARED = (0, 3), 8, 128, 1.5e-3, 3000


def larger(source: Any, shape: str) -> Any:
    """A model of this shape that computes the same function as `source`, which is narrower and has fewer layers."""
    layers, heads, width, _ = SHAPES[shape]
    times, every = width // source.config.n_embd, layers // source.config.n_layer
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers, n_head=heads, n_embd=width)).eval()
    old, new = source.transformer, model.transformer
    with torch.no_grad():
        new.wte.weight.copy_(old.wte.weight.repeat(1, times))
        new.wpe.weight.copy_(old.wpe.weight.repeat(1, times))
        new.ln_f.weight.copy_(old.ln_f.weight.repeat(times) / times)
        new.ln_f.bias.copy_(old.ln_f.bias.repeat(times) / times)
        for i, block in enumerate(new.h):
            for matrix in (block.attn.c_proj, block.mlp.c_proj):
                matrix.weight.zero_()
                matrix.bias.zero_()
            if i % every == 0:
                _widen(old.h[i // every], block, times)
    return model


def _widen(old: Any, new: Any, times: int) -> None:
    """Give a block the function of a narrower one: each of `times` copies of a row is read and written."""
    width = old.ln_1.weight.shape[0]
    for norm in ("ln_1", "ln_2"):
        getattr(new, norm).weight.copy_(getattr(old, norm).weight.repeat(times))
        getattr(new, norm).bias.copy_(getattr(old, norm).bias.repeat(times))
    qkv = old.attn.c_attn.weight.view(width, 3, width).repeat(times, 1, times) / times
    new.attn.c_attn.weight.copy_(qkv.flatten(1))
    new.attn.c_attn.bias.copy_(old.attn.c_attn.bias.view(3, width).repeat(1, times).flatten())
    new.attn.c_proj.weight.copy_(old.attn.c_proj.weight.repeat(times, times) / times)
    new.attn.c_proj.bias.copy_(old.attn.c_proj.bias.repeat(times))
    inner = old.mlp.c_fc.bias.shape[0]
    for tensor in (new.mlp.c_fc.weight, new.mlp.c_fc.bias):
        tensor.zero_()
    new.mlp.c_fc.weight[:, :inner] = old.mlp.c_fc.weight.repeat(times, 1) / times
    new.mlp.c_fc.bias[:inner] = old.mlp.c_fc.bias
    new.mlp.c_proj.weight[:inner] = old.mlp.c_proj.weight.repeat(1, times)
    new.mlp.c_proj.bias.copy_(old.mlp.c_proj.bias.repeat(times))


def smaller(source: Any) -> Any:
    """A model with the embeddings, the final norm and some of the layers of `source`."""
    config = transformers.GPT2Config(n_layer=len(PICKED), n_head=source.config.n_head, n_embd=source.config.n_embd)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = transformers.GPT2LMHeadModel(config)
    state = source.state_dict()
    for new, old in enumerate(PICKED):
        model.transformer.h[new].load_state_dict(source.transformer.h[old].state_dict())
    model.load_state_dict({name: tensor for name, tensor in state.items() if ".h." not in name}, strict=False)
    model.transformer.wte.weight.requires_grad_(False)
    return model


def train(student: Any, teacher: Any, tokens: Tensor, seconds: float) -> None:
    """Train a model to give the probabilities of another one, for some time."""
    compared = torch.bincount(tokens, minlength=teacher.config.vocab_size).topk(COMPARED).indices
    head = teacher.transformer.wte.weight.detach()[compared]
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def scores(model: Any, x: Tensor, positions: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.transformer(x, position_ids=positions)[0].flatten(0, 1)
        return (hidden.bfloat16() @ head.bfloat16().t()).float().log_softmax(1)

    began, step = time.monotonic(), 0
    while (done := (time.monotonic() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (0.485 * (1 + math.cos(math.pi * done)) + 0.03)
        starts = torch.randint(0, len(tokens) - WINDOW, (ROWS,)).tolist()
        x = torch.stack([tokens[start : start + WINDOW] for start in starts])
        positions = torch.randint(0, 1024 - WINDOW + 1, (ROWS, 1)) + torch.arange(WINDOW)
        with torch.no_grad():
            wanted = scores(teacher, x, positions)
        loss = F.kl_div(scores(student, x, positions), wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f} nats from the bundled model", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=["124M", "355M"], default="124M")
    parser.add_argument("--seconds", type=float, default=840)
    arguments = parser.parse_args()
    source = transformers.GPT2LMHeadModel.from_pretrained(demo_model()).float().eval()
    larger(source, arguments.shape).save_pretrained(arguments.out / "target")
    text = "\n".join(path.read_text() for path in sorted(arguments.books.glob("*.txt")))
    draft = smaller(source)
    train(draft, source, torch.tensor(load_tokenizer(demo_model()).encode(text)), arguments.seconds)
    draft.eval().save_pretrained(arguments.out / "draft")


if __name__ == "__main__":
    main()

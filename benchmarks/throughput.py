"""Tokens per second of the engine and its peers, in turn within one run: `make bench`, or see `--help`.

The machine may be shared and noisy: only ratios within one run mean anything. Each contender runs a workload `--rounds`
times, in alternation, and its best time counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.contenders import Contender, Millrace, Transformers
from benchmarks.workloads import WORKLOADS, Item

SHAPES = {"124M": (12, 12, 768), "355M": (24, 16, 1024)}


def random_model(shape: str, folder: Path) -> Path:
    """A model of a released shape with random weights, written once by transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if not (folder / "config.json").exists():
        layers, heads, width = SHAPES[shape]
        torch.manual_seed(0)
        config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def measure(contenders: Sequence[Contender], items: Sequence[Item], rounds: int) -> dict[str, float]:
    """Best tokens per second of each, runs alternating."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for contender in contenders:
            rate = sum(item.new_tokens for item in items) / contender.run(items)
            best[contender.name] = max(rate, best.get(contender.name, 0))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="124M")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["ragged", "uniform"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--models", type=Path, help="where to keep the random models; a temporary directory if not given"
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_model(options.shape, (options.models or Path(scratch)) / options.shape)
        for dtype in options.dtype:
            contenders: list[Contender] = [Millrace(folder, dtype)]
            if not options.no_peers:
                contenders += [Transformers(folder, dtype, size) for size in options.batch_size]
            for workload in options.workload:
                rates = measure(contenders, WORKLOADS[workload](), options.rounds)
                peers = [rate for name, rate in rates.items() if name != Millrace.name]
                ratio = f", {rates[Millrace.name] / max(peers):.2f} times the best peer" if peers else ""
                print(f"{options.shape} {dtype} {workload}{ratio}")
                for name, rate in rates.items():
                    print(f"  {name:32} {rate:8.0f} tokens/s", flush=True)
                figures.append({"shape": options.shape, "dtype": dtype, "workload": workload, "tokens_per_s": rates})
    if options.output:
        conditions = {"torch": torch.__version__, "threads": options.threads, "machine": platform.processor()}
        conditions["cpu"] = torch.backends.cpu.get_cpu_capability()
        options.output.write_text(json.dumps({"conditions": conditions, "figures": figures}, indent=2))


if __name__ == "__main__":
    main()

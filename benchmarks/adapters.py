"""Measures what LoRA adapters cost: rows of one adapter, of eight in one batch, and adapters that no row uses.

    python -m benchmarks.adapters                          # float32, 10 rounds, and transformers with PEFT
    python -m benchmarks.adapters --dtype int8 --peer bfloat16
    python -m benchmarks.adapters --rounds 3 --no-peer

The workload is "ragged", 64 prompts, on a model of the shape of GPT-2 124M with random weights. The adapters have rank
16 and change all linear layers. Runs take turns: the model without adapters, with adapters that are loaded and unused,
all rows on one adapter, eight rows on each of eight. The peer runs the eight in one batch, by `adapter_names`, with the
fastest of several batch sizes. On a busy machine use `--threads 1`, with which seconds are those of the process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.models import random_model
from benchmarks.peers.transformers import Padded
from benchmarks.prefixes import interval
from benchmarks.workloads import Item, w64

if TYPE_CHECKING:
    from headrace.worker.engine.engine import Engine

#: How many adapters there are, and their rank.
COUNT, RANK = 8, 16
NAMES = [f"adapter-{i}" for i in range(COUNT)]


def write_adapters(model: Path, folder: Path) -> None:
    """Write the adapters by PEFT, a directory each."""
    import peft
    import torch
    import transformers

    torch.manual_seed(1)
    options = {"r": RANK, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    adapted: Any = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(model), config, NAMES[0])
    for name in NAMES[1:]:
        adapted.add_adapter(name, config)
    adapted.save_pretrained(str(folder))


def load(model: Path, adapters: Path | None, dtype: str, threads: int | None) -> Engine:
    """An engine that is not started. Its adapters are loaded by the first jobs that name them."""
    from headrace.config import Settings
    from headrace.worker.engine.build import load_engine

    options: dict[str, Any] = {"dtype": dtype, "threads": threads, "draft_tokens": 0, "prefix_cache": False}
    if adapters is not None:
        options["adapters_dir"] = str(adapters)
    return load_engine(Settings.model_validate({"model": str(model), "device": "cpu", **options}))


def seconds() -> Callable[[], float]:
    """The clock: seconds of the process if it has one thread."""
    import torch

    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def compute(engine: Engine, items: list[Item], names: list[str | None]) -> float:
    """The seconds of a run in which each prompt is computed with the adapter of this name."""
    from headrace.client.wire.requests import GenerateRequest

    now = seconds()
    start = now()
    futures = [
        engine.submit(
            GenerateRequest(
                prompt=item.prompt, max_tokens=item.new_tokens, temperature=0, ignore_eos=True, adapter=name
            )
        )
        for item, name in zip(items, names, strict=True)
    ]
    while not all(future.done() for future in futures):
        if not engine.step():
            time.sleep(0.001)  # an adapter is being loaded
    for future in futures:
        future.result()
    return now() - start


class WithPeft(Padded):
    """transformers with all adapters loaded by PEFT, each row with its own."""

    def __init__(self, model: Path, adapters: Path, precision: str) -> None:
        import peft

        super().__init__(model, precision, 0, adapters)
        adapted: Any = peft.PeftModel.from_pretrained(self.model, str(adapters / NAMES[0]), NAMES[0])
        for name in NAMES[1:]:
            adapted.load_adapter(str(adapters / name), name)
        self.model = adapted.eval()
        self.names: dict[int, str] = {}

    def options(self, items: Sequence[Item]) -> dict[str, Any]:
        return {"adapter_names": [self.names[id(item)] for item in items]}


def measure_ours(loaded: Engine, plain: Engine, items: list[Item], rounds: int) -> dict[str, list[float]]:
    """The seconds of each round by case."""
    each = [NAMES[i % COUNT] for i in range(len(items))]
    cases: dict[str, tuple[Engine, list[str | None]]] = {
        "no adapters": (plain, [None] * len(items)),
        "loaded, unused": (loaded, [None] * len(items)),
        "one adapter": (loaded, [NAMES[0]] * len(items)),
        "eight adapters": (loaded, [*each]),
    }
    took: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case in list(cases) if number % 2 else list(cases)[::-1]:
            found = compute(cases[case][0], items, cases[case][1])
            if number:  # the first round loads the adapters, and lets the arenas grow
                took[case].append(found)
    return took


def measure_peer(model: Path, adapters: Path, items: list[Item], precision: str, rounds: int) -> tuple[str, float]:
    """The fastest plan of the peer, and its seconds."""
    peer, now = WithPeft(model, adapters, precision), seconds()
    peer.names = {id(item): NAMES[i % COUNT] for i, item in enumerate(items)}
    took: dict[str, float] = {}
    for plan in peer.plans(items):
        run, start = peer.prepare(items, plan), now()
        run()
        took[plan] = now() - start
    best = min(took, key=took.__getitem__)
    run = peer.prepare(items, best)
    for _ in range(rounds):
        start = now()
        run()
        took[best] = min(took[best], now() - start)
    return best, took[best]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--peer", default="float32", choices=("float32", "bfloat16"), help="precision of the peer")
    parser.add_argument("--no-peer", action="store_true")
    arguments = parser.parse_args()
    items = w64(uniform=False)
    tokens = sum(item.new_tokens for item in items)
    with tempfile.TemporaryDirectory() as scratch:
        model, adapters = random_model("124M", Path(scratch) / "model"), Path(scratch) / "adapters"
        write_adapters(model, adapters)
        loaded, plain = (load(model, folder, arguments.dtype, arguments.threads) for folder in (adapters, None))
        plain.runner.model = loaded.runner.model  # type: ignore[attr-defined]  # the same memory
        took = measure_ours(loaded, plain, items, arguments.rounds)
        base = took["no adapters"]
        for case, times in took.items():
            ratios = [one / other for one, other in zip(base, times, strict=True)]
            print(
                f"{arguments.dtype}, {case}: {tokens / statistics.median(times):,.0f} tokens/s, "
                f"{interval(ratios)} of the throughput without adapters",
                flush=True,
            )
        if not arguments.no_peer:
            plan, best = measure_peer(model, adapters, items, arguments.peer, 1)
            ratio = best / min(took["eight adapters"])
            print(f"transformers with PEFT, {arguments.peer}, {plan}: {tokens / best:,.0f} tokens/s; ratio {ratio:.2f}")


if __name__ == "__main__":
    main()

"""Four small tasks with the server and with lm-eval's own Hugging Face backend on the same weights, in float32."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parents[1] / "tasks"
NAMES = ["small_choice", "small_continuation", "small_rolling", "small_generation"]
#: As the server has it for rolling windows: lm-eval's API models keep two positions.
LENGTH = 1022


def evaluate(model: str, arguments: dict[str, Any], batch: int) -> tuple[dict[str, Any], list[Any]]:
    """The metrics of each task, and the responses to each of its requests."""
    done = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        batch_size=batch,
        bootstrap_iters=0,
        log_samples=True,
    )
    metrics = {
        f"{task} {name.partition(',')[0]}": value
        for task, found in done["results"].items()
        for name, value in found.items()
        if isinstance(value, float) and "stderr" not in name
    }
    samples = [[sample["doc_id"], sample["resps"]] for task in NAMES for sample in done["samples"][task]]
    return metrics, samples


def main() -> None:
    os.chdir(TASKS)
    model = os.environ["MODEL"]
    hf, of_hf = evaluate("hf", {"pretrained": model, "dtype": "float32", "device": "cpu", "max_length": LENGTH}, 4)
    runs = []
    for batch, concurrent in ((1, 1), (4, 8)):
        arguments = {
            "model": "demo",
            "base_url": os.environ["SERVER"] + "/v1/completions",
            "tokenizer": model,
            "tokenizer_backend": "huggingface",
            "num_concurrent": concurrent,
            "max_length": 1024,
        }
        runs.append(evaluate("local-completions", arguments, batch))
    (ours, one), (again, other) = runs
    print("| task and metric | backend `hf` | headrace, 1 x 1 | headrace, 4 x 8 |")
    for name, value in ours.items():
        print(f"| {name} | {hf[name]:.6f} | {value:.6f} | {again[name]:.6f} |")
    assert ours == again and json.dumps(one) == json.dumps(other), "figures change with batch size and concurrency"
    texts = [[sample for sample in samples if isinstance(sample[1][0][0], str)] for samples in (one, of_hf)]
    assert texts[0] == texts[1] and texts[0], f"the generated texts differ: {texts}"
    worst = max(abs(value - hf[name]) / max(1.0, abs(hf[name])) for name, value in ours.items())
    assert hf.keys() == ours.keys() and worst < 1e-4, f"they differ by {worst}"
    figures = f"{len(texts[0])} equal texts; {len(ours)} figures of 4 tasks equal within {worst:.1e}"
    print(f"{figures}; the same with batch 1 x 1 and 4 x 8")


main()

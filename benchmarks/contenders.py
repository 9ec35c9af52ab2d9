"""Who is measured: our engine, and transformers' own batched `generate`, on the same weights, prompts and threads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.workloads import Item
from client.schema import parse_request
from config import Settings
from worker.engine import Engine


class Contender(Protocol):
    """Computes a workload greedily, exactly as many tokens as asked for. Returns the seconds it took."""

    name: str

    def run(self, items: Sequence[Item]) -> float: ...


class Millrace:
    """The engine, driven step by step in this thread: no Celery, no Redis."""

    name = "millrace"

    def __init__(self, folder: Path, dtype: str) -> None:
        self.engine = Engine.from_settings(Settings(model=str(folder), dtype=dtype, device="cpu"))  # type: ignore[arg-type]

    def run(self, items: Sequence[Item]) -> float:
        requests = [
            parse_request({"prompt": i.prompt, "max_tokens": i.new_tokens, "temperature": 0, "ignore_eos": True})
            for i in items
        ]
        began = time.perf_counter()
        futures = [self.engine.submit(request) for request in requests]
        while self.engine.step():
            pass
        took = time.perf_counter() - began
        assert [len(future.result().choices[0].token_ids) for future in futures] == [i.new_tokens for i in items]
        return took


class Transformers:
    """`generate` on batches of prompts sorted by length and padded on the left; rows run to the longest of a batch."""

    def __init__(self, folder: Path, dtype: str, batch_size: int) -> None:
        from transformers import GPT2LMHeadModel

        self.name = f"transformers, batches of {batch_size}"
        self.batch_size = batch_size
        self.model = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def run(self, items: Sequence[Item]) -> float:
        began = time.perf_counter()
        ordered = sorted(items, key=lambda item: (len(item.prompt), item.new_tokens))
        for start in range(0, len(ordered), self.batch_size):
            self._batch(ordered[start : start + self.batch_size])
        return time.perf_counter() - began

    def _batch(self, items: Sequence[Item]) -> None:
        width, count = max(len(item.prompt) for item in items), max(item.new_tokens for item in items)
        ids = torch.zeros(len(items), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(items):
            ids[row, width - len(item.prompt) :] = torch.tensor(item.prompt)
            mask[row, width - len(item.prompt) :] = 1
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        self.model.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, **options)

"""transformers: padded batches with `generate`, and continuous batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Tokens
from benchmarks.workloads import Item


def _load(folder: Path, precision: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, precision)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def orders(items: Sequence[Item]) -> dict[str, list[int]]:
    """Orders of a workload in which the rows of a batch are similar: name -> indices, without duplicate orders."""
    by_prompt = sorted(range(len(items)), key=lambda i: (len(items[i].prompt), items[i].new_tokens))
    by_count = sorted(range(len(items)), key=lambda i: (items[i].new_tokens, len(items[i].prompt)))
    found = {"by prompt length": by_prompt}
    return found if by_count == by_prompt else found | {"by new tokens": by_count}


def batch_plans(items: Sequence[Item], sizes: Sequence[int]) -> list[str]:
    """`batches of 16 by prompt length` and the like: every batch size, at most the workload, with every order."""
    # If one batch holds all prompts, the order makes no difference.
    return [
        f"batches of {size} {order}"
        for size in dict.fromkeys(min(size, len(items)) for size in sizes)
        for order in (orders(items) if size < len(items) else ["by prompt length"])
    ]


def batches(items: Sequence[Item], plan: str) -> list[list[int]]:
    """The indices of the items of each batch of a plan from `batch_plans`."""
    size, _, order = plan.removeprefix("batches of ").partition(" ")
    indices = orders(items)[order]
    return [indices[start : start + int(size)] for start in range(0, len(indices), int(size))]


class Padded:
    """`generate` on batches padded on the left; rows run to the longest of their batch, then are cut."""

    def __init__(self, folder: Path, precision: str, threads: int, scratch: Path) -> None:  # noqa: ARG002
        self.model = _load(folder, precision)

    def plans(self, items: Sequence[Item]) -> list[str]:
        return batch_plans(items, (32, 64, 16, 256))

    def prepare(self, items: Sequence[Item], plan: str) -> Callable[[], Tokens]:
        return lambda: self._run(items, batches(items, plan))

    def _run(self, items: Sequence[Item], groups: list[list[int]]) -> Tokens:
        tokens: Tokens = [[] for _ in items]
        for group in groups:
            rows = self._batch([items[i] for i in group])
            for i, row in zip(group, rows, strict=True):
                tokens[i] = row[: items[i].new_tokens]
        return tokens

    def options(self, items: Sequence[Item]) -> dict[str, Any]:  # noqa: ARG002
        """Further arguments of `generate` for these items."""
        return {}

    def _batch(self, items: Sequence[Item]) -> Tokens:
        width, longest = max(len(item.prompt) for item in items), max(item.new_tokens for item in items)
        ids = torch.zeros(len(items), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(items):
            ids[row, width - len(item.prompt) :] = torch.tensor(item.prompt)
            mask[row, width - len(item.prompt) :] = 1
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, **self.options(items)}
        made = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=longest, **options)
        rows: Tokens = made[:, width:].tolist()
        return rows


class Continuous:
    """Continuous batching over a paged cache, each request with its own number of tokens.

    Attention runs over the pages of all requests at once under a mask, so more requests at a time may be slower.
    """

    def __init__(self, folder: Path, precision: str, threads: int, scratch: Path) -> None:  # noqa: ARG002
        self.model = _load(folder, precision)
        self._manager: Any = None
        self._settings: tuple[object, ...] = ()
        self._names = count()

    def plans(self, items: Sequence[Item]) -> list[str]:
        sizes = dict.fromkeys(min(size, len(items)) for size in (64, 16, 32))
        return [f"{size} requests at a time" for size in sizes]

    def prepare(self, items: Sequence[Item], plan: str) -> Callable[[], Tokens]:
        together = int(plan.split()[0])
        longest = max(len(item.prompt) + item.new_tokens for item in items)
        self._start(together, longest)
        return lambda: self._run(items)

    def _start(self, together: int, longest: int) -> None:
        """Start a manager whose cache holds `together` requests of the longest length, unless the present one does."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        if self._settings == (together, longest):
            return
        if self._manager:
            self._manager.stop(block=True)
        page = 32
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=together * (-(-longest // page) + 1) + 16,
            max_batch_tokens=512,
            max_requests_per_batch=together,
            allow_block_sharing=False,  # random prompts share no prefixes
            auto_switch_to_flash=False,  # not on a CPU
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = self.model.init_continuous_batching(generation, config)
        self._manager.start()
        self._settings = (together, longest)

    def _run(self, items: Sequence[Item]) -> Tokens:
        names = {f"row {next(self._names)}": i for i in range(len(items))}
        for name, i in names.items():
            self._manager.add_request(
                items[i].prompt, request_id=name, max_new_tokens=items[i].new_tokens, eos_token_id=-1
            )
        tokens: Tokens = [[] for _ in items]
        left = len(items)
        while left:
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("continuous batching ended before the requests did")
            elif result.is_finished():
                if result.error:
                    raise RuntimeError(str(result.error))
                tokens[names[result.request_id]] = list(result.generated_tokens)
                left -= 1
        return tokens

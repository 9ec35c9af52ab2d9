"""CTranslate2: `Generator.generate_batch` on batches of similar prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import Tokens
from benchmarks.peers.transformers import batch_plans, batches
from benchmarks.vocabulary import vocabulary_files, words
from benchmarks.workloads import Item


class CTranslate2:
    """Greedy search. All rows of a batch get the same length and are cut to the requested one, as in padded `generate`.

    Batches are queued together, and computed one after another by all threads, or in parallel by one thread each.
    """

    def __init__(self, folder: Path, precision: str, threads: int, scratch: Path) -> None:
        import ctranslate2

        if precision not in ctranslate2.get_supported_compute_types("cpu"):
            raise ValueError(f"no {precision} on this CPU")
        self.path = convert(folder, scratch / f"{folder.name}-ctranslate2")
        self.precision, self.threads = precision, threads
        self._generator: Any = None
        self._workers = 0
        self.words = words()

    def plans(self, items: Sequence[Item]) -> list[str]:
        plans = batch_plans(items, (16, 8, 32, 64))
        side_by_side = [plan for plan in plans if len(batches(items, plan)) >= self.threads > 1]
        return [
            *(f"{plan}, {self.threads} at a time" for plan in side_by_side),
            *(f"{plan}, 1 at a time" for plan in plans),
        ]

    def prepare(self, items: Sequence[Item], plan: str) -> Callable[[], Tokens]:
        grouping, together = plan.split(", ")
        self._open(int(together.split()[0]))
        prompts = [[self.words[i] for i in item.prompt] for item in items]
        return lambda: self._run(items, prompts, batches(items, grouping))

    def _open(self, workers: int) -> None:
        import ctranslate2

        if workers != self._workers:
            self._generator = None
            self._generator = ctranslate2.Generator(
                str(self.path),
                compute_type=self.precision,
                inter_threads=workers,
                intra_threads=max(1, self.threads // workers),
                max_queued_batches=-1,
            )
            self._workers = workers

    def _run(self, items: Sequence[Item], prompts: list[list[str]], groups: list[list[int]]) -> Tokens:
        pending = []
        # The longest first, so that no long batch is left for the end.
        for group in sorted(groups, key=lambda group: -max(items[i].new_tokens for i in group)):
            count = max(items[i].new_tokens for i in group)
            results = self._generator.generate_batch(
                [prompts[i] for i in group],
                asynchronous=True,
                beam_size=1,
                sampling_topk=1,
                min_length=count,
                max_length=count,
                end_token=[],
                include_prompt_in_result=False,
            )
            pending.append((group, results))
        tokens: Tokens = [[] for _ in items]
        for group, results in pending:
            for i, result in zip(group, results, strict=True):
                tokens[i] = list(result.result().sequences_ids[0])[: items[i].new_tokens]
        return tokens


def convert(folder: Path, target: Path) -> Path:
    """Write the model in CTranslate2's format in float32; it is converted to other precisions when it is loaded."""
    import ctranslate2

    if not target.exists():
        encoder, merges = vocabulary_files()
        source = target.with_name(f"{target.name}-source")
        source.mkdir()
        files = {file.name: file for file in (folder / "config.json", *folder.glob("*.safetensors*"))}
        for name, file in (files | {"vocab.json": encoder, "merges.txt": merges}).items():
            (source / name).symlink_to(file.resolve())
        (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        ctranslate2.converters.TransformersConverter(str(source)).convert(str(target))
    return target

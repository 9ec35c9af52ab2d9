"""A worker with a simulated device: a step takes a fixed time and computes nothing. Everything else is real.

    MODELLED_STEP_MS=100 celery -A benchmarks.modelled worker

Scheduler, slots, pool, broker, leases and results are the real ones. Many workers therefore fit on one machine, and
the benchmark measures how much they cost Redis and how they affect each other.
"""

from __future__ import annotations

import os
import time

from benchmarks.workloads import echo
from headrace.config import Settings
from headrace.model.generation_config import Ends
from headrace.model.tokenizer import load_tokenizer
from headrace.worker.celery import app
from headrace.worker.engine import build
from headrace.worker.engine.cache_slots import SlotMove, SlotTable, length_classes
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.scheduler import ModelRunnerOutput, PrefixCopy, Scheduler, SchedulerOutput
from headrace.worker.engine.sequence import Sequence, Slot, TokenScore

__all__ = ["ModelledRunner", "app", "modelled_engine"]


class ModelledRunner:
    """A device that takes the same time for every step and has unlimited memory.

    Args:
        step_s: the time of a step in seconds, during which the processor is idle.
    """

    dense = False

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Give a token to each sequence that decodes."""
        if self.step_s:
            time.sleep(self.step_s)
        return ModelRunnerOutput(
            [(s, TokenScore(echo(s.prompt, len(s.output)), None, [])) for s in step.sampled_sequences], []
        )

    def fit(self, capacity: dict[int, int]) -> None:
        """There is no cache."""

    def move(self, move: SlotMove) -> None:
        """There is no cache."""

    def copy(self, copy: PrefixCopy) -> None:
        """There is no cache."""

    def clear(self, slot: Slot, start: int = 0) -> None:
        """There is no cache."""

    def collect(self, sequence: Sequence) -> dict[str, bytes]:  # noqa: ARG002
        """There are no tensors."""
        return {}


def modelled_engine(settings: Settings, name: str | None = None) -> Engine:
    """An engine like that of `load_engine`, whose device takes MODELLED_STEP_MS (default 100) for each step."""
    step_ms = float(os.environ.get("MODELLED_STEP_MS", "100"))
    tokenizer = load_tokenizer("demo")
    lengths = length_classes(1024)
    return Engine(
        ModelledRunner(step_ms / 1000),
        tokenizer,
        Scheduler(
            SlotTable(lengths, position_bytes=1, budget_bytes=settings.slots * lengths[-1]),
            max_rows=settings.slots,
            step_tokens=settings.step_tokens,
            prefill_chunk=settings.prefill_chunk,
        ),
        model_name=name or settings.model_name,
        vocab_size=tokenizer.vocab_size,
        max_context=lengths[-1],
        ends=Ends((50256,), 50256),
        fingerprint=f"modelled/step-{step_ms:g}-ms/process-{os.getpid()}",  # identifies the worker that computed a job
    )


# Only in this process. The pool and the tasks both get their engine from here, and it must be the same one.
build.load_engine = modelled_engine

"""The interface between the engine, which knows no tensors, and the code that computes on them.

`model_runner.ModelRunner` implements it; benchmarks have an implementation without a model.
"""

from __future__ import annotations

from typing import Protocol

from headrace.worker.engine.cache_slots import SlotMove
from headrace.worker.engine.scheduler import ModelRunnerOutput, PrefixCopy, SchedulerOutput
from headrace.worker.engine.sequence import Sequence, Slot


class StepRunner(Protocol):
    """Computes steps, and keeps the key-value cache. Called from the engine's thread only."""

    @property
    def dense(self) -> bool:
        """Whether the slots in use should be the first of their arena."""
        ...

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Compute a step."""
        ...

    def fit(self, capacity: dict[int, int]) -> None:
        """Resize the arena of each length class to this many slots."""
        ...

    def move(self, move: SlotMove) -> None:
        """Move a sequence to another slot of its arena."""
        ...

    def copy(self, copy: PrefixCopy) -> None:
        """Copy the keys and values of a prefix to a sequence."""
        ...

    def clear(self, slot: Slot, start: int = 0, stop: int | None = None) -> None:
        """Set the keys and values of a slot to zero from position `start` to `stop`, by default to its end."""
        ...

    def collect(self, sequence: Sequence) -> dict[str, bytes]:
        """The activations captured for a finished sequence, each as safetensors bytes by name."""
        ...

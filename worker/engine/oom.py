"""Limits for when memory runs out: compute fewer rows at once, and slowly raise the number again. No tensors.

`executor.py` catches the errors and applies the limits.
"""

from __future__ import annotations

from headrace.worker.engine.scheduler import PromptChunk, SchedulerOutput
from headrace.worker.engine.sequence import Sequence

#: Steps in which memory suffices before the limit is doubled. If memory runs out after that, the number doubles.
FIRST_WAIT, LONGEST_WAIT = 64, 8192

#: How torch on a CPU, cuBLAS and older versions of torch on a GPU report it, in a plain RuntimeError.
_MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")

STEP_MESSAGE = (
    "memory does not suffice to compute even one row of this job; lower HEADRACE_KV_CACHE_BYTES or "
    "HEADRACE_PREFILL_CHUNK, use HEADRACE_DTYPE=bfloat16, a smaller model, or a machine with more memory"
)
CACHE_MESSAGE = (
    "memory does not suffice for the keys and values of this job, even with nothing else in the cache; lower "
    "max_tokens or shorten the prompt, lower HEADRACE_MAX_CONTEXT, or use a smaller model or HEADRACE_DTYPE=bfloat16"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or a device means that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MESSAGES)


class AdaptiveLimit:
    """A limit that is lowered when it proves too high, and raised again step by step.

    Args:
        full: the limit while memory suffices.
    """

    def __init__(self, full: int) -> None:
        self.full = self.current = full
        self._wait, self._quiet = FIRST_WAIT, 0
        self._probing = False  # the limit was raised last, and memory has not proved sufficient for it yet

    def lower(self, limit: int) -> None:
        """Lower the limit. If it had just been raised, wait twice as long before raising it again."""
        if self._probing:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        self.current, self._quiet, self._probing = limit, 0, False

    def note_step(self) -> None:
        """Count a step in which memory sufficed; after enough of them, double the limit."""
        if self.current == self.full:
            return
        self._quiet += 1
        if self._quiet >= self._wait:
            self.current, self._quiet, self._probing = min(max(1, 2 * self.current), self.full), 0, True


def row_count(step: SchedulerOutput) -> int:
    """Rows of the step's forward pass."""
    return step.decode_rows + sum(chunk.count for chunk in step.chunks)


def split(step: SchedulerOutput, rows: int) -> list[SchedulerOutput]:
    """Split a step into parts of at most `rows` rows, in order.

    A chunk of a prompt is never split, because its bits depend on where it begins and ends, so a part may be larger.
    The parts have no proposed tokens, which are optional.
    """
    if row_count(step) <= rows:
        return [step]
    parts, used = [SchedulerOutput()], 0
    items: list[Sequence | PromptChunk] = [*step.decodes, *step.chunks]
    for item in items:
        count = item.count if isinstance(item, PromptChunk) else 1
        if used and used + count > rows:
            parts.append(SchedulerOutput())
            used = 0
        used += count
        part = parts[-1]
        if not isinstance(item, PromptChunk):
            part.decodes.append(item)
            continue
        part.chunks.append(item)
        if item.last and item.sequence in step.same_prompt:
            part.same_prompt[item.sequence] = step.same_prompt[item.sequence]
    return parts

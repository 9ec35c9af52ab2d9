"""What an engine does when memory runs out: less at once, and slowly more again. Plain numbers, no tensors."""

from __future__ import annotations

from headrace.worker.engine.scheduler import PromptChunk, Step
from headrace.worker.engine.sequence import Sequence

#: Steps without trouble before twice as much is tried again; twice as many each time that fails.
FIRST_WAIT, LONGEST_WAIT = 64, 8192

#: How torch on a CPU, cuBLAS and older torch on a GPU say it, in a plain RuntimeError.
_SAID = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")

STEP_MESSAGE = (
    "memory does not suffice to compute even one row of this job; lower HEADRACE_KV_CACHE_BYTES or "
    "HEADRACE_PREFILL_CHUNK, use HEADRACE_DTYPE=bfloat16, a smaller model, or a machine with more memory"
)
CACHE_MESSAGE = (
    "memory does not suffice for the keys and values of this job, even with nothing else in the cache; lower "
    "max_tokens or shorten the prompt, lower HEADRACE_MAX_CONTEXT, or use a smaller model or HEADRACE_DTYPE=bfloat16"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of Python, torch or a device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


class Limit:
    """How much is done at once: `full`, until that was too much.

    Args:
        full: where nothing stands against it.
    """

    def __init__(self, full: int) -> None:
        self.full = self.now = full
        self._wait, self._quiet = FIRST_WAIT, 0
        self._trying = False

    def lower(self, now: int) -> None:
        """Do no more than this from here on. If more was being tried again, that is tried less often."""
        if self._trying:
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        self.now, self._quiet, self._trying = now, 0, False

    def note_step(self) -> None:
        """A step is over in which nothing was lowered."""
        if self.now == self.full:
            return
        self._quiet += 1
        if self._quiet >= self._wait:
            self.now, self._quiet, self._trying = min(max(1, 2 * self.now), self.full), 0, True


def rows_of(step: Step) -> int:
    """Rows of the step's forward pass."""
    return step.decode_rows + sum(chunk.count for chunk in step.chunks)


def split(step: Step, rows: int) -> list[Step]:
    """The step in parts of at most `rows` rows, in order; a chunk of a prompt is never cut, for its bits' sake.

    A step that is too large has no drafts any more: they may be left out.
    """
    if rows_of(step) <= rows:
        return [step]
    parts, used = [Step()], 0
    items: list[Sequence | PromptChunk] = [*step.decodes, *step.chunks]
    for item in items:
        count = item.count if isinstance(item, PromptChunk) else 1
        if used and used + count > rows:
            parts.append(Step())
            used = 0
        used += count
        part = parts[-1]
        if not isinstance(item, PromptChunk):
            part.decodes.append(item)
            continue
        part.chunks.append(item)
        if item.last and item.sequence in step.followers:
            part.followers[item.sequence] = step.followers[item.sequence]
    return parts

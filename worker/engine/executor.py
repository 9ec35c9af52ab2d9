"""Runs steps, and recovers from those that fail or run out of memory."""

from __future__ import annotations

import time
import traceback
from collections import deque

import structlog

from headrace.client.wire.keys import PRIORITIES
from headrace.worker.engine.oom import CACHE_MESSAGE, STEP_MESSAGE, AdaptiveLimit, out_of_memory, row_count, split
from headrace.worker.engine.protocols import StepRunner
from headrace.worker.engine.request_table import PRIORITY_STEP, RequestTable
from headrace.worker.engine.scheduler import ModelRunnerOutput, Scheduler, SchedulerOutput
from headrace.worker.engine.sequence import Sequence

log = structlog.get_logger("headrace.engine")


class StepExecutor:
    """Carries out what the scheduler decided, on the cache and the model runner, within the available memory.

    Args:
        scheduler: whose sequences get slots.
        runner: computes steps, and owns the cache.
        requests: fails the requests that cannot be computed.
    """

    def __init__(self, scheduler: Scheduler, runner: StepRunner, requests: RequestTable) -> None:
        self.steps = self.prompt_tokens = 0
        #: When the running step last made progress, by the monotonic clock; None between steps.
        self.progress_at: float | None = None
        self._scheduler, self._runner, self._requests = scheduler, runner, requests
        self._row_limit = AdaptiveLimit(scheduler.max_rows + scheduler.step_tokens)
        self._cache_limit = AdaptiveLimit(scheduler.slots.budget_bytes)
        self._preemptions = 0

    # --- the cache -------------------------------------------------------------------------------------------------

    def allocate(self) -> list[Sequence]:
        """Admit waiting sequences, and give the cache the memory that they need. Returns those admitted.

        If memory does not hold the cache, fewer sequences are admitted, or none for now.
        """
        slots = self._scheduler.slots
        slots.budget_bytes = self._cache_limit.current
        while True:
            before = dict(slots.capacity)
            admitted = self._scheduler.admit()
            self._apply_moves()
            try:
                self._fit()
                if admitted or not self._blocked():
                    return admitted
                slots.budget_bytes = self._cache_limit.full
                continue
            except Exception as error:
                if not out_of_memory(error) or not admitted:
                    raise
            # Outside the handler: while the error exists, it keeps tensors alive.
            self._preempt(admitted, before)

    def copy_prefixes(self) -> None:
        """Copy the prefixes that are in the cache by now to the sequences that reuse them."""
        for copy in self._scheduler.reuse_prefixes():
            self._runner.copy(copy)

    def _fit(self) -> None:
        """Give the arenas the memory of their slots."""
        slots = self._scheduler.slots
        self._runner.fit(slots.capacity)
        slots.fitted = dict(slots.capacity)

    def _apply_moves(self) -> None:
        """Move sequences in the cache to their new slots, before an arena shrinks. An error here ends the engine."""
        if self._runner.dense:
            self._scheduler.slots.compact()
        for move in self._scheduler.slots.take_moves():
            self._runner.move(move)

    def _blocked(self) -> bool:
        """Whether sequences wait only for memory that the cache may be able to allocate again."""
        scheduler = self._scheduler
        below_full = scheduler.slots.budget_bytes < self._cache_limit.full
        return bool(scheduler.waiting) and not scheduler.running and below_full

    def _preempt(self, admitted: list[Sequence], before: dict[int, int]) -> None:
        """Return sequences to the queue for whose slots there is no memory, and lower the limit of the cache.

        If no other sequence has a slot and the first one cannot get even one slot, its request fails.
        """
        slots, wanted = self._scheduler.slots, self._scheduler.slots.used_bytes
        for sequence in admitted:
            self._scheduler.remove(sequence)
        slots.evict_all()
        self._preemptions += 1
        for sequence in admitted:  # before those of the same priority that arrived later
            self._scheduler.add(sequence, PRIORITIES[sequence.request.priority] * PRIORITY_STEP - self._preemptions)
        for length, arena in slots.arenas.items():
            slots.capacity[length] = (
                min(before[length], slots.capacity[length]) if self._scheduler.running else len(arena)
            )
        used, first = slots.used_bytes, admitted[0]
        one_slot = slots.position_bytes * next(length for length in slots.arenas if length >= first.max_length)
        log.warning("engine.cache_out_of_memory", wanted_bytes=wanted, cache_bytes=used)
        if wanted - used > one_slot:
            self._cache_limit.lower(used + max(one_slot, (wanted - used) // 2))
        elif self._scheduler.running:
            self._cache_limit.lower(used)
        else:
            self._requests.fail(first, "out_of_memory", CACHE_MESSAGE)
        slots.budget_bytes = self._cache_limit.current

    def _shrink_cache(self) -> bool:
        """Free the memory of unused slots. Returns whether there was any."""
        slots = self._scheduler.slots
        before = slots.used_bytes
        slots.evict_all()
        slots.compact()
        slots.capacity = {length: len(arena) for length, arena in slots.arenas.items()}
        if slots.used_bytes == before:
            return False
        self._cache_limit.lower(slots.used_bytes)
        self._apply_moves()
        try:
            self._fit()
        except Exception as error:
            if not out_of_memory(error):
                raise
        return True

    # --- steps -----------------------------------------------------------------------------------------------------

    def run(self, step: SchedulerOutput) -> tuple[SchedulerOutput, ModelRunnerOutput]:
        """Compute a step. Returns the part of it that was computed, and its outcome.

        If the step fails, its sequences are computed one by one: those that fail end, the others continue. If memory
        runs out, half of the rows are computed at a time; the bits of a row do not depend on the batch composition. A
        sequence for which memory does not suffice even then waits for the next step. If no row at all could be
        computed, the newest sequence fails.
        """
        self.steps += 1
        computed, outcome = SchedulerOutput(), ModelRunnerOutput([], [])
        starved: list[Sequence] = []
        parts = deque((part, False) for part in split(step, self._row_limit.current))
        while parts:
            part, single = parts.popleft()
            part = self._remaining(part, starved)
            error = self._compute(part, computed, outcome) if part else None
            if error is None:
                continue
            if out_of_memory(error):
                pieces = self._halve(part, error)
                if len(pieces) == 1 and not part.proposed:  # with proposed tokens it is tried again without them
                    starved += part.sequences
                else:
                    parts.extendleft(reversed([(piece, single) for piece in pieces]))
            elif single:
                self._fail(part, error)
            else:
                log.warning("engine.step_failed", rows=len(part.sampled_sequences), error=repr(error))
                self._scheduler.stop_sharing(part)
                parts.extendleft(reversed([(piece, True) for piece in part.by_sequence()]))
        self._adjust_limits(bool(computed), starved)
        return computed, outcome

    def _halve(self, part: SchedulerOutput, error: Exception) -> list[SchedulerOutput]:
        self._row_limit.lower(max(1, min(self._row_limit.current, row_count(part) // 2)))
        log.warning("engine.step_out_of_memory", rows=row_count(part), error=repr(error))
        return split(part, self._row_limit.current)

    def _remaining(self, part: SchedulerOutput, starved: list[Sequence]) -> SchedulerOutput:
        """The part without sequences whose request has ended meanwhile, and without those that lack memory."""
        owner = self._requests.owner
        here = {sequence for sequence in part.sequences if sequence in owner and sequence not in starved}
        return SchedulerOutput(
            [sequence for sequence in part.decodes if sequence in here],
            [chunk for chunk in part.chunks if chunk.sequence in here],
            {source: [s for s in same if s in owner] for source, same in part.same_prompt.items() if source in here},
            {sequence: tokens for sequence, tokens in part.proposed.items() if sequence in here},
        )

    def _compute(
        self, part: SchedulerOutput, computed: SchedulerOutput, outcome: ModelRunnerOutput
    ) -> Exception | None:
        """Compute a part of a step, and add it to what is computed. Returns the error if that failed."""
        try:
            result = self._runner.run(part)
        except Exception as error:
            if _is_fatal(error):
                raise
            return error.with_traceback(None) if out_of_memory(error) else error  # a traceback keeps tensors alive
        finally:
            self.progress_at = time.monotonic()
        for chunk in part.chunks:
            self.prompt_tokens += chunk.count
            self._scheduler.advance(chunk)  # now: it is in the cache, whatever happens to later parts
        computed.decodes.extend(part.decodes)
        computed.chunks.extend(part.chunks)
        computed.same_prompt.update(part.same_prompt)
        computed.proposed.update(part.proposed)
        outcome.tokens.extend(result.tokens)
        outcome.prompt_scores.extend(result.prompt_scores)
        return None

    def _fail(self, part: SchedulerOutput, error: Exception) -> None:
        """Fail the request of a part that holds one sequence and cannot be computed."""
        trace = "".join(traceback.format_exception(error))
        message = f"computing this job failed: {type(error).__name__}; the worker's log has the details"
        for sequence in part.sequences:
            log.error("job.step_failed", job_id=self._requests.owner[sequence].id, trace=trace)
            self._requests.fail(sequence, "internal_error", message)

    def _adjust_limits(self, progress: bool, starved: list[Sequence]) -> None:
        """Raise the limits slowly while memory suffices. If no row at all could be computed, free some memory."""
        if not starved:
            self._row_limit.note_step()
            self._cache_limit.note_step()
        elif not progress and not self._shrink_cache():
            owner = self._requests.owner
            newest = max(starved, key=lambda sequence: owner[sequence].arrived_at if sequence in owner else 0.0)
            self._requests.fail(newest, "out_of_memory", STEP_MESSAGE)


def _is_fatal(error: Exception) -> bool:
    """Whether the device is unusable after this error, so that every later step would fail too."""
    return type(error).__name__ == "AcceleratorError"

"""The requests that an engine has accepted and not answered yet. Used in the engine's thread only."""

from __future__ import annotations

import heapq
import itertools
import time
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import structlog

from headrace.client.wire.errors import JobCancelled, JobError, JobExpired, JobFailed
from headrace.client.wire.keys import PRIORITIES
from headrace.client.wire.results import Result
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.engine.protocols import StepRunner
from headrace.worker.engine.requests import RequestState
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.sequence import Sequence

log = structlog.get_logger("headrace.engine")

#: Queue positions between two priorities. Preempted sequences take those before the others of their priority.
PRIORITY_STEP = 2**40


class RequestTable:
    """Knows which request each sequence belongs to, and ends requests: done, failed, cancelled or expired.

    Args:
        scheduler: gets the sequences of new requests, and loses those of ended ones.
        runner: clears the slots of requests that end early.
    """

    def __init__(self, scheduler: Scheduler, runner: StepRunner) -> None:
        #: Sequence -> its request. A sequence that is finished or whose request has ended is not in it.
        self.owner: dict[Sequence, RequestState] = {}
        self._scheduler, self._runner = scheduler, runner
        # Not by id: a message delivered twice brings two requests with the same id, and each has a caller that waits.
        self._requests: set[RequestState] = set()
        # A request that has ended is not kept, with its result, until its deadline.
        self._deadlines: list[tuple[float, int, weakref.ref[RequestState]]] = []
        self._tie = itertools.count()

    def __contains__(self, state: RequestState) -> bool:
        return state in self._requests

    def add(self, state: RequestState) -> None:
        """Take a new request, and put its sequences into the scheduler's queue."""
        self._requests.add(state)
        for sequence in state.sequences:
            self.owner[sequence] = state
            self._scheduler.add(sequence, PRIORITIES[state.request.priority] * PRIORITY_STEP)
        if state.request.expires_at is not None:
            # From here on by the monotonic clock: the other one may jump while the request runs.
            deadline = time.monotonic() + state.request.expires_at - time.time()
            heapq.heappush(self._deadlines, (deadline, next(self._tie), weakref.ref(state)))

    # --- ending requests -------------------------------------------------------------------------------------------

    def cancel(self, cancelled: set[str | RequestState]) -> None:
        """End requests that were cancelled, by id or because the caller cancelled the future."""
        for state in [s for s in self._requests if s.id in cancelled or s in cancelled]:
            self.end(state, lambda partial: JobCancelled(message="the job was cancelled", partial=partial))

    def drop_waiting(self) -> None:
        """End the requests none of whose sequences has had a slot."""
        for state in [s for s in self._requests if not s.started]:
            self.end(state, lambda _: EngineStopped("the engine is stopping and starts no more jobs"))

    def expire(self) -> None:
        """End the requests whose deadline has passed."""
        if len(self._deadlines) > 2 * len(self._requests) + 64:  # most belong to requests that have ended
            self._deadlines = [entry for entry in self._deadlines if entry[2]() in self._requests]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            if (state := heapq.heappop(self._deadlines)[2]()) is not None:
                self.end(state, _expired)

    def seconds_to_deadline(self) -> float | None:
        """Seconds until the next deadline, 0 if it has passed; None if there is none."""
        return max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else None

    def fail(self, sequence: Sequence, code: str, message: str) -> None:
        """End the request of a sequence with JobFailed, if it has not ended yet."""
        if (state := self.owner.get(sequence)) is not None:
            self.end(state, lambda partial: JobFailed(code, message, partial))

    def end(self, state: RequestState, error: Callable[[list[str]], Exception]) -> None:
        """End a request early with the error that `error` makes of its texts so far.

        Its slots are cleared, because they may hold a NaN.
        """
        if state not in self._requests:
            return
        self._requests.remove(state)
        for slot in [sequence.slot for sequence in state.sequences if sequence.slot is not None]:
            self._runner.clear(slot)
        for sequence in state.sequences:
            self.release(sequence)
        _settle(state.future, error(state.partial))

    def release(self, sequence: Sequence, keep: int = 0) -> None:
        """Take a sequence out of the scheduler, and free its slot and its captured activations.

        Args:
            keep: tokens of its prompt that may stay in the cache.
        """
        sequence.activations = None  # some 10 MB, while its result waits to be stored
        if self.owner.pop(sequence, None) is not None:
            self._scheduler.remove(sequence, keep)

    def complete(self, state: RequestState, result: Result) -> None:
        """Answer a request whose sequences are all finished."""
        self._requests.remove(state)
        _settle(state.future, result)

    def guard(self, state: RequestState, action: Callable[[], None]) -> None:
        """Run something that concerns one request only. If it raises, that request ends, and not the engine."""
        try:
            action()
        except Exception as error:
            log.error("job.failed", job_id=state.id, error=repr(error), trace=traceback.format_exc())
            message = f"finishing this job failed: {type(error).__name__}; the worker's log has the details"
            self.end(state, lambda partial: JobFailed("internal_error", message, partial))

    def abandon(self, never_added: list[RequestState], reason: str) -> None:
        """End all requests, and those never added, with EngineStopped.

        The cache is left as it is: the device may not answer any more.
        """
        left = [*self._requests, *never_added]
        self._requests.clear()
        for state in left:
            _settle(state.future, EngineStopped(reason))


def _expired(partial: list[str]) -> JobError:
    return JobExpired(message="the job was not done within its timeout_s", partial=partial)


def _settle(future: Future[Result], outcome: Result | BaseException) -> None:
    """Complete a future, unless its holder has cancelled it."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)

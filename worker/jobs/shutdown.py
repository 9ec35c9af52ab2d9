"""Stops the worker: finishes or returns its jobs, in an order that loses none."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from headrace.worker.jobs.completion import Completion
from headrace.worker.jobs.deliveries import Delivery, DeliveryBook
from headrace.worker.jobs.failure import ProcessFailure
from headrace.worker.jobs.intake import Intake
from headrace.worker.jobs.main_thread import MainThread
from headrace.worker.jobs.observers import JobCounts, JobObserver
from headrace.worker.jobs.quarantine import Quarantine
from headrace.worker.jobs.retry import PatientStore
from headrace.worker.jobs.store import Store

if TYPE_CHECKING:
    from headrace.worker.engine.registry import ModelRegistry

log = structlog.get_logger("headrace.worker")

#: How often a shutdown checks whether it should go faster.
STOP_TICK_S = 0.1
#: Pauses between two lines about what is still computed: the first, and the longest. Each is twice the one before.
DRAIN_LOG_S, LONGEST_DRAIN_LOG_S = 2.0, 16.0


class ColdShutdown:
    """Whether a cold shutdown was requested, and when it gives up running jobs. It may begin while models load."""

    def __init__(self) -> None:
        self.requested = False
        #: When running jobs that have not finished are given up, by the monotonic clock.
        self.give_up_at = float("inf")

    def finish_within(self, seconds: float) -> None:
        """Running jobs may take this many seconds from now to finish. Called in a signal handler."""
        self.requested = True
        self.give_up_at = min(self.give_up_at, time.monotonic() + seconds)


class Shutdown:
    """The steps of a shutdown. Their order matters:

    1. The intake ends, and jobs without a slot are let go: a shutdown must not depend on the length of the queue.
    2. Running jobs are finished, or given up when their time runs out, and their results are stored, however long Redis
       takes.
    3. Acknowledgements are flushed by hand, because the main loop has ended: otherwise finished jobs would run again.
    4. Leases are renewed until then, and the worker's record is removed last.

    The remaining messages are returned one by one, because after a reconnect the channel does not know all of them. A
    message of several jobs is returned whole; when it is delivered again, the jobs that ended are known by their
    results. If it waits so long that those results have expired, they are computed again, with the same outcome.
    If Redis does not answer, the shutdown watchdog ends the process.
    """

    def __init__(
        self,
        *,
        models: ModelRegistry,
        store: PatientStore,
        book: DeliveryBook,
        quarantine: Quarantine,
        intake: Intake,
        completion: Completion,
        failure: ProcessFailure,
        main_thread: MainThread,
        observers: JobObserver,
        counts: JobCounts,
        cold_shutdown: ColdShutdown,
        stop_reporting: Callable[[], None],
        flush_traces: Callable[[], None],
    ) -> None:
        self._models, self._store, self._book, self._quarantine = models, store, book, quarantine
        self._intake, self._completion, self._failure = intake, completion, failure
        self._main_thread, self._observers, self._counts = main_thread, observers, counts
        self._stop_reporting, self._flush_traces = stop_reporting, flush_traces
        self._cold_shutdown = cold_shutdown
        self._ended = False

    def warm(self) -> None:
        """Finish running jobs and end.

        Celery also calls this in the signal handler of a cold shutdown, where the thread may hold a lock that this
        needs; then it calls `cold` afterwards.
        """
        if not self._cold_shutdown.requested:
            self._end()

    def cold(self) -> None:
        """End; running jobs are finished if they are done in time."""
        self._end()

    def _end(self) -> None:
        if self._ended:
            return
        self._store.closing = self._ended = True
        if self._failure.failed:
            self._cold_shutdown.give_up_at = 0.0
        self._hurry_on_signals()
        held = sum(self._book.held_jobs(name) for name in self._models.names)
        log.info("worker.stopping", running=self._running()[0], held=held)
        self._intake.stop()
        self._finish_running()
        self._completion.stop()
        self._main_thread.flush()
        left = self._book.deliveries()
        open_jobs = self._return_messages(left)
        queued = self._queued(left)
        self._stop_reporting()
        self._observers.returned(open_jobs)
        self._flush_traces()
        log.info("worker.stopped", returned=len(left), queued=queued, **self._counts.finished)

    def _hurry_on_signals(self) -> None:
        """From now on a signal means that the shutdown has waited long enough: running jobs are given up too."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
                signal.signal(number, lambda *_: self._cold_shutdown.finish_within(0))

    def _finish_running(self) -> None:
        stop = self._models.stop
        finishing = threading.Thread(target=stop, kwargs={"finish": True, "drop_waiting": True}, daemon=True)
        finishing.start()
        began, pause_s = time.monotonic(), DRAIN_LOG_S
        tell_at = began + pause_s
        while finishing.is_alive() and (now := time.monotonic()) < self._cold_shutdown.give_up_at:
            finishing.join(STOP_TICK_S)
            if now >= tell_at and finishing.is_alive():
                running, tokens = self._running()
                log.info("worker.draining", running=running, tokens=tokens, seconds=round(now - began, 1))
                pause_s = min(2 * pause_s, LONGEST_DRAIN_LOG_S)
                tell_at = now + pause_s
        if finishing.is_alive():
            threading.Thread(target=stop, daemon=True).start()  # two threads may wait for the engines to stop
            finishing.join()

    def _running(self) -> tuple[int, int]:
        """How many jobs are computed, and the most tokens that they may still take."""
        running = [sequence for engine in self._models.loaded.values() for sequence in engine.running_sequences()]
        return len({each.job_id for each in running}), sum(each.most - each.written for each in running)

    def _queued(self, returned: list[Delivery]) -> dict[str, int] | None:
        """How many jobs no worker holds now, by model; None if Redis does not answer."""

        def count(store: Store) -> dict[str, int]:
            found = {name: sum(store.queued(name).values()) for name in self._models.names}
            for delivery in returned:  # counted whole, although some of its jobs have ended
                found[delivery.model] -= len(delivery.jobs) - len(delivery.open)
            return {name: max(0, number) for name, number in found.items()}

        return self._store.ask(count)

    def _return_messages(self, left: list[Delivery]) -> set[str]:
        """Return the messages that are left. Returns their open jobs."""
        for delivery in left:
            delivery.give_back()
        open_jobs = {job_id for delivery in left for job_id in delivery.open}
        # If the engine died, a job inside may have killed it: those keep their attempts.
        suspected = self._failure.failed and not self._failure.crash_is_ours
        attempted = set() if suspected else self._quarantine.inside() & open_jobs
        self._store.ask(lambda store: store.returned(open_jobs, attempted))
        return open_jobs

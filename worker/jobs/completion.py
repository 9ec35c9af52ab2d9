"""From a computed outcome to a stored result and an acknowledged message."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import structlog
from celery.exceptions import TaskRevokedError
from celery.worker import state

from headrace.client.wire.errors import JobCancelled
from headrace.client.wire.results import Result
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.jobs.deliveries import Delivery, DeliveryBook, Verdict
from headrace.worker.jobs.main_thread import MainThread
from headrace.worker.jobs.observers import Ending, JobObserver, as_outcome, state_of
from headrace.worker.jobs.quarantine import Quarantine
from headrace.worker.jobs.result_writer import Ended, ResultWriter
from headrace.worker.jobs.retry import PatientStore
from headrace.worker.jobs.service import Service, failed

log = structlog.get_logger("headrace.worker")

#: What Celery's tracer returns: whether the task failed, its value, and its run time in seconds.
Traced = tuple[bool, Any, float]


class Completion:
    """Stores the outcomes of jobs, and acknowledges a message when its last job is stored.

    A job that has its own message goes through Celery's tracer, which stores its result and sends events, in the
    finisher threads. Grouped jobs go to the writer thread, which stores all waiting results with one request.
    """

    def __init__(
        self,
        *,
        service: Service,
        backend: Any,
        store: PatientStore,
        book: DeliveryBook,
        quarantine: Quarantine,
        observers: JobObserver,
        main_thread: MainThread,
        on_vacant: Callable[[], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._service, self._backend, self._store, self._book = service, backend, store, book
        self._quarantine, self._observers, self._main_thread = quarantine, observers, main_thread
        self._on_vacant = on_vacant
        self._finishers = ThreadPoolExecutor(2, thread_name_prefix="headrace-finish")
        self._foreign = ThreadPoolExecutor(2, thread_name_prefix="headrace-other")
        self._writer = ResultWriter(service, backend.record, self._on_stored, on_fatal)

    def start(self) -> None:
        """Start the writer thread."""
        self._writer.start()

    def stop(self) -> None:
        """Wait until all outcomes are stored, however long Redis takes, and stop all threads."""
        self._finishers.shutdown()
        self._writer.stop()
        self._service.events.stop()
        self._foreign.shutdown(cancel_futures=True)

    # --- in the engine's thread ------------------------------------------------------------------------------------

    def started(self, job_id: str) -> None:
        """A job has a slot. Only now is its task active for Celery."""
        delivery = self._book.of_job(job_id)
        if delivery is not None:
            self._observers.started(job_id)
            if delivery.started_at is None:
                self.accept(delivery)

    def computed(self, job_id: str, future: Future[Result]) -> None:
        """A job has an outcome, which `future` holds. Store it, and return at once."""
        error = future.exception()
        if isinstance(error, EngineStopped):
            return  # the message stays unacknowledged, so another worker gets it
        delivery = self._book.of_job(job_id)
        if delivery is None:
            return
        self._observers.computed(job_id)
        verdict = delivery.verdict if isinstance(error, JobCancelled) else None
        if verdict is None and isinstance(error, JobCancelled) and delivery.grouped and job_id in state.revoked:
            verdict = TaskRevokedError("revoked")
        if delivery.grouped:
            self._writer.put(job_id, failed(verdict) if verdict else future)
        elif verdict:
            self._finishers.submit(self._conclude, delivery, verdict)
        else:
            self._service.stash(job_id, future)
            self._finishers.submit(self._finish, delivery, future)

    # --- in any thread ---------------------------------------------------------------------------------------------

    def fail_unheld(self, job_ids: Sequence[str], error: BaseException) -> None:
        """Store a failure for jobs that belong to no message here."""
        for job_id in job_ids:
            self._writer.put(job_id, failed(error))

    def run_foreign(self, delivery: Delivery) -> None:
        """Run one of Celery's own tasks, such as chord_unlock, in a thread."""
        self.accept(delivery)
        self._foreign.submit(self._finish, delivery)

    def accept(self, delivery: Delivery) -> None:
        """Tell Celery that a message is being worked on."""
        delivery.started_at = delivery.started_at or time.monotonic()
        if delivery.on_accepted is not None:
            self._main_thread.call(delivery.on_accepted, delivery.handle, delivery.started_at)

    def supersede(self, older: Delivery, newer: Delivery) -> None:
        """Drop a message because newer ones have adopted all its jobs."""
        if older.request is None:
            return
        if older.message_id != newer.message_id:
            self._main_thread.call(state.task_ready, older.request)  # Celery knows it by another id
        if older.tag != newer.tag:
            self._main_thread.call(older.request.acknowledge)  # another copy, not a redelivery of the same one

    # --- in the finisher threads and the writer thread -------------------------------------------------------------

    def _finish(self, delivery: Delivery, future: Future[Result] | None = None) -> None:
        """Run Celery's tracer, whose task body picks up the outcome; what it returns ends the newest message."""
        job_id = delivery.message_id
        try:
            if delivery.started_at is None:
                self.accept(delivery)
            task_failed, value, runtime = delivery.target(*delivery.args, **delivery.kwargs)
            if future is not None:
                current = self._book.of_job(job_id) or delivery
                runtime = time.monotonic() - (current.started_at or current.received_at)
                self._observe_end(job_id, future, routine=False, seconds=round(runtime, 3))
                value = value if task_failed else "<redacted>"  # goes into events; the result itself is stored
                ended = state_of(future.exception() or future.result())
                self._store.ask(lambda store: store.ended([job_id], ended))
            self.settle([job_id], (task_failed, value, runtime))
        except BaseException as error:
            # A message must not stay open: it would count as held by this worker for ever.
            log.error("job.finish_failed", job_id=job_id, error=repr(error), trace=traceback.format_exc())
            if future is not None:  # storing the result failed, or what follows it; the job has ended all the same
                self._writer.put(job_id, future)
            else:
                self._main_thread.call(self._book.drop(job_id, delivery).give_back)

    def _conclude(self, delivery: Delivery, verdict: Verdict) -> None:
        """Store the end of a revoked job as Celery does, but in a thread that may wait for Redis."""
        job_id, context = delivery.message_id, delivery.request._context
        try:
            if isinstance(verdict, TaskRevokedError):
                self._backend.mark_as_revoked(job_id, str(verdict), request=context)
            else:
                self._backend.mark_as_failure(job_id, verdict, request=context)
            ended = state_of(verdict)
            self._store.ask(lambda store: store.ended([job_id], ended))
            self._on_stored([(job_id, failed(verdict))])
        except BaseException as error:
            log.error("job.finish_failed", job_id=job_id, error=repr(error), trace=traceback.format_exc())
            self._writer.put(job_id, failed(verdict))

    def _on_stored(self, ended: Sequence[Ended]) -> None:
        for job_id, future in ended:
            self._observe_end(job_id, future, routine=True)
        self.settle([job_id for job_id, _ in ended])

    def _observe_end(self, job_id: str, future: Future[Result], *, routine: bool, **details: Any) -> None:
        delivery = self._book.of_job(job_id)
        model = self._service.models.names[0] if delivery is None else delivery.model
        outcome = as_outcome(future.exception() or future.result())
        self._observers.ended(Ending(job_id, model, outcome, routine, details))

    def settle(self, job_ids: Sequence[str], traced: Traced | None = None) -> None:
        """Remove jobs whose results are stored. A message is done when its last job is; see `_complete`."""
        self._service.events.end(job_ids)
        # Not earlier: if the next job kills the process, a job whose end is not stored yet would keep an attempt.
        left = [self._quarantine.leave(job_id) for job_id in job_ids]
        if any(left):
            self._on_vacant()
        done = self._book.close_jobs(job_ids)
        for delivery in done:
            self._complete(delivery, traced)
        if not done:
            self._main_thread.wake()  # there may be room for another message

    def _complete(self, delivery: Delivery, traced: Traced | None = None) -> None:
        """Tell Celery that a message is done. `traced` is what Celery's tracer returned, if it ran."""
        if delivery.started_at is None:
            self.accept(delivery)
        if delivery.grouped and delivery.verdict is None:
            runtime = time.monotonic() - (delivery.started_at or delivery.received_at)
            jobs = len(delivery.jobs)
            log.info("message.finished", message_id=delivery.message_id, jobs=jobs, seconds=round(runtime, 3))
            self._main_thread.call(delivery.on_done, (False, f"{jobs} jobs", runtime))
        elif traced is not None:
            self._main_thread.call(delivery.on_done, traced)
        elif (request := delivery.request) is not None:  # its end is already stored
            self._main_thread.call(state.task_ready, request)
            self._main_thread.call(request.acknowledge)

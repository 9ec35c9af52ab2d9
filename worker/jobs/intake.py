"""From a delivered message to a job in the engine: one thread, one request to Redis for all waiting messages."""

from __future__ import annotations

import functools
import queue
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import structlog
from celery.worker import state

from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.errors import JobFailed
from headrace.client.wire.signing import marked
from headrace.config import Settings
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.jobs.completion import Completion
from headrace.worker.jobs.deliveries import Delivery, DeliveryBook
from headrace.worker.jobs.observers import Arrival, JobObserver
from headrace.worker.jobs.quarantine import Candidate, Quarantine
from headrace.worker.jobs.retry import PatientStore
from headrace.worker.jobs.service import Service, cancelled_early, failed
from headrace.worker.jobs.store import JobRecord, Store, Waiting

log = structlog.get_logger("headrace.worker")

#: How many messages share one request to Redis.
INTAKE_BATCH = 128

MAX_ATTEMPTS = (
    "the job was started {} times, and each time the worker process ended before the job did, the last time while it "
    "computed no other job; the worker's log and the kernel's log (memory) have the cause. When it is fixed, submit "
    "the job again with another id"
)


@dataclass(frozen=True)
class Refusal:
    """The jobs that a refused message names, and the error that they fail with."""

    job_ids: Sequence[str]
    error: JobFailed


class _Signal(Enum):
    """What wakes the intake thread besides messages."""

    LOOK = "admit waiting jobs, and unload idle models"
    STOP = "end the thread"


class Intake:
    """Looks up the jobs of delivered messages in Redis, counts an attempt for each, and submits them to the engines."""

    def __init__(
        self,
        *,
        settings: Settings,
        service: Service,
        store: PatientStore,
        book: DeliveryBook,
        quarantine: Quarantine,
        completion: Completion,
        observers: JobObserver,
        on_fatal: Callable[[BaseException], None],
        identity: Callable[[str], str],
    ) -> None:
        self._identity = identity
        self._settings, self._service, self._models, self._store = settings, service, service.models, store
        self._book, self._quarantine, self._completion = book, quarantine, completion
        self._observers, self._on_fatal = observers, on_fatal
        self._inbox: queue.SimpleQueue[Delivery | Refusal | _Signal] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="headrace-intake", daemon=True)

    # --- called from any thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Look up the messages that were put so far without submitting their jobs, and end the thread."""
        self._inbox.put(_Signal.STOP)
        self._thread.join()

    def put(self, delivery: Delivery) -> None:
        """Take a message. Returns at once."""
        self._inbox.put(delivery)

    def refuse(self, job_ids: Sequence[str], error: JobFailed) -> None:
        """Fail the jobs of a refused message, unless they may belong to somebody else. Returns at once."""
        if job_ids:
            self._inbox.put(Refusal(job_ids, error))

    def wake(self) -> None:
        """Submit the jobs whose model has been loaded or that may run now, and unload idle models. Returns at once."""
        self._inbox.put(_Signal.LOOK)

    # --- in the intake thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._process_batch():
                pass
        except BaseException as error:  # without this thread the worker would look healthy and take no job
            self._on_fatal(error)

    def _process_batch(self) -> bool:
        """Wait for a message, and process it and those queued after it. Returns whether more may follow.

        Each round has its own variables, so that no message is kept while the thread waits for the next.
        """
        items = [self._inbox.get()]
        while len(items) < INTAKE_BATCH and not self._inbox.empty():
            items.append(self._inbox.get())
        running = _Signal.STOP not in items
        self._admit([item for item in items if isinstance(item, Delivery)])
        for refusal in [item for item in items if isinstance(item, Refusal)]:
            self._fail_refused(refusal)
        if running:
            self._models.unload_idle({delivery.model for delivery in self._book.deliveries()})
            self._submit_admitted()
        return running

    def _admit(self, batch: list[Delivery]) -> None:
        """Enter the jobs of messages, and queue those for the engine that have not ended."""
        arrived: dict[str, tuple[Any, Delivery]] = {}
        for delivery in batch:
            new = self._adopt(delivery)
            if delivery.task in (TASK_NAME, GROUP_TASK_NAME):
                arrived |= {job_id: (delivery.jobs[job_id], delivery) for job_id in new}
                log.info("message.accepted", message_id=delivery.message_id, jobs=len(delivery.jobs))
            elif new:  # one of Celery's own tasks, for example chord_unlock
                self._completion.run_foreign(delivery)
        records = self._store.ask(lambda store: store.lookup(list(arrived))) if arrived else []
        if records is None:
            return  # closing without Redis: the messages keep their leases and go to another worker
        self._announce(arrived, records)
        finished = []
        for (job_id, (wire, delivery)), record in zip(arrived.items(), records, strict=True):
            if record.finished:
                finished.append(job_id)
            else:
                self._admit_job(job_id, wire, delivery, record)
        if finished:
            log.info("jobs.finished_before", jobs=len(finished))
            self._store.ask(lambda store: store.ended(finished))
            self._completion.settle(finished)

    def _announce(self, arrived: Mapping[str, tuple[Any, Delivery]], records: Sequence[JobRecord]) -> None:
        """Write the records of jobs that have none, because a plain Celery producer sent them."""
        nameless = [j for j, record in zip(arrived, records, strict=True) if record.state is None]
        if jobs := {job_id: Waiting(arrived[job_id][1].model, None) for job_id in nameless}:
            self._store.ask(lambda store: store.announce(jobs))

    def _adopt(self, delivery: Delivery) -> list[str]:
        """Let a message adopt its jobs. Returns those that are new here; the others continue."""
        adoption = self._book.adopt(delivery)
        for older in adoption.superseded:
            self._completion.supersede(older, delivery)
        if adopted := len(delivery.open) - len(adoption.new):
            log.info("message.adopted", message_id=delivery.message_id, jobs=adopted)
            if delivery.started_at is not None:
                self._completion.accept(delivery)
        return adoption.new

    def _admit_job(self, job_id: str, wire: Any, delivery: Delivery, record: JobRecord) -> None:
        current = self._book.of_job(job_id) or delivery  # a later message of the batch may have adopted the job
        # Another copy of the message: the worker that began the job is alive, so that attempt has not failed.
        shared = record.begun_elsewhere and not current.redelivered
        attempts = record.attempts - shared
        self._observers.arrived(Arrival(job_id, wire, current, attempts + 1))
        if record.cancelled or job_id in state.revoked or current.verdict is not None:
            self._completion.computed(job_id, failed(cancelled_early()))
        elif attempts >= self._settings.max_attempts:
            error = JobFailed("max_attempts", MAX_ATTEMPTS.format(attempts))
            self._completion.computed(job_id, failed(error))
        else:
            self._quarantine.put(Candidate(job_id, wire, attempts, delivery.model, shared))

    def _fail_refused(self, refusal: Refusal) -> None:
        """Fail the jobs of a refused message, because callers wait for them, but no job of another submitter.

        A message can name any job, so a job that is here continues. With signing keys only those jobs fail
        whose submitter wrote a record without a key and that no worker computes: the refused message is theirs.
        """
        job_ids = self._book.without_open(refusal.job_ids)
        if job_ids and (keys := self._settings.signing_keys):
            records = self._store.ask(lambda store: store.lookup(job_ids)) or []
            pairs = zip(job_ids, records, strict=False)  # no records if this process closes without Redis
            job_ids = [job_id for job_id, r in pairs if r.state == "queued" and not marked(keys, job_id, r.mark)]
        self._completion.fail_unheld(job_ids, refusal.error)

    def _submit_admitted(self) -> None:
        """Submit the jobs that may run now. Their attempts are counted first, because a job may kill the process."""
        self._models.load_in_background(self._quarantine.models(), self.wake)
        while candidates := self._quarantine.admit(self._models.loaded):
            if not self._count_attempts(candidates):
                return
            for candidate in candidates:
                if candidate.attempts:
                    log.warning("job.quarantined", job_id=candidate.job_id, attempts=candidate.attempts)
                self._submit(candidate)

    def _count_attempts(self, candidates: list[Candidate]) -> bool:
        """Count the attempts of jobs. Returns False if this process closes without Redis."""
        for model in dict.fromkeys(candidate.model for candidate in candidates):
            job_ids = [candidate.job_id for candidate in candidates if candidate.model == model]
            shared = {candidate.job_id for candidate in candidates if candidate.shared}
            count = functools.partial(_count, job_ids, self._identity(model), shared)
            if self._store.ask(count) is None:
                return False
        return True

    def _submit(self, candidate: Candidate) -> None:
        job_id = candidate.job_id
        try:
            future = self._service.submit(
                job_id, candidate.wire, candidate.model, functools.partial(self._completion.started, job_id)
            )
            future.add_done_callback(functools.partial(self._completion.computed, job_id))
        except EngineStopped:
            return  # the shutdown returns the message
        except Exception as error:
            log.error("job.intake_failed", job_id=job_id, error=repr(error), trace=traceback.format_exc())
            message = f"the message cannot be processed: {type(error).__name__}"
            self._completion.computed(job_id, failed(JobFailed("invalid_request", message)))


def _count(job_ids: list[str], worker: str, shared: set[str], store: Store) -> list[int]:
    return store.count_attempts(job_ids, worker, shared)

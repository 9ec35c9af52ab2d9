"""Connects the parts of this package that a job passes through, from its message to its stored result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.config import Settings
from headrace.worker.jobs.cancellation import Cancellation
from headrace.worker.jobs.completion import Completion
from headrace.worker.jobs.deliveries import DeliveryBook
from headrace.worker.jobs.failure import ProcessFailure
from headrace.worker.jobs.health import Health
from headrace.worker.jobs.heartbeat import Heartbeat
from headrace.worker.jobs.intake import Intake
from headrace.worker.jobs.leases import Leases
from headrace.worker.jobs.main_thread import MainThread
from headrace.worker.jobs.observers import JobCounts, JobLog, Observers, StartedJobs
from headrace.worker.jobs.quarantine import Quarantine
from headrace.worker.jobs.retry import PatientStore
from headrace.worker.jobs.service import Service
from headrace.worker.jobs.shutdown import ColdShutdown, Shutdown
from headrace.worker.jobs.shutdown_watchdog import ShutdownWatchdog
from headrace.worker.jobs.waiting import WaitingJobs
from headrace.worker.jobs.worker_record import WorkerRecord
from headrace.worker.queue.held import HeldMessages


class JobPipeline:
    """The parts that hold jobs and messages, and, after `connect`, the parts that process them."""

    completion: Completion
    intake: Intake
    cancellation: Cancellation
    health: Health
    heartbeat: Heartbeat
    shutdown: Shutdown
    _record: WorkerRecord
    _waiting: WaitingJobs
    _patient_store: PatientStore
    _watchdog: ShutdownWatchdog

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        #: The messages that this process holds.
        self.book = DeliveryBook()
        #: All messages that this process has not acknowledged, also those that wait inside Celery.
        self.held = HeldMessages()
        #: The jobs that wait for an engine.
        self.quarantine = Quarantine(settings.slots, settings.max_attempts)
        #: How jobs have ended.
        self.counts = JobCounts()
        self._started = StartedJobs()
        #: Observers that are notified about each job.
        self.observers = Observers(self.counts, self._started, JobLog())
        self.failure = ProcessFailure(settings)
        self.main_thread = MainThread()
        self.cold_shutdown = ColdShutdown()
        #: Whether messages are taken from the queue; not while an engine is stalled.
        self.takes_messages = True

    def connect(
        self,
        service: Service,
        backend: Any,
        *,
        stop_probes: Callable[[], None],
        flush_traces: Callable[[], None],
    ) -> None:
        """Create the parts that need the models, the store, and Celery's result backend.

        Args:
            service: its models have been loaded.
            backend: stores the results of single jobs.
            stop_probes: called in a shutdown when all messages are finished or returned.
            flush_traces: called afterwards.
        """
        self._patient_store = PatientStore(service.store)
        self.health = Health(service.models, self._settings.stall_s, lambda: self.main_thread.hub is not None)
        self._record = WorkerRecord(
            service.store,
            service.models,
            self.book,
            self.health,
            slots=self._settings.slots,
            failures=self.counts.failures,
            scheduled=lambda model: self._waiting.count(model),
            summary=self.counts.summary,
        )
        self._connect_completion(service, backend)
        self._connect_heartbeat(service)

        def stop_reporting() -> None:
            self.heartbeat.stop()
            self._watchdog.stop()
            stop_probes()

        self.shutdown = Shutdown(
            models=service.models,
            store=self._patient_store,
            book=self.book,
            quarantine=self.quarantine,
            intake=self.intake,
            completion=self.completion,
            failure=self.failure,
            main_thread=self.main_thread,
            observers=self.observers,
            counts=self.counts,
            cold_shutdown=self.cold_shutdown,
            stop_reporting=stop_reporting,
            flush_traces=flush_traces,
        )

    def _connect_completion(self, service: Service, backend: Any) -> None:
        self.completion = Completion(
            service=service,
            backend=backend,
            store=self._patient_store,
            book=self.book,
            quarantine=self.quarantine,
            observers=self.observers,
            main_thread=self.main_thread,
            on_vacant=self.wake_intake,
            on_fatal=self.end_process,
        )
        self.intake = Intake(
            settings=self._settings,
            service=service,
            store=self._patient_store,
            book=self.book,
            quarantine=self.quarantine,
            completion=self.completion,
            observers=self.observers,
            on_fatal=self.end_process,
            identity=self._record.identity,
        )
        self.cancellation = Cancellation(
            service=service,
            book=self.book,
            quarantine=self.quarantine,
            completion=self.completion,
            observers=self.observers,
        )

    def _connect_heartbeat(self, service: Service) -> None:
        models, store, settings = service.models, service.store, self._settings
        self._waiting = WaitingJobs(store, self.held, self.main_thread, self.completion.fail_unheld)
        self.heartbeat = Heartbeat(
            settings=settings,
            models=models,
            store=store,
            book=self.book,
            cancellation=self.cancellation,
            health=self.health,
            leases=Leases(
                store, self.book, settings.lease_s, self.cancellation.let_go, self.held, self._forget_message
            ),
            record=self._record,
            waiting=self._waiting,
            started=self._started,
            hooks=self,
        )
        self._watchdog = ShutdownWatchdog(self.health, self.book, settings.soft_shutdown_s)

    def _forget_message(self, tag: str) -> None:
        self.main_thread.call(self.held.holder.forget, tag)

    def start(self) -> None:
        """Start the threads."""
        self.completion.start()
        self.intake.start()
        self.heartbeat.start()
        self._watchdog.start()

    def close(self) -> None:
        """A shutdown begins: if Redis does not answer, requests are no longer repeated."""
        self._patient_store.closing = True

    def take_messages(self, on: bool) -> None:
        """Take messages from the queue, or stop taking them: while an engine is stalled, they would only wait."""
        self.takes_messages = on
        self.main_thread.wake()

    def wake_intake(self) -> None:
        """Submit the jobs that may run now, and unload idle models. Returns at once."""
        self.intake.wake()

    def end_process(self, error: BaseException) -> None:
        """End this process, because it cannot continue. May be called from any thread, and repeatedly."""
        self.failure.end_process(error)

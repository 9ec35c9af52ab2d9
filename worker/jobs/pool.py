"""Celery's pool over the engines: messages go in as they are delivered, and are done when their results are stored.

    thread      does                                                         module
    main        Celery: on_apply puts a message into the intake; afterwards  pool.py, main_thread.py
                acknowledges it and does Celery's bookkeeping
    intake      looks jobs up in Redis, quarantine, submits to the engines   intake.py, quarantine.py
    load        loads a model that has jobs; ends when it is loaded          engine/registry.py
    engine      computes; gives finished futures to Completion               engine/step_loop.py
    finisher    Celery's tracer stores the result of a single job            completion.py
    writer      stores the results of grouped jobs, many with one request    result_writer.py
    events      writes the text of streaming jobs, in the same way           stream_writer.py
    heartbeat   leases, cancellation, time limits, the worker's record       heartbeat.py
    watch       ends a shutdown that waits too long for Redis                shutdown_watchdog.py
    probes      /livez, /readyz, /metrics, if there is a port                observability/probes.py

Celery imports this module to parse its command line, so torch is not imported before `on_start`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import structlog
from celery.concurrency.base import BasePool
from celery.exceptions import InvalidTaskError, TaskRevokedError
from celery.platforms import EX_FAILURE
from kombu.asynchronous import Hub

from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import GROUP_TASK_NAME
from headrace.config import Settings, SettingsError
from headrace.config.tracing import find_tracer, setup_tracing
from headrace.worker.engine.errors import ModelUnavailable
from headrace.worker.jobs.cancellation import Cancellation
from headrace.worker.jobs.completion import Completion
from headrace.worker.jobs.deliveries import Delivery, DeliveryBook
from headrace.worker.jobs.failure import ProcessFailure
from headrace.worker.jobs.health import Health
from headrace.worker.jobs.heartbeat import Heartbeat
from headrace.worker.jobs.intake import Intake
from headrace.worker.jobs.leases import Leases
from headrace.worker.jobs.main_thread import MainThread
from headrace.worker.jobs.observers import (
    JobCounts,
    JobLog,
    MetricsObserver,
    Observers,
    SpanObserver,
    StartedJobs,
)
from headrace.worker.jobs.quarantine import Quarantine
from headrace.worker.jobs.retry import PatientStore
from headrace.worker.jobs.service import Service, service_for
from headrace.worker.jobs.shutdown import Shutdown
from headrace.worker.jobs.shutdown_watchdog import ShutdownWatchdog
from headrace.worker.jobs.worker_record import WorkerRecord
from headrace.worker.observability.probes import Probes, ProbesError, open_probes
from headrace.worker.queue.engine_consumer import JobPool
from headrace.worker.queue.messages import argument, model_of, read_group

if TYPE_CHECKING:
    from headrace.worker.engine.registry import Models

log = structlog.get_logger("headrace.worker")


class EnginePool(BasePool, JobPool):
    """Gives the jobs of messages to the engines, and their outcomes to Celery.

    Celery's `-c` is the number of jobs that are held here, running and waiting together, in equal parts for each model;
    the number of slots is HEADRACE_SLOTS. A message is taken while fewer jobs are held, so the jobs of the last message
    may exceed the number.
    """

    body_can_be_buffer = True
    #: Stopping waits for the engine, which a signal handler must not do.
    signal_safe = False

    # Built by `on_start`, when the service is known.
    heartbeat: Heartbeat
    _completion: Completion
    _intake: Intake
    _cancellation: Cancellation
    _shutdown: Shutdown
    _watchdog: ShutdownWatchdog
    _health: Health
    _patient_store: PatientStore

    def __init__(self, *args: Any, service: Service | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: Settings = self.app.headrace_settings
        self._service = service
        #: The messages that are here.
        self.book = DeliveryBook()
        #: The jobs that wait for an engine.
        self.quarantine = Quarantine(self.settings.slots, self.settings.max_attempts)
        #: How jobs have ended.
        self.counts = JobCounts()
        self._started = StartedJobs()
        #: Who is told about each job; more may be added before `on_start`.
        self.observers = Observers(self.counts, self._started, JobLog())
        self._failure = ProcessFailure(self.settings)
        self._main_thread = MainThread()
        self._takes_messages = True
        self._probes: Probes | None = None

    @property
    def models(self) -> Models:
        """The models that this process serves."""
        return self._engine_service.models

    @property
    def failed(self) -> bool:
        """Whether the process cannot continue: it must not end with exit code 0."""
        return self._failure.failed

    # --- starting --------------------------------------------------------------------------------------------------

    def on_start(self) -> None:
        """Load the models. Celery connects to the broker afterwards, so no message is taken before they are loaded."""
        try:
            self._probes = open_probes(self.settings)
        except ProbesError as error:
            log.error("worker.probes_failed", error=str(error))
            raise SystemExit(EX_FAILURE) from error
        flush_traces = self._set_up_traces()
        service = self._service = self._service or service_for(self.settings)
        service.models.on_fatal = self.end_process
        try:
            service.models.start()
        except ModelUnavailable as error:
            # The error says what to do: the process ends with this line and without a traceback.
            self._failure.log_unavailable(error)
            raise SystemExit(EX_FAILURE) from error
        service.fail_fast = self.app.backend.fail_fast = True
        self.app.conf.worker_soft_shutdown_timeout = 0.0  # Celery would sleep for this time; `finish_within` does not
        if self._probes is not None:
            self.observers.add(MetricsObserver(self._probes.metrics))
        store = self._patient_store = PatientStore(service.store)
        self._build_job_flow(service, store)
        self._build_heartbeat(service)
        self._build_shutdown(service, store, flush_traces)
        self._completion.start()
        self._intake.start()
        self.heartbeat.start()
        self._watchdog.start()
        if self._probes is not None:
            self._probes.watch(self._health)
            self._probes.metrics.watch(self.book, service.models, self._health, self.heartbeat)
            service.on_retry = self.app.backend.on_retry = self._probes.metrics.retried

    def _set_up_traces(self) -> Callable[[], None]:
        """Set up OpenTelemetry if the settings ask for it. Returns what sends the last spans."""
        try:
            flush = setup_tracing(self.settings, "headrace-worker")
        except SettingsError as error:
            log.error("worker.traces_failed", error=str(error))
            raise SystemExit(EX_FAILURE) from error
        if (tracer := find_tracer()) is not None:
            from headrace.worker.observability.tracing import JobTraces

            self.observers.add(SpanObserver(JobTraces(tracer)))
        return flush

    def _build_job_flow(self, service: Service, store: PatientStore) -> None:
        self._completion = Completion(
            service=service,
            backend=self.app.backend,
            store=store,
            book=self.book,
            quarantine=self.quarantine,
            observers=self.observers,
            main_thread=self._main_thread,
            on_vacant=self.look,
            on_fatal=self.end_process,
        )
        self._intake = Intake(
            settings=self.settings,
            service=service,
            store=store,
            book=self.book,
            quarantine=self.quarantine,
            completion=self._completion,
            observers=self.observers,
            on_fatal=self.end_process,
        )
        self._cancellation = Cancellation(
            service=service,
            book=self.book,
            quarantine=self.quarantine,
            completion=self._completion,
            observers=self.observers,
        )

    def _build_heartbeat(self, service: Service) -> None:
        models, store, settings = service.models, service.store, self.settings
        self._health = Health(models, settings.stall_s, lambda: self._main_thread.hub is not None)
        self.heartbeat = Heartbeat(
            settings=settings,
            models=models,
            store=store,
            book=self.book,
            cancellation=self._cancellation,
            health=self._health,
            leases=Leases(store, self.book, settings.lease_s, self._cancellation.let_go),
            record=WorkerRecord(
                store, models, self.book, self._health, slots=settings.slots, failures=self.counts.failures
            ),
            started=self._started,
            hooks=self,
        )
        self._watchdog = ShutdownWatchdog(self._health, self.book, settings.soft_shutdown_s)

    def _build_shutdown(self, service: Service, store: PatientStore, flush_traces: Callable[[], None]) -> None:
        self._shutdown = Shutdown(
            models=service.models,
            store=store,
            book=self.book,
            quarantine=self.quarantine,
            intake=self._intake,
            completion=self._completion,
            failure=self._failure,
            main_thread=self._main_thread,
            observers=self.observers,
            counts=self.counts,
            stop_reporting=self._stop_reporting,
            flush_traces=flush_traces,
        )

    def register_with_event_loop(self, hub: Hub) -> None:
        """Called by Celery with the loop of the main thread, just before it begins to read the queue."""
        self._main_thread.hub = hub

    # --- messages --------------------------------------------------------------------------------------------------

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        callback: Callable[[Any], None] = lambda _: None,
        accept_callback: Callable[[int, float], None] | None = None,
        timeout: float | None = None,
        verdict: TaskRevokedError | None = None,
        **_: Any,
    ) -> None:
        """Take a message. This must not block: remote control and acknowledgements run in the same thread.

        Celery's time limit applies to messages of one job; in a group the `expires_at` of each job applies. With a
        verdict nothing is computed, and the jobs of the message end with it.
        """
        task, job_id, headers = args[:3]
        # Celery has already decoded the body and keeps it in the headers of the request.
        given = argument(task, headers.get("args"), headers.get("kwargs"))
        grouped = task == GROUP_TASK_NAME
        jobs = read_group(given) if grouped else {job_id: given}
        if not jobs:
            raise InvalidTaskError("it names no job")
        delivery = Delivery(
            task=task,
            target=target,
            args=args,
            kwargs=kwargs or {},
            on_done=callback,
            on_accepted=accept_callback,
            time_limit_s=None if grouped else timeout,
            received_at=time.monotonic(),
            model=self._engine_service.model_named(model_of(headers.get("delivery_info"))),
            jobs=jobs,
            verdict=verdict,
        )
        self.observers.received(delivery)
        self.book.add(delivery)
        self._intake.put(delivery)

    def has_room(self, model: str | None = None) -> bool:
        """Whether another message may be taken for the model; without a name, for any model.

        Each model has a window of its own, so that jobs that wait for one engine do not keep out those for another.
        """
        names = self.models.names
        window = max(1, int(self.limit) // len(names))
        names = (model,) if model else names
        return self._takes_messages and any(self.book.held_jobs(name) < window for name in names)

    def take_messages(self, on: bool) -> None:
        """Take messages from the queue, or stop taking them: while an engine is stalled, they would only wait here."""
        self._takes_messages = on
        self._main_thread.wake()

    def refuse(self, job_ids: Sequence[str], error: JobFailed) -> None:
        """Fail the jobs that a refused message names, unless they may belong to somebody else."""
        self._intake.refuse(job_ids, error)

    def revoke(self, request: Any, reason: str) -> None:
        """End the jobs of a message that was revoked or has expired, without disturbing others."""
        if not self._cancellation.revoke(request, reason):  # Celery asks before it passes on the message
            args, callback = (request.type, request.id, request.request_dict), request.on_success
            self.on_apply(None, args, callback=callback, verdict=TaskRevokedError(reason))  # type: ignore[arg-type]

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Called by Celery to stop a task of its own, for example chord_unlock. It is short, so it runs to its end."""

    def look(self) -> None:
        """Submit jobs whose turn it is, and unload idle models. Returns at once."""
        self._intake.look()

    # --- what one process cannot do --------------------------------------------------------------------------------

    def grow(self, n: int = 1) -> NoReturn:
        """Not possible: one process runs one engine for each model."""
        raise NotImplementedError("EnginePool cannot grow: set HEADRACE_SLOTS, or start another worker")

    def shrink(self, n: int = 1) -> NoReturn:
        """Not possible: one process runs one engine for each model."""
        raise NotImplementedError("EnginePool cannot shrink: set HEADRACE_SLOTS, or stop a worker")

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        stats = self.models.stats().values()
        counts = {name: sum(getattr(each, name) for each in stats) for name in ("slots", "running", "waiting")}
        return info | counts

    # --- stopping --------------------------------------------------------------------------------------------------

    def end_process(self, error: BaseException) -> None:
        """End this process, because it cannot continue. May be called from any thread, and repeatedly."""
        self._failure.end_process(error)

    def on_close(self) -> None:
        """Called by Celery when a shutdown begins."""
        self._patient_store.closing = True

    def finish_within(self, seconds: float) -> None:
        """Called in the signal handler of a cold shutdown: running jobs may take this many seconds to finish."""
        self._shutdown.finish_within(seconds)

    def on_stop(self) -> None:
        """Called by Celery for a warm shutdown."""
        self._shutdown.warm()

    def on_terminate(self) -> None:
        """Called by Celery for a cold shutdown."""
        self._shutdown.cold()

    def _stop_reporting(self) -> None:
        """Stop what shows the state of this worker to others."""
        self.heartbeat.stop()
        self._watchdog.stop()
        if self._probes is not None:
            self._probes.stop()

    @property
    def _engine_service(self) -> Service:
        if self._service is None:
            raise RuntimeError("the pool has not been started")
        return self._service

"""Celery's pool over the engines: messages enter as they are delivered, and are done when their results are stored.

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

from headrace.client.wire.celery import GROUP_TASK_NAME
from headrace.client.wire.errors import JobFailed
from headrace.config import Settings, SettingsError
from headrace.config.tracing import find_tracer, setup_tracing
from headrace.worker.engine.errors import ModelUnavailable
from headrace.worker.jobs.deliveries import Delivery
from headrace.worker.jobs.observers import MetricsObserver, SpanObserver
from headrace.worker.jobs.pipeline import JobPipeline
from headrace.worker.jobs.service import Service, service_for
from headrace.worker.observability.probes import Probes, ProbesError, open_probes
from headrace.worker.queue.engine_consumer import JobPool
from headrace.worker.queue.messages import argument, model_of, read_group

if TYPE_CHECKING:
    from headrace.worker.engine.registry import ModelRegistry

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

    def __init__(self, *args: Any, service: Service | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: Settings = self.app.headrace_settings
        self._service = service
        #: The parts that jobs pass through; observers of jobs can be added to it.
        self.pipeline = JobPipeline(self.settings)
        self.held = self.pipeline.held
        self.pipeline.failure.on_unavailable = self._note_unavailable
        self._probes: Probes | None = None

    @property
    def models(self) -> ModelRegistry:
        """The models that this process serves."""
        return self._engine_service.models

    @property
    def failed(self) -> bool:
        """Whether the process cannot continue: it must not end with exit code 0."""
        return self.pipeline.failure.failed

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
            self.pipeline.failure.log_unavailable(error)
            raise SystemExit(EX_FAILURE) from error
        service.fail_fast = self.app.backend.fail_fast = True
        self.app.conf.worker_soft_shutdown_timeout = 0.0  # Celery would sleep for this time; `finish_within` does not
        self.pipeline.connect(service, self.app.backend, stop_probes=self._stop_probes, flush_traces=flush_traces)
        if self._probes is not None:
            metrics = self._probes.metrics
            self.pipeline.observers.add(MetricsObserver(metrics))
            service.on_retry = self.app.backend.on_retry = metrics.retried
            metrics.watch(self.pipeline.book, self.held, service.models, self.pipeline.health, self.pipeline.heartbeat)
        self.pipeline.start()
        if self._probes is not None:
            self._probes.watch(self.pipeline.health)

    def _set_up_traces(self) -> Callable[[], None]:
        """Set up OpenTelemetry if the settings ask for it. Returns what sends the last spans."""
        try:
            flush = setup_tracing(self.settings, "headrace-worker")
        except SettingsError as error:
            log.error("worker.traces_failed", error=str(error))
            raise SystemExit(EX_FAILURE) from error
        if (tracer := find_tracer()) is not None:
            from headrace.worker.observability.tracing import JobTraces

            self.pipeline.observers.add(SpanObserver(JobTraces(tracer)))
        return flush

    def register_with_event_loop(self, hub: Hub) -> None:
        """Called by Celery with the loop of the main thread, just before it begins to read the queue."""
        self.pipeline.main_thread.hub = hub

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
        try:
            model = self._engine_service.model_named(model_of(headers.get("delivery_info")))
        except JobFailed as error:
            raise InvalidTaskError(error.message) from error
        delivery = Delivery(
            task=task,
            target=target,
            args=args,
            kwargs=kwargs or {},
            on_done=callback,
            on_accepted=accept_callback,
            time_limit_s=None if grouped else timeout,
            received_at=time.monotonic(),
            model=model,
            jobs=jobs,
            verdict=verdict,
        )
        self.pipeline.observers.received(delivery)
        self.pipeline.book.add(delivery)
        self.pipeline.intake.put(delivery)

    def has_room(self, model: str | None = None) -> bool:
        """Whether another message may be taken for the model; without a name, for any model.

        The limit applies to each model separately, so that jobs that wait for one engine do not block those of another.
        """
        names = self.models.names
        window = max(1, int(self.limit) // len(names))
        names = (model,) if model else names
        return self.pipeline.takes_messages and any(self.pipeline.book.held_jobs(name) < window for name in names)

    def refuse(self, job_ids: Sequence[str], error: JobFailed) -> None:
        """Fail the jobs that a refused message names, unless they may belong to somebody else."""
        self.pipeline.intake.refuse(job_ids, error)

    def revoke(self, request: Any, reason: str) -> None:
        """End the jobs of a message that was revoked or has expired, without disturbing others."""
        if not self.pipeline.cancellation.revoke(request, reason):  # Celery asks before it passes on the message
            args, callback = (request.type, request.id, request.request_dict), request.on_success
            self.on_apply(None, args, callback=callback, verdict=TaskRevokedError(reason))  # type: ignore[arg-type]

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Called by Celery to stop a task of its own, for example chord_unlock. It is short, so it runs to its end."""

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
        self.pipeline.end_process(error)

    def _note_unavailable(self, reason: str) -> None:
        self.app.headrace_unavailable = reason  # `headrace up` ends with it

    def on_close(self) -> None:
        """Called by Celery when a shutdown begins."""
        self.pipeline.close()

    def finish_within(self, seconds: float) -> None:
        """Called in the signal handler of a cold shutdown: running jobs may take this many seconds to finish."""
        self.pipeline.cold_shutdown.finish_within(seconds)

    def on_stop(self) -> None:
        """Called by Celery for a warm shutdown."""
        self.pipeline.shutdown.warm()

    def on_terminate(self) -> None:
        """Called by Celery for a cold shutdown."""
        self.pipeline.shutdown.cold()

    def _stop_probes(self) -> None:
        if self._probes is not None:
            self._probes.stop()

    @property
    def _engine_service(self) -> Service:
        if self._service is None:
            raise RuntimeError("the pool has not been started")
        return self._service

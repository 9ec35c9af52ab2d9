"""Celery's pool interface over the engine: tasks go in as messages come, and end when their results are there.

    main thread      on_apply -> intake queue                       returns at once
    intake thread    known already? -> probation -> Service.submit  one request to Redis for many messages
    load thread      a model that is not loaded and has jobs        while it lasts; worker/engine/registry.py
    engine thread    computes; a finished future -> finisher or writer
    finisher thread  a message of one job: Celery's own tracer      stores its result, sends events
    writer thread    jobs that share a message                      result_writer.py; all that wait in one request
    events thread    text of jobs that stream, as it comes          stream_writer.py; the same
    main thread      a message whose last job is stored             acknowledged; Celery's bookkeeping
    monitor thread   leases, cancels, time limits, heartbeat        worker/jobs/heartbeat.py
    probes thread    /livez, /readyz, /metrics, if there is a port  worker/observability/probes.py

No torch is imported before `on_start`: Celery imports this module to read its command line.
"""

from __future__ import annotations

import itertools
import queue
import signal
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import redis
import structlog
from celery.concurrency.base import BasePool
from celery.concurrency.prefork import _run_ready_callbacks
from celery.exceptions import InvalidTaskError, TaskRevokedError, TimeLimitExceeded
from celery.platforms import EX_FAILURE
from celery.worker import state
from kombu.asynchronous import Hub

from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.errors import JobCancelled, JobError, JobExpired, JobFailed
from headrace.client.wire.keys import tag
from headrace.client.wire.redis import connect, resolve_url
from headrace.client.wire.results import Result, outcome_state
from headrace.client.wire.signing import marked
from headrace.config import Settings, SettingsError
from headrace.config.tracing import find_tracer, setup_tracing
from headrace.worker.engine.errors import EngineStopped, ModelUnavailable
from headrace.worker.jobs.heartbeat import Monitor
from headrace.worker.jobs.quarantine import Candidate, Probation
from headrace.worker.jobs.result_writer import Ended, Writer
from headrace.worker.jobs.service import RETRY_S, Service, cancelled_early, failed, read_group, service_for
from headrace.worker.jobs.store import Store
from headrace.worker.observability.probes import Probes, ProbesError, open_probes
from headrace.worker.queue.permissions import RightsMissing, check_rights, is_forbidden
from headrace.worker.tasks import argument, model_of

if TYPE_CHECKING:
    from headrace.worker.engine.registry import Models
    from headrace.worker.observability.tracing import JobTraces

log = structlog.get_logger("headrace.worker")

T = TypeVar("T")

#: Messages whose records are asked for in one request to Redis.
INTAKE_BATCH = 128

#: How often a shutdown looks whether it is to go faster.
STOP_TICK_S = 0.1
#: A worker's record tells of so many failures.
SHOWN_FAILURES = 10

MAX_ATTEMPTS = (
    "the job was begun {} times and each time the worker process ended before it did, the last time with no other job "
    "in it; the worker's log and the kernel's (memory) have the cause. Submit it again under another id when it is gone"
)


@dataclass(eq=False)
class Delivery:
    """One message on its way through this process."""

    handle: int
    task: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    on_done: Callable[[Any], None]
    on_accepted: Callable[[int, float], None] | None
    time_limit_s: float | None
    received_at: float
    #: Of all its jobs.
    model: str
    #: What the message asks for, by job.
    jobs: Mapping[str, Any]
    #: The jobs that have not ended, as far as no newer message stands for them.
    open: set[str]
    started_at: float | None = None
    #: How its open jobs are to end: it was revoked, or Celery's time limit has passed.
    verdict: TaskRevokedError | TimeLimitExceeded | None = None

    @property
    def grouped(self) -> bool:
        """Whether the jobs share this message: then results are stored by the writer, under their own ids."""
        return self.task == GROUP_TASK_NAME

    @property
    def request(self) -> Any:
        """Celery's Request, which owns the callbacks."""
        return getattr(self.on_done, "__self__", None)

    def give_back(self) -> None:
        """Put the message back into its queue; call it in the main thread."""
        if (request := self.request) is not None:
            request.reject(requeue=True)

    @property
    def tag(self) -> str | None:
        """The message's delivery tag, under which its lease stands."""
        message = getattr(self.request, "message", None)
        return getattr(message, "delivery_tag", None)


@dataclass(frozen=True)
class Refusal:
    """Jobs that a refused message named, and how they are to end."""

    job_ids: Sequence[str]
    error: JobFailed


class EnginePool(BasePool):
    """Hands tasks to the engine and their outcomes to Celery's tracer.

    `-c` is the number of jobs held, running and waiting together, in equal parts for each model; slots are
    HEADRACE_SLOTS. A message is taken while fewer are held, so that those of the last one may be too many.
    """

    body_can_be_buffer = True
    #: Stopping waits for the engine; a signal handler must not.
    signal_safe = False

    def __init__(self, *args: Any, service: Service | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: Settings = self.app.headrace_settings
        self._service = service
        self._hub: Hub | None = None
        self._handles = itertools.count(1)
        self._lock = threading.Lock()
        self._probation = Probation(self.settings.slots, self.settings.max_attempts)
        self._deliveries: dict[int, Delivery] = {}
        self._by_job: dict[str, Delivery] = {}
        self._intake: queue.SimpleQueue[Delivery | Refusal | Literal["look", "stop"]] = queue.SimpleQueue()
        self._main_calls: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._closing = self._cold = self._ended = self._forbidden = self._blameless = False
        self._takes = True
        #: When rows that have not finished are given up, by the monotonic clock.
        self._rows_until = float("inf")
        #: The engine died: the process must not end as if all were well.
        self.failed = False
        #: How many jobs ended in each state.
        self.finished: dict[str, int] = {"succeeded": 0, "failed": 0, "cancelled": 0, "expired": 0}
        #: The last jobs that failed, as the worker's record tells of them, by model.
        self.failures: defaultdict[str, deque[dict[str, str | float]]] = defaultdict(
            lambda: deque(maxlen=SHOWN_FAILURES)
        )
        self._probes: Probes | None = None
        self._traces: JobTraces | None = None

    @property
    def models(self) -> Models:
        """The models that this process serves."""
        return self._engine_service.models

    # --- Celery's side, in the main thread -------------------------------------------------------------------------

    def on_start(self) -> None:
        """Load the models. Celery connects to the broker after this, so nothing is taken from the queues before."""
        try:
            self._probes = open_probes(self.settings)
        except ProbesError as error:
            log.error("worker.probes_failed", error=str(error))
            raise SystemExit(EX_FAILURE) from error
        self._open_traces()
        self._service = self._service or service_for(self.settings)
        self._service.models.on_fatal = self._on_fatal
        try:
            self._service.models.start()
        except ModelUnavailable as error:
            # ModelError and the like say what to do; the process ends with that line and no traceback.
            self._tell_unavailable(error)
            raise SystemExit(EX_FAILURE) from error
        self._service.gives_up = self.app.backend.gives_up = True
        self.app.conf.worker_soft_shutdown_timeout = 0.0  # Celery would sleep it through; `finish_within` does not
        self._finishers = ThreadPoolExecutor(2, thread_name_prefix="headrace-finish")
        self._others = ThreadPoolExecutor(2, thread_name_prefix="headrace-other")
        self._taker = threading.Thread(target=self._take_in, name="headrace-intake", daemon=True)
        self._taker.start()
        self._writer = Writer(self._service, self.app.backend.record, self._on_stored, self._on_fatal)
        self._writer.start()
        self.monitor = Monitor(self, self._service.models, self._service.store, self.settings)
        self.monitor.start()
        if self._probes is not None:
            self._probes.watch(self.monitor)
            self._probes.metrics.watch(self, self._service.models, self.monitor)
            self._service.on_retry = self.app.backend.on_retry = self._probes.metrics.retried

    def _open_traces(self) -> None:
        try:
            self._flush_traces = setup_tracing(self.settings, "headrace-worker")
        except SettingsError as error:
            log.error("worker.traces_failed", error=str(error))
            raise SystemExit(EX_FAILURE) from error
        if (tracer := find_tracer()) is not None:
            from headrace.worker.observability.tracing import JobTraces

            self._traces = JobTraces(tracer)

    def register_with_event_loop(self, hub: Hub) -> None:
        """Remember the loop of the main thread: Celery's accept and finish bookkeeping runs there."""
        self._hub = hub

    @property
    def consuming(self) -> bool:
        """Whether Celery reads the queue: it makes its loop known just before it begins."""
        return self._hub is not None

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
        """Take a task. Must not block: remote control and acknowledgements run in the same thread.

        Celery's time limits are kept for messages of one job. Where several share one, `expires_at` of each counts.
        With a verdict nothing is computed: its jobs end so.
        """
        task, job_id, headers = args[:3]
        # Celery has decoded the body already and keeps it in the request's headers.
        given = argument(task, headers.get("args"), headers.get("kwargs"))
        grouped = task == GROUP_TASK_NAME
        jobs = read_group(given) if grouped else {job_id: given}
        if not jobs:
            raise InvalidTaskError("it names no job")
        delivery = Delivery(
            handle=next(self._handles),
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
            open=set(jobs),
            verdict=verdict,
        )
        if self._probes is not None and headers.get("delivery_info", {}).get("redelivered"):
            self._probes.metrics.redelivered(delivery.model)
        with self._lock:
            self._deliveries[delivery.handle] = delivery
        self._intake.put(delivery)

    def has_room(self, model: str | None = None) -> bool:
        """Whether another message may be taken from the queue of a model, or of any.

        Each model has a window of its own: jobs that wait here for one engine must not keep those of another out.
        """
        names = self.models.names
        window = max(1, int(self.limit) // len(names))
        return self._takes and any(self.held(name) < window for name in ([model] if model else names))

    def held(self, model: str) -> int:
        """How many jobs of a model are here, running or not."""
        with self._lock:
            return sum(len(delivery.open) for delivery in self._deliveries.values() if delivery.model == model)

    def take_messages(self, on: bool) -> None:
        """Take messages from the queue, or none: those of an engine that does not come on would only wait here."""
        self._takes = on
        self._on_main(lambda: None)  # wakes the main loop, which then asks

    def refuse(self, job_ids: Sequence[str], error: JobFailed) -> None:
        """Fail jobs whose message is not worked on, as far as it is certain that they are not somebody else's."""
        if job_ids:
            self._intake.put(Refusal(job_ids, error))

    def revoke(self, request: Any, reason: str) -> None:
        """End the jobs of a message that was revoked, or that came too late for Celery; no neighbour notices.

        As with all jobs, their ends are stored first, however long Redis takes, and then the message is acknowledged.
        """
        verdict = TaskRevokedError(reason)
        held = [delivery for delivery in self.deliveries() if delivery.request is request]
        for delivery in held:
            self._end_jobs(delivery, verdict)
        if not held:  # Celery asks before it hands the message over
            name = (request.type, request.id, request.request_dict)
            self.on_apply(None, name, callback=request.on_success, verdict=verdict)  # type: ignore[arg-type]

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Called by Celery to stop a task that is not ours, say chord_unlock: they end by themselves, and soon."""

    def grow(self, n: int = 1) -> None:
        """Not possible: one process is one engine for each model."""
        raise NotImplementedError("EnginePool cannot grow: set HEADRACE_SLOTS, or start another worker")

    def shrink(self, n: int = 1) -> None:
        """Not possible: one process is one engine for each model."""
        raise NotImplementedError("EnginePool cannot shrink: set HEADRACE_SLOTS, or stop a worker")

    def on_close(self) -> None:
        """Called first at shutdown."""
        self._closing = True

    def finish_within(self, seconds: float) -> None:
        """Called in the signal handler of a cold shutdown: rows that run have so long to finish."""
        self._cold = True
        self._rows_until = min(self._rows_until, time.monotonic() + seconds)

    def on_stop(self) -> None:
        """Warm shutdown: rows that run are finished.

        Celery calls this in the signal handler of a cold one too, where the thread may hold a lock that is needed; then
        `on_terminate` follows.
        """
        if not self._cold:
            self._end()

    def on_terminate(self) -> None:
        """Cold shutdown: rows that run are finished if they are done in time."""
        self._end()

    def _end(self) -> None:
        """The order matters:

        1. no intake, and jobs without a slot are let go: waiting for them would make the shutdown as long as the queue;
        2. rows that run are finished, or given up when it is time, and results stored, however long Redis takes;
        3. acknowledgements are flushed by hand, as the main loop no longer turns: else finished jobs would run again;
        4. leases are renewed until then, and the worker's record goes last.

        Messages let go are put back one by one: after a reconnect the channel does not know them all any more. One of
        several jobs goes back whole; those that have ended are known by their results when it comes again. If it waits
        so long that those have expired, they are computed again: that costs time, and gives what it gave before.
        Where Redis does not answer, the monitor ends the process.
        """
        if self._ended:
            return
        self._closing = self._ended = True
        if self.failed:
            self._rows_until = 0.0
        self._hurry_on_signals()
        self._intake.put("stop")
        self._taker.join()
        self._finish_rows()
        self._finishers.shutdown()
        self._writer.stop()
        self._engine_service.events.stop()
        self._others.shutdown(cancel_futures=True)
        self._run_main_calls()
        if self._hub is not None:
            _run_ready_callbacks(self._hub)
        left = self.deliveries()
        for delivery in left:
            delivery.give_back()
        open_jobs = {job_id for delivery in left for job_id in delivery.open}
        # Those that were inside when the engine died are what it may have died of.
        died = self.failed and not self._blameless
        attempted = set() if died else self._probation.inside() & open_jobs
        self._ask(lambda store: store.returned(open_jobs, attempted))
        self.monitor.stop()
        if self._probes is not None:
            self._probes.stop()
        if self._traces is not None:
            self._traces.returned(open_jobs)
        self._flush_traces()
        log.info("worker.stopped", returned=len(left), **self.finished)

    def _hurry_on_signals(self) -> None:
        """From now on a signal means that enough was waited for: what runs goes back too."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
                signal.signal(number, lambda *_: self.finish_within(0))

    def _finish_rows(self) -> None:
        stop = self.models.stop
        finishing = threading.Thread(target=stop, kwargs={"finish": True, "drop_waiting": True}, daemon=True)
        finishing.start()
        while finishing.is_alive() and time.monotonic() < self._rows_until:
            finishing.join(STOP_TICK_S)
        if finishing.is_alive():
            threading.Thread(target=stop, daemon=True).start()  # two may wait for the end
            finishing.join()

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        stats = self.models.stats().values()
        counts = {name: sum(getattr(each, name) for each in stats) for name in ("slots", "running", "waiting")}
        return info | counts

    # --- intake thread ---------------------------------------------------------------------------------------------

    def _take_in(self) -> None:
        try:
            self._take_batches()
        except BaseException as error:  # without this thread the worker would look alive and take nothing
            self._on_fatal(error)

    def _take_batches(self) -> None:
        going = True
        while going:
            items = [self._intake.get()]
            while len(items) < INTAKE_BATCH and not self._intake.empty():
                items.append(self._intake.get())
            going = "stop" not in items
            self._admit([item for item in items if isinstance(item, Delivery)])
            for refusal in [item for item in items if isinstance(item, Refusal)]:
                self._fail_refused(refusal)
            if going:
                self.models.unload_idle({delivery.model for delivery in self.deliveries()})
                self._let_in()

    def look(self) -> None:
        """Let in whose model has been loaded, and unload what has been idle."""
        self._intake.put("look")

    def _adopt(self, delivery: Delivery) -> list[str]:
        """Let the message stand for its jobs. Returns those that are new here.

        The others came before: they go on, and their outcomes go to the newer message.
        """
        new, over = [], []
        with self._lock:
            for job_id in delivery.jobs:  # in their order
                present = self._by_job.get(job_id)
                self._by_job[job_id] = delivery
                if present is None:
                    new.append(job_id)
                    continue
                delivery.started_at = delivery.started_at or present.started_at
                if self._was_last(present, job_id):
                    over.append(present)
        for present in over:
            self._supersede(present, delivery)
        if adopted := len(delivery.open) - len(new):
            log.info("message.adopted", message_id=delivery.args[1], jobs=adopted)
            if delivery.started_at is not None:
                self._accepted(delivery)
        return new

    def _was_last(self, delivery: Delivery, job_id: str) -> bool:
        """Take a job out of a message, and the message out of the books if none is left. Needs the lock."""
        delivery.open.discard(job_id)
        if not delivery.open:
            self._deliveries.pop(delivery.handle, None)
        return not delivery.open

    def _supersede(self, old: Delivery, new: Delivery) -> None:
        """Let go of a message because a newer one stands for all its jobs."""
        if old.request is None:
            return
        if old.args[1] != new.args[1]:
            self._on_main(state.task_ready, old.request)  # Celery knows it by another id
        if old.tag != new.tag:
            self._on_main(old.request.acknowledge)  # another copy, not the same one delivered again

    def _admit(self, batch: list[Delivery]) -> None:
        arrived: dict[str, tuple[Any, str]] = {}
        for delivery in batch:
            if delivery.task not in (TASK_NAME, GROUP_TASK_NAME):  # Celery's own, say chord_unlock
                if self._adopt(delivery):
                    self._accepted(delivery)
                    self._others.submit(self._finish, delivery)
                continue
            arrived |= {job_id: (delivery.jobs[job_id], delivery.model) for job_id in self._adopt(delivery)}
            log.info("message.accepted", message_id=delivery.args[1], jobs=len(delivery.jobs))
        claims = self._ask(lambda store: store.claim(list(arrived))) if arrived else []
        if claims is None:
            return  # shutting down without Redis: the messages keep their leases and go to another worker
        over = []
        for (job_id, (wire, model)), claim in zip(arrived.items(), claims, strict=True):
            if claim.finished:
                over.append(job_id)
                continue
            self._trace(job_id, wire, claim.attempts)
            if claim.cancelled or self._is_revoked(job_id):
                self._on_outcome(job_id, failed(cancelled_early()))
            elif claim.attempts >= self.settings.max_attempts:
                self._on_outcome(job_id, failed(JobFailed("max_attempts", MAX_ATTEMPTS.format(claim.attempts))))
            else:
                self._probation.put(Candidate(job_id, wire, claim.attempts, model))
        if over:
            log.info("jobs.finished_before", jobs=len(over))
            self._ask(lambda store: store.ended(over))
            self._settle(over)

    def _trace(self, job_id: str, wire: Any, attempts: int) -> None:
        with self._lock:
            delivery = self._by_job.get(job_id)
        if self._traces is not None and delivery is not None:
            self._traces.arrived(
                job_id,
                wire,
                delivery.args[2],
                model=delivery.model,
                grouped=delivery.grouped,
                ago_s=time.monotonic() - delivery.received_at,
                attempt=attempts + 1,
            )

    def _fail_refused(self, refusal: Refusal) -> None:
        """Tell who waits for the jobs of a refused message that nothing comes, and end nobody else's job.

        Anybody may name any job in a message. One that is here goes on. Where jobs are signed, only those are failed
        whose submitter wrote a record and has no key, and that nobody computes: it is his message that was refused.
        """
        with self._lock:
            job_ids = [job_id for job_id in refusal.job_ids if job_id not in self._by_job]
        if job_ids and (keys := self.settings.signing_keys):
            claims = self._ask(lambda store: store.claim(job_ids)) or []
            known = zip(job_ids, claims, strict=False)  # none where this process ends without Redis
            job_ids = [job_id for job_id, c in known if c.state == "queued" and not marked(keys, job_id, c.mark)]
        for job_id in job_ids:
            self._writer.put(job_id, failed(refusal.error))

    def _is_revoked(self, job_id: str) -> bool:
        """Whether Celery was told to revoke the job, or the message that it came in."""
        with self._lock:
            delivery = self._by_job.get(job_id)
        return job_id in state.revoked or (delivery is not None and delivery.verdict is not None)

    def _count_attempts(self, job_ids: list[str]) -> bool:
        return self._ask(lambda store: store.attempt(job_ids)) is not None

    def _let_in(self) -> None:
        """Give the engines the jobs whose turn it is. Their attempt is counted before: they may end this process."""
        self.models.fetch(self._probation.models(), self.look)
        while candidates := self._probation.admit(self.models.loaded):
            if not self._count_attempts([candidate.job_id for candidate in candidates]):
                return
            for candidate in candidates:
                if candidate.attempts:
                    log.warning("job.on_trial", job_id=candidate.job_id, attempts=candidate.attempts)
                try:
                    self._begin(candidate)
                except Exception as error:
                    job_id = candidate.job_id
                    log.error("job.intake_failed", job_id=job_id, error=repr(error), trace=traceback.format_exc())
                    message = f"the message cannot be worked on: {type(error).__name__}"
                    self._on_outcome(job_id, failed(JobFailed("invalid_request", message)))

    def _begin(self, candidate: Candidate) -> None:
        job_id, model = candidate.job_id, candidate.model
        try:
            future = self._engine_service.submit(job_id, candidate.wire, model, lambda: self._on_start(job_id))
        except EngineStopped:
            return  # `_end` gives the message back
        future.add_done_callback(lambda done: self._on_outcome(job_id, done))

    def _ask(self, question: Callable[[Store], T]) -> T | None:
        """Ask the store until Redis answers; None if the worker is closing and it does not."""
        while True:
            try:
                return question(self._engine_service.store)
            except redis.RedisError as error:
                if self._closing:
                    return None
                if is_forbidden(error):
                    raise
                log.warning("redis.unanswered", error=str(error))
                time.sleep(RETRY_S)

    # --- engine thread ---------------------------------------------------------------------------------------------

    def _on_start(self, job_id: str) -> None:
        """The job has a slot: only now is the task active for Celery."""
        with self._lock:
            delivery = self._by_job.get(job_id)
        if delivery is not None:
            self.monitor.note_started(job_id)
            if self._traces is not None:
                self._traces.started(job_id)
            if delivery.started_at is None:
                self._accepted(delivery)

    def _on_outcome(self, job_id: str, future: Future[Result]) -> None:
        error = future.exception()
        if isinstance(error, EngineStopped):
            return  # the message stays unacknowledged, so another worker gets it
        with self._lock:
            delivery = self._by_job.get(job_id)
        if delivery is None:
            return
        if self._traces is not None:
            self._traces.computed(job_id)
        verdict = delivery.verdict if isinstance(error, JobCancelled) else None
        if verdict is None and isinstance(error, JobCancelled) and delivery.grouped and job_id in state.revoked:
            verdict = TaskRevokedError("revoked")
        if delivery.grouped:
            self._writer.put(job_id, failed(verdict) if verdict else future)
        elif verdict:
            self._finishers.submit(self._conclude, delivery, verdict)
        else:
            self._engine_service.ready(job_id, future)
            self._finishers.submit(self._finish, delivery, future)

    def _on_fatal(self, error: BaseException) -> None:
        """The engine is dead, or a thread that all needs: unacknowledged messages go to another worker."""
        self.end_process(error)

    def end_process(self, error: BaseException) -> None:
        """End this process, as it cannot go on. May be called from any thread, and again."""
        known, self._forbidden = self._forbidden, is_forbidden(error)
        self._blameless = self._forbidden or isinstance(error, ModelUnavailable)
        self.failed = True
        state.should_stop = EX_FAILURE  # of `should_terminate` Celery makes an exit code of 0
        if isinstance(error, ModelUnavailable):
            self._tell_unavailable(error)
        elif not self._forbidden:
            log.error("worker.failed", error=repr(error), trace=traceback.format_exc())
        elif not known:
            log.error("redis.forbidden", error=str(error), hint=self._missing_rights())

    def _tell_unavailable(self, error: ModelUnavailable) -> None:
        model, kind = self.settings.models.get(error.name, error.name), type(error.reason).__name__
        log.error("worker.model_failed", model=model, error=str(error), kind=kind)
        self.app.headrace_unavailable = str(error)  # `headrace up` ends with it

    def _missing_rights(self) -> str:
        """What to do about a right that was missing; it names all that are, where Redis still says."""
        try:
            with connect(resolve_url(self.settings)) as connection:
                check_rights(connection, self.models.names)
        except (RightsMissing, redis.RedisError) as missing:
            return str(missing)
        return str(RightsMissing(["do that"]))

    # --- finisher threads and writer thread ------------------------------------------------------------------------

    def _finish(self, delivery: Delivery, future: Future[Result] | None = None) -> None:
        """Run Celery's tracer, whose task body picks the outcome up, and hand what it says to the newest message."""
        job_id = delivery.args[1]
        try:
            if delivery.started_at is None:
                self._accepted(delivery)
            failed_, value, runtime = delivery.target(*delivery.args, **delivery.kwargs)
            if future is not None:
                with self._lock:
                    current = self._by_job.get(job_id, delivery)
                runtime = time.monotonic() - (current.started_at or current.received_at)
                self._note_outcome(job_id, future, log.info, seconds=round(runtime, 3))
                value = value if failed_ else "<redacted>"  # what goes into events; the result itself is stored
                self._ask(lambda store: store.ended([job_id]))
            self._settle([job_id], (failed_, value, runtime))
        except BaseException as error:
            # No message may be dropped unsettled: it would hold a place in the window of this worker for ever.
            log.error("job.finish_failed", job_id=job_id, error=repr(error), trace=traceback.format_exc())
            if future is not None:  # what Celery could not store, or what follows it: the job has ended all the same
                self._writer.put(job_id, future)
                return
            with self._lock:
                current = self._by_job.pop(job_id, delivery)
                self._deliveries.pop(current.handle, None)
            self._on_main(current.give_back)

    def _conclude(self, delivery: Delivery, verdict: TaskRevokedError | TimeLimitExceeded) -> None:
        """End a job of a message of its own as Celery would, but in a thread that may wait for Redis."""
        job_id = delivery.args[1]
        backend, context = self.app.backend, delivery.request._context
        try:
            if isinstance(verdict, TaskRevokedError):
                backend.mark_as_revoked(job_id, str(verdict), request=context)
            else:
                backend.mark_as_failure(job_id, verdict, request=context)
            self._ask(lambda store: store.ended([job_id]))
            self._on_stored([(job_id, failed(verdict))])
        except BaseException as error:
            log.error("job.finish_failed", job_id=job_id, error=repr(error), trace=traceback.format_exc())
            self._writer.put(job_id, failed(verdict))

    def _on_stored(self, ended: Sequence[Ended]) -> None:
        for job_id, future in ended:
            # Of a flood only the messages are in the log, and what went wrong: a line costs more than a short job.
            self._note_outcome(job_id, future, log.debug)
        self._settle([job_id for job_id, _ in ended])

    def _settle(self, job_ids: Sequence[str], traced: tuple[bool, Any, float] | None = None) -> None:
        """Take jobs whose results are stored out of the books; a message ends with the last of its jobs."""
        over = []
        self._engine_service.events.end(job_ids)
        # Only now: if the next one kills the process, an end that was not stored yet would be an attempt.
        if True in [self._probation.leave(job_id) for job_id in job_ids]:
            self._intake.put("look")
        with self._lock:
            for job_id in job_ids:
                delivery = self._by_job.pop(job_id, None)
                if delivery is not None and job_id in delivery.open and self._was_last(delivery, job_id):
                    over.append(delivery)
        for delivery in over:
            self._complete(delivery, traced)
        if not over:
            self._on_main(lambda: None)  # wakes the main loop: there may be room for another message

    def _complete(self, delivery: Delivery, traced: tuple[bool, Any, float] | None = None) -> None:
        """Tell Celery that a message is done; `traced` is what its tracer said, if it ran."""
        with self._lock:
            self._deliveries.pop(delivery.handle, None)
        if delivery.started_at is None:
            self._accepted(delivery)
        if delivery.grouped and delivery.verdict is None:
            runtime = time.monotonic() - (delivery.started_at or delivery.received_at)
            jobs = len(delivery.jobs)
            log.info("message.finished", message_id=delivery.args[1], jobs=jobs, seconds=round(runtime, 3))
            self._on_main(delivery.on_done, (False, f"{jobs} jobs", runtime))
        elif traced is not None:
            self._on_main(delivery.on_done, traced)
        elif (request := delivery.request) is not None:  # its end is stored already
            self._on_main(state.task_ready, request)
            self._on_main(request.acknowledge)

    def _accepted(self, delivery: Delivery) -> None:
        delivery.started_at = delivery.started_at or time.monotonic()
        if delivery.on_accepted is not None:
            self._on_main(delivery.on_accepted, delivery.handle, delivery.started_at)

    def _on_main(self, function: Callable[..., Any], *args: Any) -> None:
        """Run Celery's bookkeeping in the main thread, where remote control reads it, in order: the hub keeps none."""
        self._main_calls.append((function, args))
        if self._hub is None:
            self._run_main_calls()
        else:
            self._hub.call_soon(self._run_main_calls)  # type: ignore[no-untyped-call]

    def _run_main_calls(self) -> None:
        while self._main_calls:
            function, args = self._main_calls.popleft()
            function(*args)

    def _note_outcome(
        self, job_id: str, future: Future[Result], log_success: Callable[..., Any], **details: Any
    ) -> None:
        """Count how the job ended and log it."""
        error = future.exception()
        if isinstance(error, TaskRevokedError):
            error = JobCancelled(message="revoked")
        elif isinstance(error, TimeLimitExceeded):
            error = JobExpired(message="time limit")
        if self._traces is not None and (trace_id := self._traces.ended(job_id, error or future.result())):
            details["trace_id"] = trace_id
        if error is not None and not isinstance(error, JobError):
            return  # it has been logged where it was met
        ended = error if isinstance(error, JobError) else future.result()
        model = self._model_of(job_id)
        if self._probes is not None:
            self._probes.metrics.ended(ended, model)
        outcome = outcome_state(ended)
        self.finished[outcome] += 1
        if isinstance(error, JobFailed):
            self.failures[model].append({"job": tag(job_id), "code": error.code, "at": round(time.time(), 1)})
        details |= {"job_id": job_id, "state": outcome, "model": model}
        if isinstance(error, JobError):
            log.info("job.finished", **details, code=error.code)
        else:
            usage = future.result().usage
            details |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
            log_success("job.finished", **details)

    def _model_of(self, job_id: str) -> str:
        with self._lock:
            delivery = self._by_job.get(job_id)
        return self.models.names[0] if delivery is None else delivery.model

    # --- read by the monitor ---------------------------------------------------------------------------------------

    def deliveries(self) -> list[Delivery]:
        """The messages that this process holds."""
        with self._lock:
            return list(self._deliveries.values())

    def open_jobs(self) -> list[str]:
        """The jobs that have not ended."""
        with self._lock:
            return list(self._by_job)

    def revoked_jobs(self) -> list[str]:
        """Open jobs that are to end because they, or their messages, were revoked or took longer than they may."""
        with self._lock:
            held = list(self._by_job.items())
        return [job_id for job_id, d in held if d.verdict is not None or (d.grouped and job_id in state.revoked)]

    def let_go(self, job_ids: Sequence[str]) -> None:
        """Jobs that others have ended, after the lease here ran out: they are computed no further, and nothing of them
        is stored. Raises redis.RedisError, and has done nothing then.
        """
        self._engine_service.store.ended(job_ids)
        log.info("jobs.finished_before", jobs=len(job_ids))
        self._settle(job_ids)  # first: what the engine says of them from now on is about nobody's job
        if self._traces is not None:
            self._traces.returned(job_ids)
        for job_id in job_ids:
            self.cancel(job_id)

    def time_out(self, delivery: Delivery) -> None:
        """Celery's time limit of the task has passed."""
        self._end_jobs(delivery, TimeLimitExceeded(delivery.time_limit_s))

    def _end_jobs(self, delivery: Delivery, verdict: TaskRevokedError | TimeLimitExceeded) -> None:
        delivery.verdict = verdict
        for job_id in list(delivery.open):
            self.cancel(job_id)

    def cancel(self, job_id: str) -> None:
        """End a job that runs at the next step, and one that waits now."""
        if self._probation.withdraw(job_id):
            self._on_outcome(job_id, failed(cancelled_early()))
        else:
            self.models.cancel(job_id)

    @property
    def _engine_service(self) -> Service:
        if self._service is None:
            raise RuntimeError("the pool has not been started")
        return self._service

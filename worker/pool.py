"""Celery's pool interface over the engine: tasks go in as messages come, and end when their results are there.

    main thread      on_apply -> intake queue                       returns at once
    intake thread    known already? -> Service.submit               one request to Redis for many messages
    engine thread    computes; a finished future -> finisher or writer
    finisher thread  a message of one job: Celery's own tracer      stores its result, sends events
    writer thread    jobs that share a message                      worker/writer.py; all that wait in one request
    main thread      a message whose last job is stored             acknowledged; Celery's bookkeeping
    monitor thread   leases, cancels, time limits, heartbeat        worker/monitor.py

No torch is imported before `on_start`: Celery imports this module to read its command line.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
import structlog
from celery.concurrency.base import BasePool
from celery.concurrency.prefork import _run_ready_callbacks
from celery.exceptions import InvalidTaskError
from celery.platforms import EX_FAILURE
from celery.worker import state
from kombu.asynchronous import Hub

from client.errors import JobError, JobFailed
from client.records import outcome_state
from client.schema import GROUP_TASK_NAME, TASK_NAME, Result
from config import Settings
from worker.errors import EngineStopped
from worker.monitor import Monitor
from worker.service import RETRY_S, Service, cancelled_early, failed, read_group, service_for
from worker.store import Claim, Store
from worker.tasks import argument
from worker.writer import Ended, Writer

log = structlog.get_logger("millrace.worker")

T = TypeVar("T")

#: Messages whose records are asked for in one request to Redis.
INTAKE_BATCH = 128


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
    on_timeout: Callable[[bool, float], None] | None
    time_limit_s: float | None
    received_at: float
    #: What the message asks for, by job.
    jobs: Mapping[str, Any]
    #: The jobs that have not ended, as far as no newer message stands for them.
    open: set[str]
    started_at: float | None = None
    #: Celery has ended the task by itself (revoked, time limit): it is not to hear of it again.
    dropped: bool = False

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


class EnginePool(BasePool):
    """Hands tasks to the engine and their outcomes to Celery's tracer.

    `-c` is the number of jobs held, running and waiting together; slots are MILLRACE_SLOTS. A message is taken while
    fewer are held, so that those of the last one may be too many.
    """

    body_can_be_buffer = True
    #: Stopping waits for the engine; a signal handler must not.
    signal_safe = False

    def __init__(self, *args: Any, service: Service | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings: Settings = self.app.millrace_settings
        self._service = service
        self._hub: Hub | None = None
        self._handles = itertools.count(1)
        self._lock = threading.Lock()
        self._deliveries: dict[int, Delivery] = {}
        self._by_job: dict[str, Delivery] = {}
        self._intake: queue.SimpleQueue[Delivery | None] = queue.SimpleQueue()
        self._main_calls: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._closing = False
        #: The engine died: the process must not end as if all were well.
        self.failed = False
        #: How many jobs ended in each state.
        self.finished: dict[str, int] = {"succeeded": 0, "failed": 0, "cancelled": 0, "expired": 0}

    # --- Celery's side, in the main thread -------------------------------------------------------------------------

    def on_start(self) -> None:
        """Load the model. Celery connects to the broker after this, so nothing is taken from the queue before."""
        try:
            self._service = self._service or service_for(self.settings)
        except Exception as error:
            # ModelError and the like say what to do; the process ends with that line and no traceback.
            log.error("worker.model_failed", model=self.settings.model, error=str(error), kind=type(error).__name__)
            raise SystemExit(EX_FAILURE) from error
        self._service.engine.on_fatal = self._on_fatal
        self._finishers = ThreadPoolExecutor(2, thread_name_prefix="millrace-finish")
        self._others = ThreadPoolExecutor(2, thread_name_prefix="millrace-other")
        self._taker = threading.Thread(target=self._take_in, name="millrace-intake", daemon=True)
        self._taker.start()
        self._writer = Writer(self._service, self.app.backend.record, self._on_stored, self._on_fatal)
        self._writer.start()
        self.monitor = Monitor(self, self._service.engine, self._service.store, self.settings)
        self.monitor.start()

    def register_with_event_loop(self, hub: Hub) -> None:
        """Remember the loop of the main thread: Celery's accept and finish bookkeeping runs there."""
        self._hub = hub

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        callback: Callable[[Any], None] = lambda _: None,
        accept_callback: Callable[[int, float], None] | None = None,
        timeout_callback: Callable[[bool, float], None] | None = None,
        timeout: float | None = None,
        **_: Any,
    ) -> None:
        """Take a task. Must not block: remote control and acknowledgements run in the same thread.

        Celery's time limits are kept for messages of one job. Where several share one, `expires_at` of each counts.
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
            on_timeout=timeout_callback,
            time_limit_s=None if grouped else timeout,
            received_at=time.monotonic(),
            jobs=jobs,
            open=set(jobs),
        )
        with self._lock:
            self._deliveries[delivery.handle] = delivery
        self._intake.put(delivery)

    def has_room(self) -> bool:
        """Whether another message may be taken from the queue."""
        with self._lock:
            return sum(len(delivery.open) for delivery in self._deliveries.values()) < int(self.limit)

    def refuse(self, job_ids: Sequence[str], reason: str) -> None:
        """Fail jobs whose message cannot be worked on."""
        for job_id in job_ids:
            self._writer.put(job_id, failed(JobFailed("unreadable_message", f"the message was refused: {reason}")))

    def terminate_job(self, pid: int, signal: Any = None) -> None:  # noqa: ARG002
        """Celery's revoke(terminate=True) of a running task; `pid` is the handle that `on_accepted` was given.

        Celery stores REVOKED and acknowledges by itself; here only the row stops, and no neighbour notices.
        """
        with self._lock:
            delivery = self._deliveries.get(pid)
        if delivery is not None:
            self._drop(delivery)

    def grow(self, n: int = 1) -> None:
        """Not possible: one process is one model."""
        raise NotImplementedError("EnginePool cannot grow: set MILLRACE_SLOTS, or start another worker")

    def shrink(self, n: int = 1) -> None:
        """Not possible: one process is one model."""
        raise NotImplementedError("EnginePool cannot shrink: set MILLRACE_SLOTS, or stop a worker")

    def on_close(self) -> None:
        """Called first at shutdown."""
        self._closing = True

    def on_stop(self) -> None:
        """Warm shutdown. The order matters:

        1. no intake, and jobs without a slot are let go: waiting for them would make the shutdown as long as the queue;
        2. rows that run are finished, and their results stored, however long Redis takes;
        3. acknowledgements are flushed by hand, as the main loop no longer turns: else finished jobs would run again;
        4. leases are renewed until then, and the worker's record goes last.

        Messages let go are put back one by one: after a reconnect the channel does not know them all any more. One of
        several jobs goes back whole; those that have ended are known by their results when it comes again.
        """
        self._closing = True
        self._intake.put(None)
        self._taker.join()
        engine = self._engine_service.engine
        engine.stop(finish=True, drop_waiting=True)
        self._finishers.shutdown()
        self._writer.stop()
        self._others.shutdown(cancel_futures=True)
        self._run_main_calls()
        if self._hub is not None:
            _run_ready_callbacks(self._hub)
        left = self.deliveries()
        for delivery in left:
            delivery.give_back()
        self._ask(lambda store: store.returned([job_id for delivery in left for job_id in delivery.open]))
        self.monitor.stop()
        log.info("worker.stopped", returned=len(left), **self.finished)

    def on_terminate(self) -> None:
        """Cold shutdown: nothing is finished and nothing acknowledged, so everything goes to other workers."""
        self._closing = True
        self._intake.put(None)
        self._engine_service.engine.stop(finish=False)
        for executor in (self._finishers, self._others):
            executor.shutdown(wait=False, cancel_futures=True)
        self.monitor.stop()

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        stats = self._engine_service.engine.stats()
        return info | {"slots": stats.slots, "running": stats.running, "waiting": stats.waiting}

    # --- intake thread ---------------------------------------------------------------------------------------------

    def _take_in(self) -> None:
        try:
            self._take_batches()
        except BaseException as error:  # without this thread the worker would look alive and take nothing
            self._on_fatal(error)

    def _take_batches(self) -> None:
        while (first := self._intake.get()) is not None:
            batch, end = [first], False
            while len(batch) < INTAKE_BATCH and not self._intake.empty():
                item = self._intake.get()
                if item is None:
                    end = True
                    break
                batch.append(item)
            self._admit(batch)
            if end:
                return

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
        arrived: dict[str, Any] = {}
        for delivery in batch:
            if delivery.task not in (TASK_NAME, GROUP_TASK_NAME):  # Celery's own, say chord_unlock
                if self._adopt(delivery):
                    self._accepted(delivery)
                    self._others.submit(self._finish, delivery)
                continue
            arrived |= {job_id: delivery.jobs[job_id] for job_id in self._adopt(delivery)}
            log.info("message.accepted", message_id=delivery.args[1], jobs=len(delivery.jobs))
        claims = self._ask(lambda store: store.claim(list(arrived))) if arrived else []
        if claims is None:
            return  # shutting down without Redis: the messages keep their leases and go to another worker
        for (job_id, wire), claim in zip(arrived.items(), claims, strict=True):
            try:
                self._begin(job_id, wire, claim)
            except Exception as error:
                log.error("job.intake_failed", job_id=job_id, error=repr(error), trace=traceback.format_exc())
                message = f"the message cannot be worked on: {type(error).__name__}"
                self._on_outcome(job_id, failed(JobFailed("invalid_request", message)))

    def _begin(self, job_id: str, wire: Any, claim: Claim) -> None:
        if claim.finished:
            log.info("job.finished_before", job_id=job_id)
            self._settle([job_id])
            return
        # A plain message whose id was revoked does not come this far; of a job in a group Celery does not know.
        if claim.cancelled or job_id in state.revoked:
            future = failed(cancelled_early())
        else:
            try:
                future = self._engine_service.submit(job_id, wire, lambda: self._on_start(job_id))
            except EngineStopped:
                return  # `on_stop` gives the message back
        future.add_done_callback(lambda done: self._on_outcome(job_id, done))

    def _ask(self, question: Callable[[Store], T]) -> T | None:
        """Ask the store until Redis answers; None if the worker is closing and it does not."""
        while True:
            try:
                return question(self._engine_service.store)
            except redis.RedisError as error:
                if self._closing:
                    return None
                log.warning("redis.unanswered", error=str(error))
                time.sleep(RETRY_S)

    # --- engine thread ---------------------------------------------------------------------------------------------

    def _on_start(self, job_id: str) -> None:
        """The job has a slot: only now is the task active for Celery."""
        with self._lock:
            delivery = self._by_job.get(job_id)
        if delivery is not None:
            self.monitor.note_started(job_id)
            if delivery.started_at is None:
                self._accepted(delivery)

    def _on_outcome(self, job_id: str, future: Future[Result]) -> None:
        with self._lock:
            delivery = self._by_job.get(job_id)
        if delivery is None or isinstance(future.exception(), EngineStopped):
            return  # the message stays unacknowledged, so another worker gets it
        if delivery.grouped:
            self._writer.put(job_id, future)
        elif delivery.dropped:
            self._settle([job_id])
            self._finishers.submit(self._ask, lambda store: store.ended([job_id]))
        else:
            self._engine_service.ready(job_id, future)
            self._finishers.submit(self._finish, delivery, future)

    def _on_fatal(self, error: BaseException) -> None:
        """The engine is dead: end the process, unacknowledged messages go to another worker."""
        log.error("worker.failed", error=repr(error), trace=traceback.format_exc())
        self.failed = True
        state.should_terminate = EX_FAILURE

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
            with self._lock:
                current = self._by_job.pop(job_id, delivery)
                self._deliveries.pop(current.handle, None)
            self._on_main(current.give_back)

    def _on_stored(self, ended: Sequence[Ended]) -> None:
        for job_id, future in ended:
            # Of a flood only the messages are in the log, and what went wrong: a line costs more than a short job.
            self._note_outcome(job_id, future, log.debug)
        self._settle([job_id for job_id, _ in ended])

    def _settle(self, job_ids: Sequence[str], traced: tuple[bool, Any, float] | None = None) -> None:
        """Take jobs whose results are stored out of the books; a message ends with the last of its jobs."""
        over = []
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
        if delivery.dropped:
            return
        if delivery.started_at is None:
            self._accepted(delivery)
        if delivery.grouped:
            runtime = time.monotonic() - (delivery.started_at or delivery.received_at)
            jobs = len(delivery.jobs)
            log.info("message.finished", message_id=delivery.args[1], jobs=jobs, seconds=round(runtime, 3))
            self._on_main(delivery.on_done, (False, f"{jobs} jobs", runtime))
        elif traced is not None:
            self._on_main(delivery.on_done, traced)
        elif (request := delivery.request) is not None:  # a repetition: the stored result is left alone
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
        if error is not None and not isinstance(error, JobError):
            return  # it has been logged where it was met
        outcome = outcome_state(error if isinstance(error, JobError) else future.result())
        self.finished[outcome] += 1
        details |= {"job_id": job_id, "state": outcome}
        if isinstance(error, JobError):
            log.info("job.finished", **details, code=error.code)
        else:
            usage = future.result().usage
            details |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
            log_success("job.finished", **details)

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
        """Open jobs in groups that were revoked by their own id. Celery has stored REVOKED for them."""
        if not state.revoked:
            return []
        with self._lock:
            return [job_id for job_id, d in self._by_job.items() if d.grouped and job_id in state.revoked]

    def time_out(self, delivery: Delivery) -> None:
        """Celery's time limit of the task has passed: stop its row; Celery stores the failure and acknowledges."""
        self._drop(delivery)
        if delivery.on_timeout is not None:
            self._on_main(delivery.on_timeout, False, delivery.time_limit_s)

    def _drop(self, delivery: Delivery) -> None:
        delivery.dropped = True
        for job_id in list(delivery.open):
            self._engine_service.engine.cancel(job_id)

    @property
    def _engine_service(self) -> Service:
        if self._service is None:
            raise RuntimeError("the pool has not been started")
        return self._service

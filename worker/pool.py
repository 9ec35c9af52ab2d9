"""Celery's pool interface over the engine: tasks go in as messages come, and are traced when their result is there.

    main thread      on_apply -> intake queue                       returns at once
    intake thread    known already? -> Service.submit               one request to Redis for many messages
    engine thread    computes; a finished future -> finishers
    finisher thread  Celery's own tracer: result, events, callback  the acknowledgement hops back to the main thread
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
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import redis
import structlog
from celery.concurrency.base import BasePool
from celery.concurrency.prefork import _run_ready_callbacks
from celery.platforms import EX_FAILURE
from celery.worker import state
from kombu.asynchronous import Hub

from client.errors import JobCancelled, JobError, JobFailed
from client.records import outcome_state
from client.schema import TASK_NAME, Result
from config import Settings
from worker.errors import EngineStopped
from worker.monitor import Monitor
from worker.service import RETRY_S, Service, failed, service_for
from worker.store import Claim, Store

log = structlog.get_logger("millrace.worker")

T = TypeVar("T")

#: Messages whose records are asked for in one request to Redis.
INTAKE_BATCH = 128


@dataclass(eq=False)
class Delivery:
    """One message on its way through this process."""

    handle: int
    job_id: str
    task: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    on_done: Callable[[Any], None]
    on_accepted: Callable[[int, float], None] | None
    on_timeout: Callable[[bool, float], None] | None
    time_limit_s: float | None
    received_at: float
    started_at: float | None = None
    #: Celery has ended the task by itself (revoked, time limit): its outcome goes nowhere.
    dropped: bool = False

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

    `-c` is the number of messages held, running and waiting together; slots are MILLRACE_SLOTS.
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
        """Take a task. Must not block: remote control and acknowledgements run in the same thread."""
        delivery = Delivery(
            handle=next(self._handles),
            job_id=args[1],
            task=args[0],
            target=target,
            args=args,
            kwargs=kwargs or {},
            on_done=callback,
            on_accepted=accept_callback,
            on_timeout=timeout_callback,
            time_limit_s=timeout,
            received_at=time.monotonic(),
        )
        self._intake.put(delivery)

    def terminate_job(self, pid: int, signal: Any = None) -> None:  # noqa: ARG002
        """Celery's revoke(terminate=True) of a running task; `pid` is the handle that `on_accepted` was given.

        Celery stores REVOKED and acknowledges by itself; here only the row stops, and no neighbour notices.
        """
        with self._lock:
            delivery = self._deliveries.get(pid)
        if delivery is not None:
            delivery.dropped = True
            self._engine_service.engine.cancel(delivery.job_id)

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
        2. rows that run are finished, and their results stored;
        3. acknowledgements are flushed by hand, as the main loop no longer turns: else finished jobs would run again;
        4. leases are renewed until then, and the worker's record goes last.

        Messages let go are put back one by one: after a reconnect the channel does not know them all any more.
        """
        self._closing = True
        self._intake.put(None)
        self._taker.join()
        engine = self._engine_service.engine
        engine.stop(finish=True, drop_waiting=True)
        self._finishers.shutdown()
        self._others.shutdown(cancel_futures=True)
        self._run_main_calls()
        if self._hub is not None:
            _run_ready_callbacks(self._hub)
        left = self.deliveries()
        for delivery in left:
            delivery.give_back()
        self._ask(lambda store: store.returned([delivery.job_id for delivery in left]))
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
            self._admit([d for d in batch if not self._adopt(d)])
            if end:
                return

    def _adopt(self, delivery: Delivery) -> bool:
        """Whether the job is here already: its message came again, so its outcome goes to the newer message."""
        with self._lock:
            present = self._by_job.get(delivery.job_id)
            self._by_job[delivery.job_id] = delivery
            self._deliveries[delivery.handle] = delivery
            if present is None:
                return False
            self._deliveries.pop(present.handle, None)
            delivery.started_at = present.started_at
        if present.tag != delivery.tag and present.request is not None:
            self._on_main(present.request.acknowledge)  # another copy: the newer one stands for the job from here on
        log.info("job.adopted", job_id=delivery.job_id)
        if delivery.started_at is not None:
            self._accepted(delivery)
        return True

    def _admit(self, batch: list[Delivery]) -> None:
        others = [delivery for delivery in batch if delivery.task != TASK_NAME]
        for delivery in others:  # Celery's own, say chord_unlock: nothing for the engine
            self._accepted(delivery)
            self._others.submit(self._finish, delivery)
        ours = [delivery for delivery in batch if delivery.task == TASK_NAME]
        claims = self._ask(lambda store: store.claim([delivery.job_id for delivery in ours])) if ours else []
        if claims is None:
            return  # shutting down without Redis: the messages keep their leases and go to another worker
        for delivery, claim in zip(ours, claims, strict=True):
            try:
                self._begin(delivery, claim)
            except Exception as error:
                log.error("job.intake_failed", job_id=delivery.job_id, error=repr(error), trace=traceback.format_exc())
                message = f"the message cannot be worked on: {type(error).__name__}"
                self._on_outcome(delivery.job_id, failed(JobFailed("invalid_request", message)))

    def _begin(self, delivery: Delivery, claim: Claim) -> None:
        job_id, service = delivery.job_id, self._engine_service
        if claim.finished:
            log.info("job.finished_before", job_id=job_id)
            self._accepted(delivery)
            self._acknowledge_only(delivery)
            return
        if claim.cancelled:
            future = failed(JobCancelled(message="the job was cancelled before it started"))
        else:
            try:
                future = service.submit(job_id, _first_argument(delivery), lambda: self._on_start(job_id))
            except EngineStopped:
                return  # `on_stop` gives the message back
        log.info("job.accepted", job_id=job_id)
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
            self._accepted(delivery)
            self.monitor.note_started(job_id)

    def _on_outcome(self, job_id: str, future: Future[Result]) -> None:
        with self._lock:
            delivery = self._by_job.get(job_id)
        if delivery is None or isinstance(future.exception(), EngineStopped):
            return  # the message stays unacknowledged, so another worker gets it
        if delivery.dropped:
            self._forget(delivery)
            self._finishers.submit(self._ask, lambda store: store.ended([job_id]))
            return
        self._engine_service.ready(job_id, future)
        self._finishers.submit(self._finish, delivery, future)

    def _on_fatal(self, error: BaseException) -> None:
        """The engine is dead: end the process, unacknowledged messages go to another worker."""
        log.error("worker.failed", error=repr(error), trace=traceback.format_exc())
        self.failed = True
        state.should_terminate = EX_FAILURE

    # --- finisher threads ------------------------------------------------------------------------------------------

    def _finish(self, delivery: Delivery, future: Future[Result] | None = None) -> None:
        """Run Celery's tracer, whose task body picks the outcome up, and hand what it says to the newest message."""
        try:
            if delivery.started_at is None:
                self._accepted(delivery)
            failed_, value, runtime = delivery.target(*delivery.args, **delivery.kwargs)
            current = self._forget(delivery)
            if future is not None:
                runtime = time.monotonic() - (current.started_at or current.received_at)
                value = value if failed_ else "<redacted>"  # what goes into events; the result itself is stored
                self._log_outcome(current, future, runtime)
                self._ask(lambda store: store.ended([current.job_id]))
            if not current.dropped:
                self._on_main(current.on_done, (failed_, value, runtime))
        except BaseException as error:
            # No message may be dropped unsettled: it would hold a place in the window of this worker for ever.
            log.error("job.finish_failed", job_id=delivery.job_id, error=repr(error), trace=traceback.format_exc())
            self._on_main(self._forget(delivery).give_back)

    def _acknowledge_only(self, delivery: Delivery) -> None:
        """End a repetition: acknowledge its message and leave the stored result alone."""
        current = self._forget(delivery)
        if (request := current.request) is not None:
            self._on_main(state.task_ready, request)
            self._on_main(request.acknowledge)

    def _forget(self, delivery: Delivery) -> Delivery:
        """Take the job out of the books. Returns its newest delivery."""
        with self._lock:
            current = self._by_job.pop(delivery.job_id, delivery)
            self._deliveries.pop(current.handle, None)
            return current

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

    def _log_outcome(self, delivery: Delivery, future: Future[Result], runtime: float) -> None:
        error = future.exception()
        if error is not None and not isinstance(error, JobError):
            return  # the tracer has logged it
        outcome = outcome_state(error if isinstance(error, JobError) else future.result())
        self.finished[outcome] += 1
        details: dict[str, Any] = {"job_id": delivery.job_id, "state": outcome, "seconds": round(runtime, 3)}
        if isinstance(error, JobError):
            details["code"] = error.code
        else:
            usage = future.result().usage
            details |= {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        log.info("job.finished", **details)

    # --- read by the monitor ---------------------------------------------------------------------------------------

    def deliveries(self) -> list[Delivery]:
        """The messages that this process holds."""
        with self._lock:
            return list(self._deliveries.values())

    def time_out(self, delivery: Delivery) -> None:
        """Celery's time limit of the task has passed: stop its row; Celery stores the failure and acknowledges."""
        delivery.dropped = True
        self._engine_service.engine.cancel(delivery.job_id)
        if delivery.on_timeout is not None:
            self._on_main(delivery.on_timeout, False, delivery.time_limit_s)

    @property
    def _engine_service(self) -> Service:
        if self._service is None:
            raise RuntimeError("the pool has not been started")
        return self._service


def _first_argument(delivery: Delivery) -> Any:
    """The request in a message. Celery has decoded the body already and keeps it in the request's headers."""
    args, kwargs = (delivery.args[2].get(name) for name in ("args", "kwargs"))
    if isinstance(args, (list, tuple)) and args:
        return args[0]
    return kwargs.get("request") if isinstance(kwargs, dict) else None

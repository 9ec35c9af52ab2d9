"""The engine: one model that computes any number of jobs at once, by continuous batching. Usable without Celery:

engine = load_engine(Settings(model="demo"))        # from headrace.worker.engine.build
with engine:
    future = engine.submit(parse_request({"prompt": "Hello.", "max_tokens": 10, "temperature": 0}))
    print(future.result().text)
"""

from __future__ import annotations

import functools
import threading
import time
import traceback
import uuid
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

import structlog

from headrace.client.wire.model_description import ModelDescription
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.results import Result
from headrace.model.generation_config import Ends
from headrace.model.tokenizer import Tokenizer
from headrace.worker.engine.adapters import Adapters
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.engine.executor import StepExecutor
from headrace.worker.engine.grammars import Grammars
from headrace.worker.engine.output_processor import OutputProcessor
from headrace.worker.engine.preparation import Preparations, is_slow, prepared, settle
from headrace.worker.engine.protocols import StepRunner
from headrace.worker.engine.request_defaults import NO_DEFAULTS, Defaults
from headrace.worker.engine.request_table import RequestTable
from headrace.worker.engine.requests import Hooks, RequestState
from headrace.worker.engine.scheduler import Scheduler
from headrace.worker.engine.sequence_text import TextDelta
from headrace.worker.engine.stats import EngineStats, SequenceStats
from headrace.worker.engine.step_loop import StepLoop

log = structlog.get_logger("headrace.engine")

#: The longest sleep between two checks of the queue, in seconds: longer ones overflow the clocks of some systems.
LONGEST_SLEEP_S = 3600.0

STOPPED_MESSAGE = "the engine was stopped before the job was done"


class Engine:
    """Takes requests from any thread and returns futures. Only `step`, in one thread, accesses sequences.

    Args:
        runner: computes steps.
        tokenizer: of the same model.
        scheduler: decides what runs.
        model_name: how results name the model.
        vocab_size: token ids in a request must be below it.
        max_context: limit of prompt and new tokens together.
        ends: the tokens that end a text, and the one for which the empty prompt stands.
        defaults: parameters of requests that do not set them.
        description: what was understood of the model's files.
        fingerprint: how results name software, hardware and weights.
        parse_special_tokens: of requests that do not say it; None for the tokenizer's default.
        adapters: those that requests may name; by default there are none.
        on_fatal: called once, from the engine's thread, if the engine cannot continue.
    """

    def __init__(
        self,
        runner: StepRunner,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        *,
        model_name: str,
        vocab_size: int,
        max_context: int,
        ends: Ends,
        defaults: Defaults = NO_DEFAULTS,
        description: ModelDescription | None = None,
        fingerprint: str = "",
        parse_special_tokens: bool | None = None,
        adapters: Adapters | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.model_name = model_name
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.ends = ends
        self.defaults = defaults
        self.grammars = Grammars(tokenizer, vocab_size)
        self.adapters = adapters or Adapters()
        self.description = description or ModelDescription()
        self.parse_special_tokens = parse_special_tokens
        self.fingerprint = fingerprint
        self.on_fatal = on_fatal
        #: Set when the engine has stopped computing and every future is done.
        self.ended = threading.Event()
        self._inbox: deque[RequestState] = deque()
        self._cancelled: deque[str | RequestState] = deque()  # by id, or because the caller cancelled its future
        self._lock = threading.RLock()
        self._preparations = Preparations(self._lock, self._take, self._wake)
        self._stopping = False  # takes no more jobs
        self._dropping = False  # ends jobs that have no slot
        self._abandoning = False  # ends after the present step, whatever is left
        self._loop: StepLoop | None = None
        self._requests = RequestTable(scheduler, runner)
        self._executor = StepExecutor(scheduler, runner, self._requests)
        self._outputs = OutputProcessor(
            runner, scheduler, self._requests, model_name=model_name, fingerprint=fingerprint
        )

    # --- from any thread -------------------------------------------------------------------------------------------

    def submit(
        self,
        request: GenerateRequest,
        *,
        job_id: str | None = None,
        on_start: Callable[[], None] | None = None,
        on_text: Callable[[TextDelta], None] | None = None,
        text_every_s: float = 0.0,
        on_activations: Callable[[dict[str, bytes]], None] | None = None,
    ) -> Future[Result]:
        """Take a job. The future gives its Result or raises a JobError. Cancelling the future cancels the job.

        Args:
            request: what to compute.
            job_id: the name of the job in results and for `cancel`; a random one by default.
            on_start: called when the job gets its first slot. The callbacks run in the engine's thread and hold up all
                jobs, so they must return quickly.
            on_text: called with each piece of text, in whole characters, as it is generated.
            text_every_s: seconds between two calls of `on_text` for one sample; text in between is sent together. The
                first and the last piece are sent at once.
            on_activations: called before the future is done, with the activations of the checkpoints that the request
                asks for, each as safetensors bytes by name.

        Raises:
            EngineStopped: the engine takes no more jobs.
        """
        future: Future[Result] = Future()
        job_id = job_id or uuid.uuid4().hex
        hooks = Hooks(on_start, on_text, on_activations, text_every_s)
        if is_slow(request, self):
            with self._lock:
                self._check_open()
                self._preparations.start(request, job_id, future, self, hooks)
            return future
        found = prepared(request, job_id, future, self)
        if not isinstance(found, RequestState):
            settle(future, found)
            return future
        with self._lock:
            self._check_open()
            self._take(found, hooks)
        self._wake()
        return future

    def _take(self, state: RequestState, hooks: Hooks) -> None:
        """Put a job into the inbox. Called with the lock."""
        hooks.give(state)
        # A reference to the state would be a cycle: its tensors and its result would stay until a full collection.
        state.future.add_done_callback(functools.partial(self._note_if_cancelled, weakref.ref(state)))
        self._inbox.append(state)

    def _check_open(self) -> None:
        if self._stopping:
            raise EngineStopped("the engine has stopped and takes no more jobs")

    def cancel(self, job_id: str) -> None:
        """Cancel a job: its future raises JobCancelled at the next step. Does nothing for unknown or finished jobs."""
        self._preparations.cancel(job_id)
        self._note_cancelled(job_id)

    def _note_if_cancelled(self, job: weakref.ref[RequestState], done: Future[Result]) -> None:
        if done.cancelled() and (state := job()) is not None:
            self._note_cancelled(state)

    def _note_cancelled(self, job: str | RequestState) -> None:
        with self._lock:
            self._cancelled.append(job)
        self._wake()

    def _wake(self) -> None:
        if self._loop is not None:
            self._loop.wake()

    def stats(self) -> EngineStats:
        """Load and counters. Read without a lock, so they may be of slightly different moments."""
        slots, progress_at = self.scheduler.slots, self._executor.progress_at
        return EngineStats(
            slots=self.scheduler.max_rows,
            running=len(self.scheduler.running),
            waiting=self.scheduler.waiting + len(self._inbox) + len(self._preparations),
            tokens=self._outputs.tokens,
            prompt_tokens=self._executor.prompt_tokens,
            steps=self._executor.steps,
            proposed=self._outputs.proposed,
            accepted=self._outputs.accepted,
            prefix_queries=self.scheduler.prefix_queries,
            prefix_hits=self.scheduler.prefix_hits,
            cache_bytes=slots.used_bytes,
            cache_usage=slots.usage,
            step_age_s=0.0 if progress_at is None else time.monotonic() - progress_at,
            adapters=self.adapters.stats(),
        )

    def running_sequences(self) -> list[SequenceStats]:
        """Progress of the running sequences. Read without a lock, like `stats`."""
        now = time.monotonic()
        running = [(sequence, self._requests.owner.get(sequence)) for sequence in list(self.scheduler.running)]
        return [
            SequenceStats(
                state.id,
                now - (sequence.admitted_at or now),
                prompt=len(sequence.prompt),
                read=sequence.prefilled,
                written=len(sequence.output),
                most=sequence.request.max_tokens,
            )
            for sequence, state in running
            if state is not None
        ]

    def start(self, loop: StepLoop | None = None) -> None:
        """Run steps until `stop`, in `loop` alternately with its other engines; by default in a new step loop."""
        self._loop = loop or StepLoop()
        self._loop.add(self)

    def stop(self, *, finish: bool = False, drop_waiting: bool = False, wait: bool = True) -> None:
        """Stop after the present step. Jobs that are not done raise EngineStopped.

        An engine that was never started computes nothing more, even with `finish`.

        Args:
            finish: stop only when all jobs are done.
            drop_waiting: with `finish`, do not wait for jobs that have no slot yet.
            wait: return only when the engine has ended.
        """
        with self._lock:
            self._stopping = True
            self._dropping |= drop_waiting
            self._abandoning |= not finish
        if self._loop is None:
            self._abandon(STOPPED_MESSAGE)
            return
        self._loop.wake()
        if wait and not self._loop.in_thread():
            self.ended.wait()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(finish=error is None)

    # --- in the engine's thread ------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run one step: admit, run, emit, retire. Returns whether there was anything to compute."""
        self._executor.progress_at = time.monotonic()
        try:
            self._receive()
            self._admit()
            self._executor.copy_prefixes()
            step = self.scheduler.schedule()
            if step:
                finished = self._outputs.process(*self._executor.run(step))
                self._executor.copy_prefixes()  # before the sequences that hold them retire
                self._outputs.retire(finished)
            return bool(step)
        finally:
            self._executor.progress_at = None

    def run_step(self) -> float:
        """Run one step. Returns how long the step loop may sleep, in seconds, if nothing wakes it."""
        sleep_s = None
        try:
            sleep_s = self._step_or_sleep()
        except BaseException as error:
            log.error("engine.failed", error=repr(error), trace=traceback.format_exc())
            self._stopping = True
            self._abandon(f"the engine failed: {error!r}")
            if self.on_fatal is not None:
                self.on_fatal(error)
        finally:
            if sleep_s is None:
                self.ended.set()
        return sleep_s or 0.0

    def _step_or_sleep(self) -> float | None:
        """Seconds to sleep, 0 after a step that computed something; None when the engine has ended."""
        if not self._abandoning and self.step():
            return 0.0
        with self._lock:
            idle = not self._inbox and not self._cancelled
            ends = self._abandoning or (idle and self._stopping and not self._preparations)
        if ends:
            self._abandon(STOPPED_MESSAGE)
            return None
        to_deadline = self._requests.seconds_to_deadline()
        longest = LONGEST_SLEEP_S if to_deadline is None else min(LONGEST_SLEEP_S, to_deadline)
        return longest if idle else 0.0

    def _receive(self) -> None:
        """Put new requests into the queue, and end those that were cancelled or have expired."""
        with self._lock:
            arrived, cancelled = list(self._inbox), set(self._cancelled)
            self._inbox.clear()
            self._cancelled.clear()
        for state in arrived:
            self._requests.add(state)
        if cancelled:
            self._requests.cancel(cancelled)
        if self._dropping:
            self._requests.drop_waiting()
        self._requests.expire()

    def _admit(self) -> None:
        """Give slots to waiting sequences, and report the jobs that start."""
        for sequence in self._executor.allocate():
            state = self._requests.owner.get(sequence)
            if state is None:
                continue  # `on_start` of its request raised for another sequence, which ended the request
            first = not state.started
            sequence.admitted_at = time.monotonic()
            if first and state.on_start is not None:
                self._requests.guard(state, state.on_start)

    def _abandon(self, reason: str) -> None:
        """End all jobs with EngineStopped."""
        with self._lock:
            inbox = list(self._inbox)
            self._inbox.clear()
        self._preparations.end(lambda: EngineStopped(reason))
        self._requests.abandon(inbox, reason)

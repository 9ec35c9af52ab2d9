"""The engine: one model, any number of jobs at once, in a thread that other engines may share. Usable without Celery:

engine = Engine.from_settings(Settings(model="demo"))
with engine:
    future = engine.submit(parse_request({"prompt": "Hello.", "max_tokens": 10, "temperature": 0}))
    print(future.result().text)
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import secrets
import threading
import time
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import structlog

from headrace.client.wire.errors import JobCancelled, JobError, JobExpired, JobFailed
from headrace.client.wire.keys import PRIORITIES
from headrace.client.wire.requests import MAX_SCORES, GenerateRequest
from headrace.client.wire.results import Result
from headrace.config import Settings
from headrace.model.tokenizer import Tokenizer
from headrace.worker.engine.cache_slots import Move
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.engine.oom import CACHE_MESSAGE, STEP_MESSAGE, Limit, out_of_memory, rows_of, split
from headrace.worker.engine.scheduler import Copy, Outcome, Scheduler, Step
from headrace.worker.engine.sequence import Generation, Sequence, Slot, TextDelta
from headrace.worker.engine.step_loop import Turns

log = structlog.get_logger("headrace.engine")

#: The engine looks up at least this often: a longer wait overflows in some systems' clocks.
LONGEST_WAIT_S = 3600.0

#: Places in line between two priorities, for those that are put back in front of the others.
PLACES = 2**40

#: Length classes of the cache, in positions; those above MAX_CONTEXT are left out.
LENGTH_CLASSES = (128, 256, 512, 1024)

NAN_MESSAGE = "the model gave no numbers for this prompt (NaN); check its weights"
STOPPED_MESSAGE = "the engine was stopped before the job was done"


class StepRunner(Protocol):
    """What the engine asks of the tensor side (`worker.engine.model_runner.Runner`); tests pass others in."""

    @property
    def dense(self) -> bool: ...
    def run(self, step: Step) -> Outcome: ...
    def fit(self, capacity: dict[int, int]) -> None: ...
    def move(self, move: Move) -> None: ...
    def copy(self, copy: Copy) -> None: ...
    def clear(self, slot: Slot) -> None: ...
    def collect(self, sequence: Sequence) -> dict[str, bytes]: ...


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing, at one moment."""

    slots: int
    running: int
    waiting: int
    tokens: int
    #: Of prompts: those computed, without those that were taken over from others.
    prompt_tokens: int
    steps: int
    #: Tokens that were guessed before they were drawn, and how many of them turned out right.
    drafted: int
    accepted: int
    cache_bytes: int
    #: Share of the cache's budget that running samples hold.
    cache_usage: float
    #: Seconds since the step that is being computed last came on; 0 between steps.
    step_age_s: float


@dataclass(frozen=True)
class RowStats:
    """A running sample: the tokens of its prompt, read so far, its new tokens, and the most there may be."""

    job_id: str
    #: Seconds since it got its slot.
    age_s: float
    prompt: int
    read: int
    written: int
    most: int


class Engine:
    """Takes requests, gives futures. All work on sequences happens in `step`, in one thread.

    Args:
        runner: computes steps.
        tokenizer: of the same model.
        scheduler: decides what runs.
        model_name: what results call the model.
        vocab_size: token ids a request may name are below it.
        max_context: prompt and new tokens together.
        fingerprint: what results say of the software, hardware and weights.
        on_fatal: called once, from the engine's thread, if the engine cannot go on.
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
        fingerprint: str = "",
        on_fatal: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.model_name = model_name
        self.vocab_size = vocab_size
        self.max_context = max_context
        self.fingerprint = fingerprint
        self.on_fatal = on_fatal
        self.tokens = self.prompt_tokens = 0
        self.steps = 0
        self.drafted = 0
        self.accepted = 0
        self._inbox: deque[Generation] = deque()
        self._cancelled: deque[str | Generation] = deque()  # by name, or because the waiter cancelled its future
        self._lock = threading.Lock()
        self._stopping = False  # takes no more jobs
        self._dropping = False  # lets go of jobs without a slot
        self._abandoning = False  # ends after the present step, whatever is left
        #: Not by name: a message delivered twice brings two jobs of one name, and each has a waiter.
        self._jobs: set[Generation] = set()
        self._owner: dict[Sequence, Generation] = {}
        self._deadlines: list[tuple[float, int, Generation]] = []
        self._tie = itertools.count()
        self._turns: Turns | None = None
        #: It computes nothing any more, and everybody has been told.
        self.over = threading.Event()
        self._rows = Limit(scheduler.max_rows + scheduler.step_tokens)
        self._cache = Limit(scheduler.slots.budget_bytes)
        self._taken_back = 0  # how often sequences were put back in line
        self._alive_at: float | None = None  # when the present step last came on

    @classmethod
    def from_settings(cls, settings: Settings, name: str | None = None) -> Engine:
        """Load a model that the settings name, the first one if no `name` is given, and build an engine around it.

        Raises:
            ModelError: the model cannot be found, read or trusted.
            ValueError: the model's share of the cache budget does not hold one sequence.
        """
        from headrace.worker.engine.build import build_engine  # torch is loaded here and not before

        loaded: Future[Engine] = Future()

        def load() -> None:
            try:
                loaded.set_result(build_engine(settings, name))
            except BaseException as error:
                loaded.set_exception(error)

        # In a thread that ends: OpenMP gives each thread that computes a team of its own, and where the teams together
        # have more threads than there are cores, all of them sleep where they would wait for a neighbour for a moment.
        # Measured: an engine's thread beside a main thread that has computed is 1.6 times slower.
        threading.Thread(target=load, name="headrace-load", daemon=True).start()
        return loaded.result()

    # --- from any thread -------------------------------------------------------------------------------------------

    def submit(
        self,
        request: GenerateRequest,
        *,
        job_id: str | None = None,
        on_start: Callable[[], None] | None = None,
        on_text: Callable[[TextDelta], None] | None = None,
        text_every_s: float = 0.0,
        on_trace: Callable[[dict[str, bytes]], None] | None = None,
    ) -> Future[Result]:
        """Take a job. The future gives its Result, or raises a JobError; cancelling the future cancels the job.

        Args:
            job_id: the job's name in results and for `cancel`; made up if not given.
            on_start: called when the job gets its first slot. It and `on_text` run in the engine's thread: be quick.
            on_text: called with each piece of text, in whole characters, as it comes.
            text_every_s: seconds between two calls of `on_text` for a sample; what comes in between goes together. The
                first and the last piece do not wait.
            on_trace: called before the future is done with the tensors of the checkpoints that the request asks for,
                each as safetensors bytes by name.

        Raises:
            EngineStopped: the engine takes no more work.
        """
        future: Future[Result] = Future()
        try:
            generation = self._prepare(request, job_id or uuid.uuid4().hex, future)
        except JobError as error:
            future.set_exception(error)
            return future
        generation.on_start, generation.on_text, generation.on_trace = on_start, on_text, on_trace
        generation.text_every_s = text_every_s
        future.add_done_callback(lambda done: self._note_cancel(generation) if done.cancelled() else None)
        with self._lock:
            if self._stopping:
                raise EngineStopped("the engine has stopped and takes no more jobs")
            self._inbox.append(generation)
        self._wake()
        return future

    def cancel(self, job_id: str) -> None:
        """Cancel a job: its waiter gets JobCancelled at the next step. An unknown or finished job is left alone."""
        self._note_cancel(job_id)

    def _note_cancel(self, job: str | Generation) -> None:
        with self._lock:
            self._cancelled.append(job)
        self._wake()

    def _wake(self) -> None:
        if self._turns is not None:
            self._turns.wake()

    def stats(self) -> EngineStats:
        """Numbers for status and metrics; read without a lock, each right at about the same moment."""
        slots, alive_at = self.scheduler.slots, self._alive_at
        return EngineStats(
            slots=self.scheduler.max_rows,
            running=len(self.scheduler.running),
            waiting=self.scheduler.waiting + len(self._inbox),
            tokens=self.tokens,
            prompt_tokens=self.prompt_tokens,
            steps=self.steps,
            drafted=self.drafted,
            accepted=self.accepted,
            cache_bytes=slots.used_bytes,
            cache_usage=slots.usage,
            step_age_s=0.0 if alive_at is None else time.monotonic() - alive_at,
        )

    def rows(self) -> list[RowStats]:
        """The running samples; read without a lock, as `stats`."""
        now = time.monotonic()
        owned = [(sequence, self._owner.get(sequence)) for sequence in list(self.scheduler.running)]
        return [
            RowStats(
                generation.id,
                now - (sequence.admitted_at or now),
                prompt=len(sequence.prompt),
                read=sequence.prefilled,
                written=len(sequence.output),
                most=sequence.request.max_tokens,
            )
            for sequence, generation in owned
            if generation is not None
        ]

    def start(self, turns: Turns | None = None) -> None:
        """Run steps until `stop`, in turn with those of the other engines in `turns`, or in a thread of its own."""
        self._turns = turns or Turns()
        self._turns.join(self)

    def stop(self, *, finish: bool = False, drop_waiting: bool = False, wait: bool = True) -> None:
        """End: after the present step, or with `finish` after all jobs are done. `wait` until it has.

        `drop_waiting` leaves out the jobs that have no slot yet. Those not done get EngineStopped. Before `start`
        nothing more is computed, whatever `finish` says.
        """
        with self._lock:
            self._stopping = True
            self._dropping |= drop_waiting
            self._abandoning |= not finish
        if self._turns is None:
            self._abandon(STOPPED_MESSAGE)
            return
        self._turns.wake()
        if wait and not self._turns.here():
            self.over.wait()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(finish=error is None)

    # --- in the engine's thread ------------------------------------------------------------------------------------

    def turn(self) -> float:
        """Called by `Turns`: a step. Returns the seconds for which there is no other to do unless something comes."""
        rest = None
        try:
            rest = self._step_or_rest()
        except BaseException as error:
            log.error("engine.failed", error=repr(error), trace=traceback.format_exc())
            self._stopping = True
            self._abandon(f"the engine failed: {error!r}")
            if self.on_fatal is not None:
                self.on_fatal(error)
        finally:
            if rest is None:
                self.over.set()
        return rest or 0.0

    def _step_or_rest(self) -> float | None:
        """The seconds to rest; None at the end."""
        if not self._abandoning and self.step():
            return 0.0
        with self._lock:
            idle = not self._inbox and not self._cancelled
            ends = self._abandoning or (idle and self._stopping)
        if not ends:
            return self._until_deadline() if idle else 0.0
        self._abandon(STOPPED_MESSAGE)
        return None

    def step(self) -> bool:
        """One round: admit, run, emit, retire. Returns whether there was anything to do."""
        self._alive_at = time.monotonic()
        try:
            self._take_in()
            self._admit()
            self._take_over()
            step = self.scheduler.plan()
            if step:
                done = self._emit(*self._run(step))
                self._take_over()  # before they leave from whom it is taken
                self._retire(done)
            return bool(step)
        finally:
            self._alive_at = None

    def _take_in(self) -> None:
        """New jobs get in line; cancelled and overdue ones, waiting or running, are out before the step."""
        with self._lock:
            arrived, cancelled = list(self._inbox), set(self._cancelled)
            self._inbox.clear()
            self._cancelled.clear()
        for generation in arrived:
            self._jobs.add(generation)
            for sequence in generation.sequences:
                self._owner[sequence] = generation
                self.scheduler.add(sequence, PRIORITIES[generation.request.priority] * PLACES)
            if generation.request.expires_at is not None:
                heapq.heappush(self._deadlines, (generation.request.expires_at, next(self._tie), generation))
        if cancelled:
            for generation in [g for g in self._jobs if g.id in cancelled or g in cancelled]:
                self._end(generation, _cancelled)
        if self._dropping:
            for generation in [g for g in self._jobs if not g.begun]:
                self._end(generation, _dropped)
        if len(self._deadlines) > 2 * len(self._jobs) + 64:  # most are of jobs that have ended
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._jobs]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= time.time():
            self._end(heapq.heappop(self._deadlines)[2], _expired)

    def _admit(self) -> None:
        for sequence in self._place():
            generation = self._owner.get(sequence)
            if generation is None:
                continue  # what was said of another sample has ended the job
            first = not generation.begun
            sequence.admitted_at = time.monotonic()
            if first and generation.on_start is not None:
                self._guarded(generation, generation.on_start)

    def _take_over(self) -> None:
        for copy in self.scheduler.take_over():
            self.runner.copy(copy)

    def _place(self) -> list[Sequence]:
        """Give slots to those in line. Where memory does not hold the cache that takes, fewer, or none for now."""
        slots = self.scheduler.slots
        slots.budget_bytes = self._cache.now
        while True:
            before = dict(slots.capacity)
            admitted = self.scheduler.admit()
            self._move()
            try:
                self.runner.fit(slots.capacity)
                if admitted or not self._kept_out():
                    return admitted
                slots.budget_bytes = self._cache.full
                continue
            except Exception as error:
                if not out_of_memory(error) or not admitted:
                    raise
            # Out of the handler: the error holds what was being computed.
            self._take_back(admitted, before)

    def _move(self) -> None:
        """Bring rows to where their slots are now, before anything of the cache shrinks. An error here is the end."""
        if self.runner.dense:
            self.scheduler.slots.compact()
        for move in self.scheduler.slots.take_moves():
            self.runner.move(move)

    def _kept_out(self) -> bool:
        """Whether those in line wait for nothing but room that the cache might have after all."""
        scheduler = self.scheduler
        return bool(scheduler.waiting) and not scheduler.running and scheduler.slots.budget_bytes < self._cache.full

    def _take_back(self, admitted: list[Sequence], before: dict[int, int]) -> None:
        """There is no memory for these slots: put who got them back in line, and let the cache take less.

        If nobody else has a slot and the first in line cannot have even one, it never can, and fails.
        """
        slots, wanted = self.scheduler.slots, self.scheduler.slots.used_bytes
        for sequence in admitted:
            self.scheduler.remove(sequence)
        self._taken_back += 1
        for sequence in admitted:  # in front of those of the same priority that came later
            self.scheduler.add(sequence, PRIORITIES[sequence.request.priority] * PLACES - self._taken_back)
        for length, rows in slots.rows.items():
            slots.capacity[length] = (
                min(before[length], slots.capacity[length]) if self.scheduler.running else len(rows)
            )
        used, first = slots.used_bytes, admitted[0]
        one = slots.position_bytes * next(length for length in slots.rows if length >= first.longest)
        log.warning("engine.cache_out_of_memory", wanted_bytes=wanted, cache_bytes=used)
        if wanted - used > one:
            self._cache.lower(used + max(one, (wanted - used) // 2))
        elif self.scheduler.running:
            self._cache.lower(used)
        else:
            self._fail(first, "out_of_memory", CACHE_MESSAGE)
        slots.budget_bytes = self._cache.now

    def _run(self, step: Step) -> tuple[Step, Outcome]:
        """Compute the step. Returns what was computed, and what came of it.

        If computing fails, its sequences are tried one by one: the guilty fail, the others go on. If memory runs out,
        half is tried at a time; the bits of a row do not depend on what is computed beside it. A row for which there is
        no memory even so waits for the next step, unless none could be computed.
        """
        self.steps += 1
        done, outcome = Step(), Outcome([], [])
        starved: list[Sequence] = []
        parts = deque((part, False) for part in split(step, self._rows.now))
        while parts:
            part, alone = parts.popleft()
            part = self._what_is_left(part, starved)
            fault = self._compute(part, done, outcome) if part else None
            if fault is None:
                continue
            if out_of_memory(fault):
                self._rows.lower(max(1, min(self._rows.now, rows_of(part) // 2)))
                log.warning("engine.step_out_of_memory", rows=rows_of(part), error=repr(fault))
                pieces = [(piece, alone) for piece in split(part, self._rows.now)]
                if len(pieces) == 1 and not part.drafts:  # what had drafts is tried without them
                    starved += part.sequences
                else:
                    parts.extendleft(reversed(pieces))
            elif alone:
                self._blame(part, fault)
            else:
                log.warning("engine.step_failed", rows=len(part.drawing), error=repr(fault))
                self.scheduler.detach_followers(part)
                parts.extendleft(reversed([(piece, True) for piece in part.alone()]))
        self._note_memory(bool(done), starved)
        return done, outcome

    def _what_is_left(self, part: Step, starved: list[Sequence]) -> Step:
        """The part without those whose job has ended meanwhile, and those that must wait."""
        here = {sequence for sequence in part.sequences if sequence in self._owner and sequence not in starved}
        return Step(
            [sequence for sequence in part.decodes if sequence in here],
            [chunk for chunk in part.chunks if chunk.sequence in here],
            {
                leader: [s for s in group if s in self._owner]
                for leader, group in part.followers.items()
                if leader in here
            },
            {sequence: drafts for sequence, drafts in part.drafts.items() if sequence in here},
        )

    def _compute(self, part: Step, done: Step, outcome: Outcome) -> Exception | None:
        """Compute a part of a step and add it to what is done. Returns why that failed, if it did."""
        try:
            result = self.runner.run(part)
        except Exception as error:
            if _is_fatal(error):
                raise
            return error.with_traceback(None) if out_of_memory(error) else error  # a traceback holds tensors
        finally:
            self._alive_at = time.monotonic()
        for chunk in part.chunks:
            self.prompt_tokens += chunk.count
            self.scheduler.advance(chunk)  # now: it is in the cache, whatever comes of later parts
        done.decodes.extend(part.decodes)
        done.chunks.extend(part.chunks)
        done.followers.update(part.followers)
        done.drafts.update(part.drafts)
        outcome.tokens.extend(result.tokens)
        outcome.prompt_scores.extend(result.prompt_scores)
        return None

    def _blame(self, part: Step, error: Exception) -> None:
        """End the jobs of a part that cannot be computed: it is of one sequence."""
        trace = "".join(traceback.format_exception(error))
        message = f"computing this job failed: {type(error).__name__}; the worker's log has the details"
        for sequence in part.sequences:
            log.error("job.step_failed", job_id=self._owner[sequence].id, trace=trace)
            self._fail(sequence, "internal_error", message)

    def _note_memory(self, progress: bool, starved: list[Sequence]) -> None:
        """Recover from a lack of memory slowly; where no row at all can be computed, make room."""
        if not starved:
            self._rows.note_step()
            self._cache.note_step()
        elif not progress and not self._give_back_cache():
            newest = max(
                starved, key=lambda sequence: self._owner[sequence].arrived_at if sequence in self._owner else 0.0
            )
            self._fail(newest, "out_of_memory", STEP_MESSAGE)

    def _give_back_cache(self) -> bool:
        """Let go of the slots that nobody uses. Returns whether there were any."""
        slots = self.scheduler.slots
        before = slots.used_bytes
        slots.compact()
        slots.capacity = {length: len(rows) for length, rows in slots.rows.items()}
        if slots.used_bytes == before:
            return False
        self._cache.lower(slots.used_bytes)
        self._move()
        try:
            self.runner.fit(slots.capacity)
        except Exception as error:
            if not out_of_memory(error):
                raise
        return True

    def _emit(self, step: Step, outcome: Outcome) -> list[Sequence]:
        """Hand the step's tokens to their sequences. Returns the sequences that are done."""
        now = time.monotonic()
        for sequence, scores in outcome.prompt_scores:
            sequence.prompt_scores.extend(scores)
        for leader, followers in step.followers.items():
            for follower in followers:
                follower.prompt_scores = list(leader.prompt_scores)
        for sequence in step.prefilled:
            sequence.first_token_at = now
            if sequence.request.max_tokens == 0 and sequence in self._owner:
                self._finish_scoring(sequence)
        self._note_drafts(step, outcome)
        for sequence, score in outcome.tokens:
            if sequence.finish_reason:
                continue  # with a token before this one
            if score is None:
                self._fail(sequence, "nan_logits", NAN_MESSAGE)
            elif sequence in self._owner:
                self.tokens += 1
                sequence.append(score)
                self._tell(sequence, now)
        return [s for s in (*step.decodes, *step.prefilled) if s.finish_reason and s in self._owner]

    def _note_drafts(self, step: Step, outcome: Outcome) -> None:
        """Count the drafts that turned out right: each gave its sequence a token more."""
        if not step.drafts:
            return
        tokens = Counter(sequence for sequence, _ in outcome.tokens)
        for sequence, drafts in step.drafts.items():
            right = tokens[sequence] - 1
            sequence.note_drafts(len(drafts), right)
            self.drafted += len(drafts)
            self.accepted += right

    def _finish_scoring(self, sequence: Sequence) -> None:
        """End a request for no new tokens. No draw has shown that its rows are free of NaN, so its slot is wiped."""
        last = sequence.prompt_scores[-1].logprob if sequence.prompt_scores else None
        if last is not None and math.isnan(last):  # a NaN reaches all later positions
            self._fail(sequence, "nan_logits", NAN_MESSAGE)
            return
        if sequence.slot is not None:
            self.runner.clear(sequence.slot)
        sequence.finish_scoring()

    def _tell(self, sequence: Sequence, now: float) -> None:
        generation = self._owner[sequence]
        if generation.on_text is None or (now < sequence.tell_at and not sequence.finish_reason):
            return
        if (delta := sequence.take_delta(generation.prompt_text)) is not None:
            sequence.tell_at = now + generation.text_every_s
            self._guarded(generation, functools.partial(generation.on_text, delta))

    def _retire(self, finished: list[Sequence]) -> None:
        """Free the slots of finished sequences, and complete the jobs whose last sample it was."""
        for sequence in finished:
            if (generation := self._owner.get(sequence)) is None:
                continue  # what another sample of its job did has ended it
            if sequence.trace is not None and generation.on_trace is not None:
                self._guarded(generation, functools.partial(self._hand_over, sequence, generation.on_trace))
            if self._owner.pop(sequence, None) is not None:
                self.scheduler.remove(sequence)
            if generation.finished and generation in self._jobs:
                self._guarded(generation, functools.partial(self._complete, generation))

    def _hand_over(self, sequence: Sequence, on_trace: Callable[[dict[str, bytes]], None]) -> None:
        on_trace(self.runner.collect(sequence))

    def _complete(self, generation: Generation) -> None:
        result = generation.result(self.model_name, self.fingerprint, time.monotonic())
        self._jobs.remove(generation)
        _settle(generation.future, result)

    def _guarded(self, generation: Generation, action: Callable[[], None]) -> None:
        """Run what concerns one job alone; its errors end that job, not the engine."""
        try:
            action()
        except Exception as error:
            log.error("job.failed", job_id=generation.id, error=repr(error), trace=traceback.format_exc())
            message = f"finishing this job failed: {type(error).__name__}; the worker's log has the details"
            self._end(generation, lambda partial: JobFailed("internal_error", message, partial))

    def _fail(self, sequence: Sequence, code: str, message: str) -> None:
        """End the sequence's job."""
        if (generation := self._owner.get(sequence)) is not None:
            self._end(generation, lambda partial: JobFailed(code, message, partial))

    def _end(self, generation: Generation, error: Callable[[list[str]], Exception]) -> None:
        """Take a job out before it is done, and tell its waiter why. Its slots are wiped: they may hold NaN."""
        if generation not in self._jobs:
            return
        self._jobs.remove(generation)
        for slot in [sequence.slot for sequence in generation.sequences if sequence.slot is not None]:
            self.runner.clear(slot)
        for sequence in generation.sequences:
            if self._owner.pop(sequence, None) is not None:
                self.scheduler.remove(sequence)
        _settle(generation.future, error(generation.partial))

    def _abandon(self, reason: str) -> None:
        """The end: tell everybody. The cache is left as it is, for the device may not answer any more."""
        with self._lock:
            left = [*self._jobs, *self._inbox]
            self._inbox.clear()
        self._jobs.clear()
        for generation in left:
            _settle(generation.future, EngineStopped(reason))

    def _until_deadline(self) -> float:
        return min(LONGEST_WAIT_S, max(0.0, self._deadlines[0][0] - time.time())) if self._deadlines else LONGEST_WAIT_S

    # --- building a job --------------------------------------------------------------------------------------------

    def _prepare(self, request: GenerateRequest, job_id: str, future: Future[Result]) -> Generation:
        """Tokens, seed and sequences of a request; JobFailed where it cannot be computed by this model."""
        prompt, text = self._read_prompt(request.prompt)
        self._check_tokens(request, prompt)
        total = len(prompt) + request.max_tokens
        if total > self.max_context:
            raise JobFailed(
                "context_length_exceeded",
                f"the prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}, together {total}; "
                f"this model reads at most {self.max_context}. Shorten the prompt or lower max_tokens",
            )
        _check_scores(request, len(prompt))
        seed = secrets.randbits(52) if request.seed is None else request.seed
        sequences = [Sequence(request, prompt, i, seed, self.tokenizer) for i in range(request.n)]
        return Generation(job_id, request, sequences, text, seed, future, time.monotonic())

    def _read_prompt(self, prompt: str | list[int]) -> tuple[list[int], str]:
        """Token ids and text. The empty prompt stands for the end-of-text token, with which texts begin."""
        if not isinstance(prompt, str):
            decoder = self.tokenizer.decoder()
            return prompt, "".join(map(decoder.push, prompt)) + decoder.flush()
        tokens = self.tokenizer.encode(prompt)
        if tokens:
            return tokens, prompt
        if self.tokenizer.end_of_text is None:
            raise JobFailed("empty_prompt", "the prompt is empty and this model's vocabulary has no end-of-text token")
        return [self.tokenizer.end_of_text], prompt

    def _check_tokens(self, request: GenerateRequest, prompt: list[int]) -> None:
        for name, ids in (
            ("prompt", prompt),
            ("logit_bias", request.logit_bias),
            ("stop_token_ids", request.stop_token_ids),
        ):
            wrong = max(ids, default=0)
            if wrong >= self.vocab_size:
                raise JobFailed(
                    "invalid_token_id",
                    f"{name} names token id {wrong}; this model's vocabulary ends at {self.vocab_size - 1}",
                )


def _check_scores(request: GenerateRequest, prompt_tokens: int) -> None:
    if request.logprobs is None:
        return
    tokens = request.n * (request.max_tokens + (prompt_tokens if request.echo else 0))
    if (scores := tokens * (1 + request.logprobs)) > MAX_SCORES:
        raise JobFailed(
            "too_many_logprobs",
            f"n, max_tokens and logprobs ask for {scores} log probabilities, and a result holds at most {MAX_SCORES}; "
            "lower one of them, or submit the samples as several jobs with seeds of their own",
        )


def _cancelled(partial: list[str]) -> JobError:
    return JobCancelled(message="the job was cancelled", partial=partial)


def _dropped(_: list[str]) -> Exception:
    return EngineStopped("the engine is stopping and starts no more jobs")


def _expired(partial: list[str]) -> JobError:
    return JobExpired(message="the job was not done within its timeout_s", partial=partial)


def _settle(future: Future[Result], outcome: Result | BaseException) -> None:
    """Complete a future, unless its holder cancelled it in the meantime."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _is_fatal(error: Exception) -> bool:
    """Errors after which the device answers nothing any more: every later step would fail too."""
    return type(error).__name__ == "AcceleratorError"

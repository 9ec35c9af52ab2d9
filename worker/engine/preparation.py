"""From a request to a job that the engine can compute, or to its answer.

Adapters are loaded, chats rendered and grammars compiled in threads of their own.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import structlog

from headrace.client.wire.errors import JobCancelled, JobError, JobFailed
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.results import Result
from headrace.model.generation_config import Ends
from headrace.model.tokenizer import Tokenizer
from headrace.worker.engine import chat, grammars, token_requests
from headrace.worker.engine.adapters import Adapters
from headrace.worker.engine.grammars import Grammars
from headrace.worker.engine.request_defaults import Defaults
from headrace.worker.engine.requests import Hooks, RequestState, prepare

log = structlog.get_logger("headrace.engine")


class Model(Protocol):
    """What requests are checked against: an engine."""

    tokenizer: Tokenizer
    ends: Ends
    #: Parameters of requests that do not set them.
    defaults: Defaults
    vocab_size: int
    max_context: int
    model_name: str
    #: Of requests that do not say it; None for the tokenizer's default.
    parse_special_tokens: bool | None
    #: Of `structured_outputs`.
    grammars: Grammars
    #: Of `adapter`.
    adapters: Adapters


Prepared = RequestState | Result | BaseException


def prepared(request: GenerateRequest, job_id: str, future: Future[Result], model: Model) -> Prepared:
    """The job in the form that the engine computes, or its answer if it needs no slot, or why it cannot be computed."""
    try:
        if request.operation is None:
            return prepare(
                request,
                job_id,
                future,
                tokenizer=model.tokenizer,
                ends=model.ends,
                vocab_size=model.vocab_size,
                max_context=model.max_context,
                defaults=model.defaults,
                parse_special_tokens=model.parse_special_tokens,
                grammars=model.grammars,
                adapters=model.adapters,
            )
        return token_requests.answer(
            request,
            job_id,
            tokenizer=model.tokenizer,
            ends=model.ends,
            vocab_size=model.vocab_size,
            max_context=model.max_context,
            model=model.model_name,
            parse_special_tokens=model.parse_special_tokens,
        )
    except JobError as error:
        return error


def settle(future: Future[Result], outcome: Result | BaseException) -> None:
    """Give a future its outcome, unless its caller has cancelled it."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Result):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)


def is_slow(request: GenerateRequest, model: Model) -> bool:
    """Whether others should not wait for the preparation: it loads an adapter, renders a chat or compiles a grammar."""
    return request.messages is not None or _loads(request, model) or _compiles(request, model)


def _loads(request: GenerateRequest, model: Model) -> bool:
    return request.operation is None and not model.adapters.knows(request.adapter)


def _compiles(request: GenerateRequest, model: Model) -> bool:
    return not model.grammars.knows(request.structured_outputs)


def _begin(request: GenerateRequest, model: Model, prepare: Callable[[], None]) -> None:
    """Prepare a request whose adapter is loaded, in a thread for chats or grammars if it has one."""
    if request.messages is not None:
        chat.renderer.threads.submit(prepare)
    elif _compiles(request, model):
        grammars.threads.submit(prepare)
    else:
        prepare()


class Preparations:
    """The jobs whose adapters are being loaded, messages rendered or grammars compiled. May be used from any thread.

    Args:
        lock: of the engine: a job is always either here, or in the engine, or has ended.
        take: gives the engine a job that has been prepared; called with the lock.
        wake: wakes the engine.
    """

    def __init__(
        self, lock: threading.RLock, take: Callable[[RequestState, Hooks], None], wake: Callable[[], None]
    ) -> None:
        self._lock, self._take, self._wake = lock, take, wake
        self._jobs: dict[Future[Result], str] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def start(self, request: GenerateRequest, job_id: str, future: Future[Result], model: Model, hooks: Hooks) -> None:
        """Prepare a job in a thread, and pass it to the engine if it has not ended meanwhile."""
        with self._lock:
            self._jobs[future] = job_id
        then = functools.partial(self._prepare, request, job_id, future, model, hooks)
        if request.adapter is not None and _loads(request, model):
            model.adapters.load_then(request.adapter, future, functools.partial(_begin, request, model, then))
        else:
            _begin(request, model, then)

    def _prepare(
        self,
        request: GenerateRequest,
        job_id: str,
        future: Future[Result],
        model: Model,
        hooks: Hooks,
        again: bool = False,
    ) -> None:
        if future not in self._jobs:
            return
        try:
            with contextlib.nullcontext() if again else chat.first_try():
                found = prepared(request, job_id, future, model)
        except chat.Slow:
            chat.renderer.slow_threads.submit(self._prepare, request, job_id, future, model, hooks, again=True)
            return
        except Exception as error:
            log.error("job.prepare_failed", job_id=job_id, error=type(error).__name__)
            found = JobFailed("internal_error", f"preparing this job failed: {type(error).__name__}")
        with self._lock:
            if self._jobs.pop(future, None) is None:
                return
            if isinstance(found, RequestState):
                self._take(found, hooks)
        if not isinstance(found, RequestState):
            settle(future, found)
        self._wake()

    def cancel(self, job_id: str) -> None:
        """End the jobs with this id."""
        with self._lock:
            named = [future for future, name in self._jobs.items() if name == job_id]
        self._end(named, lambda: JobCancelled(message="the job was cancelled before it started"))

    def end(self, error: Callable[[], BaseException]) -> None:
        """End all jobs."""
        with self._lock:
            futures = list(self._jobs)
        self._end(futures, error)

    def _end(self, futures: list[Future[Result]], error: Callable[[], BaseException]) -> None:
        for future in futures:
            with self._lock:
                here = self._jobs.pop(future, None) is not None
            if here:
                settle(future, error())

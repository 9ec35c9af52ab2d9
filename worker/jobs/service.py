"""The models as the Celery tasks see them: one service for each process, whichever pool runs the tasks."""

from __future__ import annotations

import functools
import threading
import time
import traceback
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import redis
import structlog
from celery.exceptions import Ignore, TaskRevokedError, TimeLimitExceeded

from headrace.client.wire.errors import JobCancelled, JobError, JobFailed
from headrace.client.wire.redis import connect, resolve_url
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.results import CANCELLED_EARLY, Result
from headrace.client.wire.signing import unsigned, verified
from headrace.config import Settings
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.jobs.redis_store import RedisStore
from headrace.worker.jobs.retry import retry_until_available
from headrace.worker.jobs.store import Store
from headrace.worker.jobs.stream_writer import STREAM_INTERVAL_S, StreamWriter
from headrace.worker.queue.messages import BAD_SIGNATURE, read_group, read_wire
from headrace.worker.queue.permissions import is_forbidden

if TYPE_CHECKING:
    from headrace.worker.engine.registry import ModelRegistry

log = structlog.get_logger("headrace.worker")

#: Encodes the result record of a job from its id and outcome: `worker.queue.backend.ResultBackend.record`.
Encode = Callable[[str, Result | BaseException], str]

T = TypeVar("T")


class Service:
    """Validates jobs and gives them to the engines; holds outcomes until Celery's tasks pick them up.

    Args:
        models: the engines.
        store: keeps results and checkpoint tensors.
        checkpoint_max_bytes: the checkpoint tensors of a job may take this many bytes; with 0 none are stored.
        signing_keys: if there are any, only jobs that one of them has signed are computed.
    """

    def __init__(
        self, models: ModelRegistry, store: Store, *, checkpoint_max_bytes: int, signing_keys: tuple[bytes, ...] = ()
    ) -> None:
        self.models = models
        self.store = store
        self.events = StreamWriter(store)
        self._signing_keys = signing_keys
        self._checkpoint_max_bytes = checkpoint_max_bytes
        #: Raise the error if the Redis user lacks a permission, instead of retrying: the pool ends the process for it.
        self.fail_fast = False
        #: Called each time that storing a result or tensors is retried.
        self.on_retry: Callable[[], None] = lambda: None
        self._stashed: dict[str, Future[Result]] = {}
        # By future, so that the tensors of a job that fails or is revoked are freed with it.
        self._tensors: weakref.WeakKeyDictionary[Future[Result], dict[str, bytes]] = weakref.WeakKeyDictionary()

    def generate(
        self, job_id: str | None, wire: dict[str, Any], model: str | None = None, look_up: bool = False
    ) -> dict[str, Any]:
        """Return the result of a job as JSON: the stashed one if there is one, otherwise compute it now.

        Without a job id it gets a new one; without a model the first one computes it.

        Args:
            look_up: before computing, check whether the job has ended or was cancelled.

        Raises:
            Ignore: it has ended: its message was delivered again.
            JobError: the job ended without a result.
            EngineStopped, ModelUnavailable: another worker may compute the job.
        """
        job_id = job_id or uuid.uuid4().hex
        future = self._stashed.pop(job_id, None)
        if future is None and look_up:
            future = self._known_end(job_id)
        future = future or self.submit(job_id, wire, model)
        return self._result(job_id, future).model_dump(mode="json")

    def _known_end(self, job_id: str) -> Future[Result] | None:
        """The end of a job that was cancelled before it started; raises Ignore for a job that has ended."""
        (record,) = self.retry_until_available(lambda: self.store.lookup([job_id]))
        if record.finished:
            raise Ignore("the job has ended before")
        return failed(cancelled_early()) if record.cancelled else None

    def generate_many(self, group: Any, encode: Encode, model: str | None = None) -> None:
        """Compute the jobs of a message and store a result for each, for pools without an engine of their own.

        Raises:
            EngineStopped, ModelUnavailable: there is no engine; the results stored so far remain.
        """
        jobs = read_group(group)
        known = self.retry_until_available(lambda: self.store.lookup(list(jobs)))
        futures: dict[str, Future[Result]] = {}
        for (job_id, wire), record in zip(jobs.items(), known, strict=True):
            if not record.finished:
                futures[job_id] = failed(cancelled_early()) if record.cancelled else self.submit(job_id, wire, model)
        for job_id, future in futures.items():
            encoded = {job_id: self.record(job_id, future, encode)}
            self.retry_until_available(functools.partial(self.store.finish, encoded))
            self.events.end([job_id])

    def end_revoked(self, group: Any, encode: Encode) -> None:
        """End the jobs of a revoked message, which Celery does not pass to a task, as Celery ends a task."""
        records = {job_id: encode(job_id, TaskRevokedError("revoked")) for job_id in read_group(group)}
        self.retry_until_available(lambda: self.store.finish(records))

    def record(self, job_id: str, future: Future[Result], encode: Encode) -> str:
        """Wait for a job's outcome, store its checkpoint tensors, and return its result record.

        Raises:
            EngineStopped: there is no outcome; another worker may compute the job.
        """
        try:
            return encode(job_id, self._result(job_id, future))
        except EngineStopped:
            raise
        except (JobError, TaskRevokedError, TimeLimitExceeded) as error:
            return encode(job_id, error)
        except Exception as error:
            log.error("job.finish_failed", job_id=job_id, error=repr(error), trace=traceback.format_exc())
            message = f"finishing this job failed: {type(error).__name__}; the worker's log has the details"
            return encode(job_id, JobFailed("internal_error", message))

    def _result(self, job_id: str, future: Future[Result]) -> Result:
        result = future.result()
        if tensors := self._tensors.get(future):
            self._save_tensors(job_id, tensors)
            self._tensors.pop(future, None)  # they may be larger than the result, which others may keep
        return result

    def retry_until_available(self, ask: Callable[[], T]) -> T:
        """Call `ask` until Redis answers without an error; see `fail_fast` for the exception."""
        return retry_until_available(
            ask, give_up=lambda error: self.fail_fast and is_forbidden(error), on_retry=self.on_retry
        )

    def submit(
        self, job_id: str, wire: Any, model: str | None = None, on_start: Callable[[], None] | None = None
    ) -> Future[Result]:
        """Submit a job from a message to the engine of its model. For an invalid request the future has failed."""
        try:
            model = self.model_named(model)
            if self._signing_keys and not verified(self._signing_keys, job_id, model, wire):
                raise JobFailed("bad_signature", BAD_SIGNATURE)
            request = self._with_local_deadline(read_wire(unsigned(wire), model))
            if request.checkpoints and not self._checkpoint_max_bytes:
                raise JobFailed("checkpoints_off", "this worker keeps no tensors: HEADRACE_CHECKPOINT_MAX_BYTES is 0")
        except JobFailed as error:
            return failed(error)
        tensors: dict[str, bytes] = {}
        future = self.models.get(model).submit(
            request,
            job_id=job_id,
            on_start=on_start,
            on_text=self.events.begin(job_id) if request.stream else None,
            text_every_s=STREAM_INTERVAL_S,
            on_activations=tensors.update,
        )
        self._tensors[future] = tensors
        return future

    def _with_local_deadline(self, request: GenerateRequest) -> GenerateRequest:
        """Clients set deadlines by Redis' clock. The engine uses this machine's."""
        if request.expires_at is None:
            return request
        local = time.time() + request.expires_at - self.store.now()
        return request.model_copy(update={"expires_at": max(0.0, local)})

    def model_named(self, name: str | None) -> str:
        """Return the name if this process serves that model; without a name, the name of its first model.

        Raises:
            JobFailed: this process does not serve the model.
        """
        if name is None or name in self.models.names:
            return name or self.models.names[0]
        served = ", ".join(map(repr, self.models.names))
        raise JobFailed(
            "invalid_request",
            f"model: got {name[:80]!r}; expected one that this worker serves: {served}. Send the message to the queue "
            "of one of these, or start a worker for the model",
        )

    def _save_tensors(self, job_id: str, tensors: dict[str, bytes]) -> None:
        """Store checkpoint tensors, before the result that refers to them."""
        size = sum(map(len, tensors.values()))
        if size > self._checkpoint_max_bytes:
            raise JobFailed(
                "checkpoints_too_large",
                f"the tensors asked for take {size} bytes and a job may keep {self._checkpoint_max_bytes}; ask for "
                "fewer checkpoints (8, the logits, is the largest), shorten the prompt, or raise "
                "HEADRACE_CHECKPOINT_MAX_BYTES",
            )

        def save() -> None:
            try:
                self.store.save_tensors(job_id, tensors)
            except redis.ResponseError as error:  # for example Redis is full: retrying would not help
                raise JobFailed("checkpoints_not_stored", f"Redis did not store the tensors: {error}") from error

        self.retry_until_available(save)

    def stash(self, job_id: str, future: Future[Result]) -> None:
        """Stash a finished future for the Celery task that will pick it up with `generate`."""
        self._stashed[job_id] = future


def cancelled_early() -> JobCancelled:
    """The error of a job that was cancelled before it got a slot."""
    return JobCancelled(message=CANCELLED_EARLY)


def failed(error: BaseException) -> Future[Result]:
    """A future that has failed with this error."""
    future: Future[Result] = Future()
    future.set_exception(error)
    return future


_lock = threading.Lock()


def service_for(settings: Settings) -> Service:
    """The service of this process. A model is loaded when it is first needed."""
    with _lock:
        return _build(settings)


@functools.cache
def _build(settings: Settings) -> Service:
    from headrace.worker.engine.registry import ModelRegistry  # imports torch, which the command line does not need

    ttl = {name: getattr(settings, name) for name in ("result_ttl_s", "checkpoint_ttl_s", "events_ttl_s")}
    store = RedisStore(connect(resolve_url(settings)), **ttl)
    return Service(
        ModelRegistry.from_settings(settings),
        store,
        checkpoint_max_bytes=settings.checkpoint_max_bytes,
        signing_keys=settings.signing_keys,
    )

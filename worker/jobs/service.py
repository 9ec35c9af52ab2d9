"""The models as tasks see them: one service for each process, whichever pool runs the tasks."""

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
from celery.exceptions import TaskRevokedError, TimeLimitExceeded

from headrace.client.wire.errors import InvalidRequest, JobCancelled, JobError, JobFailed
from headrace.client.wire.redis import connect, resolve_url
from headrace.client.wire.requests import GenerateRequest, is_job_id, parse_request
from headrace.client.wire.results import Result
from headrace.client.wire.signing import unsigned, verified
from headrace.client.wire.version import SCHEMA_VERSION, is_readable
from headrace.config import Settings
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.jobs.store import RedisStore, Store
from headrace.worker.jobs.stream_writer import TELL_EVERY_S, EventWriter
from headrace.worker.queue.permissions import is_forbidden

if TYPE_CHECKING:
    from headrace.worker.engine.registry import Models

log = structlog.get_logger("headrace.worker")

#: A job's id and outcome -> its result record, `worker.backend.ResultBackend.record`.
Encode = Callable[[str, Result | BaseException], str]

T = TypeVar("T")

BAD_SIGNATURE = (
    "the request has no signature that this worker accepts, and was not computed; give the client the first key of the "
    "worker's HEADRACE_SIGNING_KEY, and submit to the model that the worker serves"
)

#: Pause before Redis is asked again after it failed to answer.
RETRY_S = 0.5


class Service:
    """The models' engines, and the outcomes that tasks are about to pick up."""

    def __init__(
        self, models: Models, store: Store, *, checkpoint_max_bytes: int, signing_keys: tuple[bytes, ...] = ()
    ) -> None:
        self.models = models
        self.store = store
        self.events = EventWriter(store)
        self._signing_keys = signing_keys
        self._checkpoint_max_bytes = checkpoint_max_bytes
        #: Whether an error that says that the Redis user lacks a right is raised: the pool ends the process for it.
        self.gives_up = False
        #: Called each time that Redis did not take a result, or tensors, and is asked again.
        self.on_retry: Callable[[], None] = lambda: None
        self._ready: dict[str, Future[Result]] = {}
        # By future, so that the tensors of a job that fails or is revoked go with it.
        self._dumps: weakref.WeakKeyDictionary[Future[Result], dict[str, bytes]] = weakref.WeakKeyDictionary()

    def generate(self, job_id: str | None, wire: dict[str, Any], model: str | None = None) -> dict[str, Any]:
        """The result of a job as JSON: the one that is ready, else computed now, by the first model if none is named.

        Raises:
            JobError: the job ended without a result.
            EngineStopped, ModelUnavailable: another worker may do the job.
        """
        job_id = job_id or uuid.uuid4().hex
        future = self._ready.pop(job_id, None) or self.submit(job_id, wire, model)
        return self._result(job_id, future).model_dump(mode="json")

    def generate_many(self, group: Any, encode: Encode, model: str | None = None) -> None:
        """Compute the jobs of a message and store a result for each: what a pool without an engine of its own does.

        Raises:
            EngineStopped, ModelUnavailable: there is no engine any more, or none yet; the results stored so far stand.
        """
        jobs = read_group(group)
        claims = self.patiently(lambda: self.store.claim(list(jobs)))
        futures: dict[str, Future[Result]] = {}
        for (job_id, wire), claim in zip(jobs.items(), claims, strict=True):
            if not claim.finished:
                futures[job_id] = failed(cancelled_early()) if claim.cancelled else self.submit(job_id, wire, model)
        for job_id, future in futures.items():
            record = {job_id: self.record(job_id, future, encode)}
            self.patiently(functools.partial(self.store.finish, record))
            self.events.end([job_id])

    def end_revoked(self, group: Any, encode: Encode) -> None:
        """Celery let a message of several jobs go unread: end its jobs as it ends a task."""
        records = {job_id: encode(job_id, TaskRevokedError("revoked")) for job_id in read_group(group)}
        self.patiently(lambda: self.store.finish(records))

    def record(self, job_id: str, future: Future[Result], encode: Encode) -> str:
        """Wait for a job's outcome and give its result record; checkpoint tensors are stored before.

        Raises:
            EngineStopped: there is no outcome; another worker may do the job.
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
        if tensors := self._dumps.get(future):
            self._keep(job_id, tensors)
        return result

    def patiently(self, ask: Callable[[], T]) -> T:
        """Ask the store until Redis answers, whatever it says meanwhile; but see `gives_up`."""
        while True:
            try:
                return ask()
            except redis.RedisError as error:
                if self.gives_up and is_forbidden(error):
                    raise
                log.warning("redis.unanswered", error=str(error))
                self.on_retry()
                time.sleep(RETRY_S)

    def submit(
        self, job_id: str, wire: Any, model: str | None = None, on_start: Callable[[], None] | None = None
    ) -> Future[Result]:
        """Give a job from a message to its model's engine; a request that cannot be read is a future that failed."""
        model = self.model_named(model)
        try:
            if self._signing_keys and not verified(self._signing_keys, job_id, model, wire):
                raise JobFailed("bad_signature", BAD_SIGNATURE)
            request = read_wire(unsigned(wire))
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
            text_every_s=TELL_EVERY_S,
            on_trace=tensors.update,
        )
        self._dumps[future] = tensors
        return future

    def model_named(self, name: str | None) -> str:
        """The model for a job of that queue; the first one if it came by no queue of ours."""
        return name if name in self.models.names else self.models.names[0]

    def _keep(self, job_id: str, tensors: dict[str, bytes]) -> None:
        """Store checkpoint tensors before the result says that they are there."""
        size = sum(map(len, tensors.values()))
        if size > self._checkpoint_max_bytes:
            raise JobFailed(
                "checkpoints_too_large",
                f"the tensors asked for take {size} bytes and a job may keep {self._checkpoint_max_bytes}; ask for "
                "fewer checkpoints (8, the logits, is the largest), shorten the prompt, or raise "
                "HEADRACE_CHECKPOINT_MAX_BYTES",
            )

        def dump() -> None:
            try:
                self.store.dump(job_id, tensors)
            except redis.ResponseError as error:  # Redis is full, say: trying again would not help
                raise JobFailed("checkpoints_not_stored", f"Redis did not take the tensors: {error}") from error

        self.patiently(dump)

    def ready(self, job_id: str, future: Future[Result]) -> None:
        """Lay an outcome down for the task body that comes next."""
        self._ready[job_id] = future


def cancelled_early() -> JobCancelled:
    """How a job ends that was cancelled before it got a slot."""
    return JobCancelled(message="the job was cancelled before it started")


def failed(error: BaseException) -> Future[Result]:
    """A future that raises."""
    future: Future[Result] = Future()
    future.set_exception(error)
    return future


def read_wire(wire: Any) -> GenerateRequest:
    """A request out of a message, which anybody may have written.

    Raises:
        JobFailed: with the code `unsupported_version` or `invalid_request`.
    """
    if not isinstance(wire, dict):
        raise JobFailed("invalid_request", f"the message holds a {type(wire).__name__} where a request should be")
    if not is_readable(wire.get("schema_version", SCHEMA_VERSION)):
        raise JobFailed(
            "unsupported_version",
            f"the request is of schema version {str(wire['schema_version'])[:20]} and this worker reads none above "
            f"{SCHEMA_VERSION}; upgrade the workers before the clients",
        )
    try:
        return parse_request(wire)
    except InvalidRequest as error:
        raise JobFailed("invalid_request", str(error)) from error


def read_group(group: Any) -> dict[str, Any]:
    """The jobs of a message for `client.wire.requests.GROUP_TASK_NAME`, which anybody may have written: request by id.

    A member that names no job cannot fail either: nobody could ask for it. Such are left out, as are repetitions of an
    id; one line in the log says how many. What the requests are worth, `read_wire` says.
    """
    jobs: dict[str, Any] = {}
    members = group if isinstance(group, (list, tuple)) else [group]
    nameless = repeated = 0
    for member in members:
        job_id = member.get("id") if isinstance(member, dict) else None
        if not is_job_id(job_id):
            nameless += 1
        elif job_id in jobs:
            repeated += 1
        else:
            jobs[job_id] = member.get("request")
    if nameless or repeated:
        log.error("job.refused", reason="members of a message name no job, or one again", none=nameless, again=repeated)
    return jobs


_lock = threading.Lock()


def service_for(settings: Settings) -> Service:
    """This process's service. A model is loaded when it is first asked for."""
    with _lock:
        return _build(settings)


@functools.cache
def _build(settings: Settings) -> Service:
    from headrace.worker.engine.registry import Models  # brings what computes, which the command line does not need

    ttl = {name: getattr(settings, name) for name in ("result_ttl_s", "checkpoint_ttl_s", "events_ttl_s")}
    store = RedisStore(connect(resolve_url(settings)), **ttl)
    return Service(
        Models.from_settings(settings),
        store,
        checkpoint_max_bytes=settings.checkpoint_max_bytes,
        signing_keys=settings.signing_keys,
    )

"""The engine as tasks see it: one for each process, whichever pool runs the tasks."""

from __future__ import annotations

import functools
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from client.errors import InvalidRequest, JobFailed
from client.schema import SCHEMA_VERSION, GenerateRequest, Result, parse_request
from config import Settings

if TYPE_CHECKING:
    from worker.engine import Engine


class Service:
    """A started engine, and the outcomes that tasks are about to pick up."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._ready: dict[str, Future[Result]] = {}

    def generate(self, job_id: str | None, wire: dict[str, Any]) -> dict[str, Any]:
        """The result of a job as JSON: the one that is ready, else computed now.

        Raises:
            JobError: the job ended without a result.
            EngineStopped: the engine ended first; another worker may do the job.
        """
        job_id = job_id or uuid.uuid4().hex
        future = self._ready.pop(job_id, None)
        if future is None:
            future = self.engine.submit(read_wire(wire), job_id=job_id)
        return future.result().model_dump(mode="json")

    def submit(self, job_id: str, wire: Any, on_start: Callable[[], None]) -> Future[Result]:
        """Give a job from a message to the engine; a request that cannot be read is a future that failed."""
        try:
            return self.engine.submit(read_wire(wire), job_id=job_id, on_start=on_start)
        except JobFailed as error:
            return failed(error)

    def ready(self, job_id: str, future: Future[Result]) -> None:
        """Lay an outcome down for the task body that comes next."""
        self._ready[job_id] = future


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
    if wire.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise JobFailed(
            "unsupported_version",
            f"the request is of schema version {str(wire['schema_version'])[:20]} and this worker reads "
            f"{SCHEMA_VERSION}; upgrade the workers before the clients",
        )
    try:
        return parse_request(wire)
    except InvalidRequest as error:
        raise JobFailed("invalid_request", str(error)) from error


_lock = threading.Lock()


def service_for(settings: Settings) -> Service:
    """This process's service; the model is loaded at the first call. Raises like `Engine.from_settings`."""
    with _lock:  # two first tasks in two threads must not load the model twice
        return _build(settings)


@functools.cache
def _build(settings: Settings) -> Service:
    from worker.engine import Engine  # brings torch, which the command line does not need

    engine = Engine.from_settings(settings)
    engine.start()
    return Service(engine)

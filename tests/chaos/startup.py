"""Start a worker that records its deliveries, its computations and the renewals of its leases.

`python -m tests.chaos.startup DIRECTORY CLOCK worker -n one@%h ...` runs `celery -A worker worker -n one@%h ...`,
records events in DIRECTORY/PID.jsonl, and kills the process at a certain prompt. Its clock is wrong by the seconds in
the file CLOCK. Each line is written in one call before the worker continues, so that a kill -9 loses no event.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.chaos.clocks import WorkerClock, real_time

if __name__ == "__main__":
    WorkerClock(Path(sys.argv[2])).install()

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from celery.__main__ import main
from celery.signals import worker_ready

from headrace.client.wire.celery import GROUP_TASK_NAME
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.errors import EngineStopped
from headrace.worker.jobs.pool import EnginePool
from headrace.worker.jobs.redis_store import RedisStore
from headrace.worker.queue.messages import argument
from tests.chaos.jobs import POISON_PROMPT


class Notes:
    """The file of events of this process: JSON lines with the time of each."""

    def __init__(self, directory: Path) -> None:
        path = directory / f"{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, event: str, **fields: Any) -> None:
        os.write(self._file, (json.dumps({"event": event, "at": real_time(), **fields}) + "\n").encode())


def note_deliveries(notes: Notes) -> None:
    """Record `delivered`: a message with these jobs reached the pool."""
    on_apply = EnginePool.on_apply

    def noted(self: EnginePool, target: Any, args: tuple[Any, ...] = (), *rest: Any, **named: Any) -> None:
        task, task_id, headers = args[:3]
        given = argument(task, headers.get("args"), headers.get("kwargs"))
        notes.add("delivered", jobs=[member["id"] for member in given] if task == GROUP_TASK_NAME else [task_id])
        on_apply(self, target, args, *rest, **named)

    EnginePool.on_apply = noted  # type: ignore[method-assign]


def note_computations(notes: Notes) -> None:
    """Record `started` and `ended`: the engine accepted a job, and how the computation ended."""
    submit = Engine.submit

    def noted(self: Engine, request: Any, *, job_id: str, on_start: Any = None, **rest: Any) -> Future[Any]:
        notes.add("started", job=job_id)
        if request.prompt == POISON_PROMPT:
            on_start = crash(notes, on_start)
        future = submit(self, request, job_id=job_id, on_start=on_start, **rest)
        future.add_done_callback(lambda done: notes.add("ended", job=job_id, how=how(done)))
        return future

    Engine.submit = noted  # type: ignore[method-assign,assignment]


def crash(notes: Notes, on_start: Callable[[], None] | None) -> Callable[[], None]:
    """Kill the process as the kernel does when memory runs out: after the job and its neighbours got their slots."""

    def die() -> None:
        if on_start is not None:
            on_start()
        notes.add("poisoned")
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def how(done: Future[Any]) -> str:
    """How a computation ended: `succeeded`, `stopped`, or the error code."""
    if done.cancelled():
        return "cancelled"
    error = done.exception()
    if isinstance(error, EngineStopped):
        return "stopped"
    return "succeeded" if error is None else getattr(error, "code", type(error).__name__)


def note_leases(notes: Notes) -> None:
    """Record `renewed`: all leases of this process. `began` is the time that the process read for them."""
    renew = RedisStore.renew

    def noted(self: RedisStore, *args: Any, **named: Any) -> Any:
        began = real_time()
        answer = renew(self, *args, **named)
        notes.add("renewed", began=began)
        return answer

    RedisStore.renew = noted  # type: ignore[method-assign]


if __name__ == "__main__":
    own_notes = Notes(Path(sys.argv[1]))
    for install in (note_deliveries, note_computations, note_leases):
        install(own_notes)
    worker_ready.connect(lambda **_: own_notes.add("ready"), weak=False)
    sys.argv[:3] = ["celery", "-A", "worker"]
    main()

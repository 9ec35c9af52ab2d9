"""Stores the outcomes of jobs that share messages: one thread, one request to Redis for all that wait."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from headrace.client.wire.results import Result
from headrace.worker.jobs.service import Encode, Service

#: Jobs, and about as many characters of results, that one request stores.
BATCH_JOBS, BATCH_CHARS = 256, 2**24

Ended = tuple[str, Future[Result]]


class Writer:
    """Takes finished futures in any thread, and stores what they hold until Redis has taken it.

    Args:
        service: has the store, and the checkpoint tensors that are stored before.
        encode: makes the result records.
        on_stored: called with the jobs of each request that Redis has carried out.
        on_fatal: called once if the thread cannot go on.
    """

    def __init__(
        self,
        service: Service,
        encode: Encode,
        on_stored: Callable[[Sequence[Ended]], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._service, self._encode, self._on_stored, self._on_fatal = service, encode, on_stored, on_fatal
        self._ended: queue.SimpleQueue[Ended | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="headrace-writer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End when all that was put is stored, however long Redis takes."""
        self._ended.put(None)
        self._thread.join()

    def put(self, job_id: str, future: Future[Result]) -> None:
        """Store the outcome of a future that is done. Returns at once."""
        self._ended.put((job_id, future))

    def _loop(self) -> None:
        try:
            while (first := self._ended.get()) is not None:
                self._write(first)
        except BaseException as error:  # without this thread the worker would look alive and no job would end
            self._on_fatal(error)

    def _write(self, item: Ended | None) -> None:
        """Store one outcome and those that wait behind it."""
        batch: list[Ended] = []
        records: dict[str, str] = {}
        chars = 0
        while item is not None:
            batch.append(item)
            record = self._service.record(*item, self._encode)
            records.setdefault(item[0], record)
            chars += len(record)
            if self._ended.empty() or len(batch) >= BATCH_JOBS or chars >= BATCH_CHARS:
                break
            item = self._ended.get()
        else:
            self._ended.put(None)  # the end came behind them: `_loop` is to meet it next
        self._service.patiently(functools.partial(self._service.store.finish, records))
        self._on_stored(batch)

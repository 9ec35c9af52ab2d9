"""Stores the outcomes of grouped jobs: one thread, one request to Redis for all waiting outcomes."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from headrace.client.wire.results import Result
from headrace.worker.jobs.service import Encode, Service

#: One request stores at most this many jobs, and about this many characters of results.
BATCH_JOBS, BATCH_CHARS = 256, 2**24

#: A job's id, and a finished future with its outcome.
Ended = tuple[str, Future[Result]]


class ResultWriter:
    """Takes finished futures in any thread, and retries until Redis has stored what they hold.

    Args:
        service: has the store, and the checkpoint tensors, which are stored before the results.
        encode: encodes the result records.
        on_stored: called with the jobs of each request that Redis has executed.
        on_fatal: called once if the thread cannot continue.
    """

    def __init__(
        self,
        service: Service,
        encode: Encode,
        on_stored: Callable[[Sequence[Ended]], None],
        on_fatal: Callable[[BaseException], None],
    ) -> None:
        self._service, self._encode, self._on_stored, self._on_fatal = service, encode, on_stored, on_fatal
        self._inbox: queue.SimpleQueue[Ended | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="headrace-writer", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread when everything that was put is stored, however long Redis takes."""
        self._inbox.put(None)
        self._thread.join()

    def put(self, job_id: str, future: Future[Result]) -> None:
        """Store the outcome of a finished future. Returns at once."""
        self._inbox.put((job_id, future))

    def _run(self) -> None:
        try:
            while self._write():
                pass
        except BaseException as error:  # without this thread the worker would look healthy and no job would end
            self._on_fatal(error)

    def _write(self) -> bool:
        """Wait for an outcome, and store it and those queued after it. Returns whether more may follow.

        Each round has its own variables, so that no outcome is kept while the thread waits for the next.
        """
        batch: list[Ended] = []
        records: dict[str, str] = {}
        chars = 0
        item = self._inbox.get()
        while item is not None:
            batch.append(item)
            record = self._service.record(*item, self._encode)
            records.setdefault(item[0], record)
            chars += len(record)
            if self._inbox.empty() or len(batch) >= BATCH_JOBS or chars >= BATCH_CHARS:
                break
            item = self._inbox.get()
        if batch:
            self._service.retry_until_available(functools.partial(self._service.store.finish, records))
            self._on_stored(batch)
        return item is not None

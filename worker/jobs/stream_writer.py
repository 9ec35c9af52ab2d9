"""Writes the text of jobs that stream as it comes: one thread, one request to Redis for all that is new.

Events are a convenience and the result is the truth: where Redis takes none they are kept and go out together later,
and those of a job whose result is stored are let go.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import redis
import structlog

from headrace.client.wire.results import StreamEvent, StreamPiece
from headrace.worker.engine.sequence import TextDelta
from headrace.worker.jobs.store import Store

log = structlog.get_logger("headrace.worker")

#: Seconds between two pieces of one sample, and between two requests. Each costs the engine, and people read slower.
TELL_EVERY_S = WRITE_EVERY_S = 0.05
#: Where many jobs stream, requests are so much further apart for each: events cost a core time that the engine needs.
WRITE_EVERY_S_A_JOB = 0.003
#: Pause before Redis is asked again after it failed to answer.
RETRY_S = 0.5
#: A larger event is not written, nor are those behind it of use: readers take the rest from the result.
MAX_EVENT_CHARS = 2**20


@dataclass(eq=False)
class _Pending:
    """What of a job has not been written, one piece a sample."""

    pieces: dict[int, StreamPiece] = field(default_factory=dict)
    end: bool = False

    def add(self, delta: TextDelta) -> None:
        piece = self.pieces.get(delta.index)
        if piece is None:
            self.pieces[delta.index] = StreamPiece(
                index=delta.index,
                at=delta.at,
                text_at=delta.text_at,
                text=delta.text,
                token_ids=delta.token_ids,
                logprobs=delta.logprobs,
                finish_reason=delta.finish_reason,
            )
            return
        piece.text += delta.text
        piece.token_ids += delta.token_ids
        if piece.logprobs is not None:
            piece.logprobs += delta.logprobs or []
        piece.finish_reason = delta.finish_reason

    def event(self) -> str:
        text = StreamEvent(pieces=list(self.pieces.values()), end=self.end).model_dump_json(exclude_defaults=True)
        return text if len(text) <= MAX_EVENT_CHARS else StreamEvent(end=self.end).model_dump_json()


class EventWriter:
    """Takes deltas in the engine's thread and writes them in its own, which starts with the first job that streams."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._inbox: queue.SimpleQueue[tuple[str, TextDelta | None] | None] = queue.SimpleQueue()
        self._streaming: set[str] = set()
        self._pending: dict[str, _Pending] = {}
        self._thread: threading.Thread | None = None
        self._down = False

    def begin(self, job_id: str) -> Callable[[TextDelta], None]:
        """A job that streams goes to the engine. Returns what is to be called with its deltas."""
        self._streaming.add(job_id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="headrace-events", daemon=True)
            self._thread.start()
        return functools.partial(self._put, job_id)

    def _put(self, job_id: str, delta: TextDelta) -> None:
        self._inbox.put((job_id, delta))

    def end(self, job_ids: Iterable[str]) -> None:
        """The results of jobs are stored: tell those who wait. Jobs that do not stream are passed over."""
        for job_id in self._streaming.intersection(job_ids):
            self._streaming.discard(job_id)
            self._inbox.put((job_id, None))

    def stop(self) -> None:
        """Try once to write what is left, and end."""
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join()

    def _loop(self) -> None:
        while self._take():
            try:
                self._write()
            except Exception:  # the jobs go on, and their results come
                self._pending.clear()
                log.error("events.failed", trace=traceback.format_exc())
            time.sleep(max(WRITE_EVERY_S, len(self._streaming) * WRITE_EVERY_S_A_JOB))
        self._write()

    def _take(self) -> bool:
        """Wait for something to write, and take all there is. Says whether there may be more."""
        try:
            item = self._inbox.get(timeout=RETRY_S if self._pending else None)
            while item is not None:
                job_id, delta = item
                pending = self._pending.setdefault(job_id, _Pending())
                if delta is None:
                    pending.end = True
                else:
                    pending.add(delta)
                item = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _write(self) -> None:
        """Write what waits; what is refused waits on, but for jobs whose results are there."""
        if not self._pending:
            return
        try:
            refused = self._store.tell({job_id: pending.event() for job_id, pending in self._pending.items()})
        except redis.RedisError as error:
            refused = list(self._pending)
            if not self._down:
                log.warning("redis.unanswered", error=str(error))
        self._down = bool(refused)
        self._pending = {job_id: self._pending[job_id] for job_id in refused if not self._pending[job_id].end}

"""Writes the text of streaming jobs as it is computed: one thread, one request to Redis for all new text.

Events are a convenience; the result is the truth. If Redis refuses events, they are kept and written together later,
and those of a job whose result is stored are dropped.
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
from headrace.worker.engine.sequence_text import TextDelta
from headrace.worker.jobs import retry
from headrace.worker.jobs.store import Store

log = structlog.get_logger("headrace.worker")

#: Seconds between two pieces of one sample, and between two requests. Each piece and each request slow the engine down,
#: and readers do not notice delays this short.
STREAM_INTERVAL_S = WRITE_EVERY_S = 0.05
#: Each streaming job adds this many seconds between two requests: events cost CPU time that the engine needs.
WRITE_EVERY_S_A_JOB = 0.003
#: A larger event is written without its text: readers take the rest of the text from the result.
MAX_EVENT_CHARS = 2**20


@dataclass(eq=False)
class _Pending:
    """The text of a job that has not been written, one piece for each sample."""

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
                stop_reason=delta.stop_reason,
                prompt_tokens=delta.prompt_tokens,
                complete=delta.complete,
            )
            return
        piece.text += delta.text
        piece.token_ids += delta.token_ids
        if piece.logprobs is not None:
            piece.logprobs += delta.logprobs or []
        piece.finish_reason, piece.stop_reason = delta.finish_reason, delta.stop_reason
        piece.complete = delta.complete

    def event(self) -> str:
        text = StreamEvent(pieces=list(self.pieces.values()), end=self.end).model_dump_json(exclude_defaults=True)
        return text if len(text) <= MAX_EVENT_CHARS else StreamEvent(end=self.end).model_dump_json()


class StreamWriter:
    """Takes text from the engine's thread, and writes it in a thread that starts with the first streaming job."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: A job's id with new text, or with None if its result is stored. None stops the thread.
        self._inbox: queue.SimpleQueue[tuple[str, TextDelta | None] | None] = queue.SimpleQueue()
        self._streaming: set[str] = set()
        self._pending: dict[str, _Pending] = {}
        self._thread: threading.Thread | None = None
        self._down = False

    def begin(self, job_id: str) -> Callable[[TextDelta], None]:
        """Register a streaming job that goes to the engine. Returns the callback for its text."""
        self._streaming.add(job_id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="headrace-events", daemon=True)
            self._thread.start()
        return functools.partial(self._put, job_id)

    def _put(self, job_id: str, delta: TextDelta) -> None:
        self._inbox.put((job_id, delta))

    def end(self, job_ids: Iterable[str]) -> None:
        """Write the end of the stream for jobs whose results are stored. Jobs that do not stream are ignored."""
        for job_id in self._streaming.intersection(job_ids):
            self._streaming.discard(job_id)
            self._inbox.put((job_id, None))

    def stop(self) -> None:
        """Try once to write what is left, and end the thread."""
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join()

    def _run(self) -> None:
        while self._take():
            try:
                self._write()
            except Exception:  # the jobs continue, and their results are not affected
                self._pending.clear()
                log.error("events.failed", trace=traceback.format_exc())
            time.sleep(max(WRITE_EVERY_S, len(self._streaming) * WRITE_EVERY_S_A_JOB))
        self._write()

    def _take(self) -> bool:
        """Wait for something to write, and take all of it. Returns whether more may follow."""
        try:
            item = self._inbox.get(timeout=retry.RETRY_S if self._pending else None)
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
        """Write what waits. What Redis refuses is kept, unless the result of the job is stored."""
        if not self._pending:
            return
        try:
            refused = self._store.append_events({job_id: pending.event() for job_id, pending in self._pending.items()})
        except redis.RedisError as error:
            refused = list(self._pending)
            if not self._down:
                log.warning("redis.unanswered", error=str(error))
        self._down = bool(refused)
        self._pending = {job_id: self._pending[job_id] for job_id in refused if not self._pending[job_id].end}

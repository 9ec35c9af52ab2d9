"""Many rows through a bounded window: what `headrace batch`, `Client.batch` and `Client.map` share.

However many rows there are, at most `max_inflight` of them are in Redis or in this process. A row's job has an id that
follows from the run and the row, so that submitting it again, after any kind of death, finds the job that is there.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, TypeVar

from headrace.client.batch.output import Output, failure_code
from headrace.client.batch.rows import Checked, Row, RowReader, Source, check, is_column, open_source, plain, read_rows
from headrace.client.jobs.polling import Watch
from headrace.client.wire import keys
from headrace.client.wire.errors import (
    Fault,
    HeadraceError,
    InvalidBatch,
    InvalidRequest,
    QueueFull,
    RedisRefused,
    RedisUnreachable,
    UnknownJob,
    connection_advice,
)
from headrace.client.wire.requests import Result
from headrace.client.wire.results import Outcome

if TYPE_CHECKING:
    from headrace.client.client import Client, _Draft

log = logging.getLogger("headrace.client")

#: Enough for a few workers of 64 slots to always find work; vLLM's run-batch has the same.
MAX_INFLIGHT = 1024
#: Rows submitted at once.
CHUNK = 256
#: Longest pause, and the one before Redis is asked again after it refused or was away.
RETRY_S = 0.5
#: Jobs without a result are submitted again this often, which changes nothing unless Redis has lost them.
HEAL_S = 30.0
#: How often it is said that nobody serves the queue, or that Redis is away.
REMIND_S = 30.0
#: What Redis says when waiting does not help.
_FOR_EVER = ("noperm", "noauth", "wrongpass", "permission")

K = TypeVar("K")
Tick = Callable[[], None]
Tell = Callable[[str], None]


class DropBatch(Exception):
    """Raised by an `on_progress` of a user's own to end a batch: its jobs that are outstanding are cancelled."""


def warn(message: str) -> None:
    """Where notices go that nobody else takes."""
    log.warning("%s", message)


class Window(Generic[K]):
    """Keeps up to `size` jobs queued or running, and gives each with its outcome, as they end or in order.

    Redis may be away, full or restarted with less in it: then this waits, says so, and goes on.

    Args:
        size: jobs that have been taken from the input and not been given back.
        ordered: give them back in the order of the input; the first one that is not done holds back the others.
        tell: called with a line when there is something to know.
        tick: called at least every RETRY_S.
    """

    def __init__(
        self,
        client: Client,
        *,
        size: int = MAX_INFLIGHT,
        ordered: bool = False,
        tell: Tell = warn,
        tick: Tick = lambda: None,
    ) -> None:
        if type(size) is not int or size < 1:
            raise InvalidRequest("max_inflight", repr(size)[:80], "a whole number of at least 1")
        self._client, self._size, self._ordered, self._tell, self._tick = client, size, ordered, tell, tick
        self._waiting: dict[str, tuple[int, K, _Draft]] = {}  # accepted jobs
        self._watch = Watch()
        self._unsent: deque[tuple[int, K, _Draft]] = deque()
        self._done: dict[int, tuple[K, Outcome | Exception]] = {}  # by place in the input
        self._taken = self._given = 0
        self._chunk = CHUNK
        self._healed_at = self._news_at = self._reminded_at = time.monotonic()
        self._silent_since: float | None = None

    @property
    def outstanding(self) -> int:
        """Jobs that are queued or running."""
        return len(self._waiting)

    def run(self, items: Iterable[tuple[K, _Draft | Exception]]) -> Iterator[list[tuple[K, Outcome | Exception]]]:
        """Outcomes, a few at a time, of drafts or of errors that stand for one.

        Raises:
            RedisUnreachable, RedisRefused: for a reason that waiting does not mend.
        """
        source = iter(items)
        more = True
        while True:
            more = self._take(source) if more else False
            self._submit()
            self._collect()
            if ready := self._ready():
                yield ready
            elif not more and not self._waiting and not self._unsent:
                return
            self._heal()
            self._remind()
            self._tick()
            refused = self._unsent or self._silent_since is not None
            time.sleep(RETRY_S if refused else min(self._watch.rest_s, RETRY_S))

    def drop(self) -> None:
        """Cancel what is outstanding: nobody will ask for it."""
        with contextlib.suppress(RedisUnreachable, RedisRefused):
            try:
                self._client.cancel(self._waiting)
            except UnknownJob:  # Redis has lost some, and others of their part were not cancelled
                for job_id in self._waiting:
                    with contextlib.suppress(UnknownJob):
                        self._client.cancel(job_id)

    def _take(self, source: Iterator[tuple[K, _Draft | Exception]]) -> bool:
        """Fill the window from the input. Returns whether there may be more."""
        room = self._size - (self._taken - self._given)
        if room < min(CHUNK, self._size // 4):
            return True  # a few at a time would each need a message of their own
        for key, draft in itertools.islice(source, room):
            if isinstance(draft, Exception):
                self._done[self._taken] = (key, draft)
            else:
                self._unsent.append((self._taken, key, draft))
            self._taken += 1
            room -= 1
        return room == 0

    def _submit(self) -> None:
        while self._unsent:
            part = list(itertools.islice(self._unsent, self._chunk))
            if not self._send([draft for *_, draft in part]):
                return
            for entry in part:
                self._unsent.popleft()
                self._waiting[entry[2].id] = entry
                self._watch.add(entry[2].id)
            self._chunk = min(self._chunk * 2, CHUNK)

    def _send(self, drafts: list[_Draft]) -> bool:
        try:
            self._client._queue(drafts)
        except QueueFull as error:
            self._chunk = max(1, self._chunk // 2)  # a part may fit
            self._notice(str(error))
            return False
        except (RedisUnreachable, RedisRefused) as error:
            self._lost_sight(error)
            return False
        self._in_sight()
        return True

    def _collect(self) -> None:
        if not self._waiting:
            return
        try:
            news = self._client._ask(self._watch)
        except (RedisUnreachable, RedisRefused) as error:
            for job_id in self._watch.failed():
                self._watch.add(job_id)  # here nobody is given up
            self._lost_sight(error)
            return
        self._in_sight()
        for job_id, outcome in news.outcomes.items():
            place, key, _ = self._waiting.pop(job_id)
            self._done[place] = (key, outcome)
        # Accepted and gone again: Redis has lost its last second.
        self._unsent.extend(self._waiting.pop(job_id) for job_id in news.unknown)
        if news.outcomes:
            self._news_at = self._reminded_at = time.monotonic()

    def _ready(self) -> list[tuple[K, Outcome | Exception]]:
        if not self._ordered:
            ready = list(self._done.values())
            self._done.clear()
        else:
            ready = []
            while (entry := self._done.pop(self._given + len(ready), None)) is not None:
                ready.append(entry)
        self._given += len(ready)
        return ready

    def _lost_sight(self, error: RedisUnreachable | RedisRefused) -> None:
        # A unix socket that is not there is a server that is being started, and no path that has to be corrected.
        advice = None if error.url.startswith("unix:") else connection_advice(error.reason)
        if advice or any(sign in error.reason.lower() for sign in _FOR_EVER):
            raise error
        if self._silent_since is None:
            self._silent_since = time.monotonic()
            self._tell(f"{error}; waiting for it")
            self._reminded_at = time.monotonic()
        else:
            self._notice(f"{error}; waiting for it since {time.monotonic() - self._silent_since:.0f} s")

    def _in_sight(self) -> None:
        if self._silent_since is not None:
            self._tell(f"Redis answers again, after {time.monotonic() - self._silent_since:.0f} s")
            self._silent_since = None
            self._healed_at = 0.0  # it may have lost what it had not written to disk

    def _heal(self) -> None:
        """Submit again what has no outcome: a job that Redis has is left alone, one that it has lost is queued anew."""
        now = time.monotonic()
        if now - self._healed_at < HEAL_S or self._silent_since is not None:
            return
        self._healed_at = now
        drafts = [draft for *_, draft in self._waiting.values()]
        for start in range(0, len(drafts), CHUNK):
            if not self._send(drafts[start : start + CHUNK]):
                return

    def _remind(self) -> None:
        """Say plainly when nothing comes because nobody computes."""
        now = time.monotonic()
        if (
            not self._waiting
            or now - max(self._news_at, self._reminded_at) < REMIND_S
            or self._silent_since is not None
        ):
            return
        self._reminded_at = now
        with contextlib.suppress(HeadraceError):
            status = self._client.status()
            for model in sorted({draft.model for *_, draft in self._waiting.values()}):
                if not status.serves(model):
                    self._tell(
                        f"{len(self._waiting)} jobs wait and no worker serves queue {keys.queue(model)}; "
                        "start one with `celery -A worker worker`"
                    )

    def _notice(self, message: str) -> None:
        """Say it, but not all the time."""
        if time.monotonic() - self._reminded_at >= REMIND_S:
            self._reminded_at = time.monotonic()
            self._tell(message)


# --- files ---------------------------------------------------------------------------------------------------------


@dataclass
class BatchReport:
    """How far a batch is, and in the end what came of it: counts of rows. `before` stood in the output."""

    rows: int = 0
    before: int = 0
    failed_before: int = 0
    succeeded: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    outstanding: int = 0
    started_at: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def failed(self) -> int:
        """Rows that failed in this run."""
        return self.failures.total()

    @property
    def left(self) -> int:
        """Rows that are not done."""
        return self.rows - self.before - self.succeeded - self.failed

    def count(self, outcome: Outcome | Exception) -> None:
        """Add a row that is done."""
        if isinstance(outcome, Result):
            self.succeeded += 1
            self.prompt_tokens += outcome.usage.prompt_tokens
            self.completion_tokens += outcome.usage.completion_tokens
        else:
            self.failures[failure_code(outcome)] += 1
        self.seconds = time.monotonic() - self.started_at

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": self.rows,
            "before": self.before,
            "failed_before": self.failed_before,
            "succeeded": self.succeeded,
            "failed": self.failed,
            "failures": dict(self.failures),
            "left": self.left,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(self.seconds, 3),
        }


class Batch:
    """One input, checked. `run` computes what its output does not have yet.

    Args:
        source: a path (gzipped or not), a binary file, or an iterable of prompts and mappings. What can be read only
            once is copied to a temporary file.
        params: for rows that do not say otherwise.
        text: lines of a file are prompts.
        limit: only the first rows.
        models: what rows may name as their model; any if not given.
        on_line: called with the number of lines that are checked, every thousand.

    Raises:
        InvalidBatch: rows are wrong; all are listed.
    """

    def __init__(
        self,
        client: Client,
        source: str | Path | IO[bytes] | Iterable[Any],
        params: Mapping[str, Any] | None = None,
        *,
        text: bool = False,
        limit: int | None = None,
        models: Collection[str] | None = None,
        on_line: Callable[[int], None] | None = None,
    ) -> None:
        #: Whom jobs go to; it may be changed before `run`.
        self.client = client
        self._given, self._limit = source, limit
        self._reader = RowReader(client.model_name, params or {}, text=text, models=models)
        self._source: Source = open_source(source)
        self.checked: Checked = check(self._source, self._reader, client._prepare, limit=limit, on_line=on_line)

    def rows(self) -> Iterator[Row]:
        """The rows, read again."""
        return read_rows(self._source, self._reader, limit=self._limit)

    def run(
        self,
        output: str | Path,
        *,
        errors: str | Path | None = None,
        resume: bool = False,
        retry_errors: bool = False,
        overwrite: bool = False,
        max_inflight: int = MAX_INFLIGHT,
        ordered: bool = False,
        tell: Tell = warn,
        on_progress: Callable[[BatchReport], None] = lambda _: None,
    ) -> BatchReport:
        """Compute the rows and write each when it is done.

        Raises:
            OutputRefused: the output is the input, is in use, or exists and neither `resume` nor `overwrite` is set.
            InvalidBatch: the output holds rows of other requests under the same names.
            InputChanged: the input is not what it was.
        """
        report = BatchReport(rows=self.checked.rows)
        with contextlib.closing(Output(output, errors)) as sink:
            sink.check_free(self._given, resume=resume or retry_errors, overwrite=overwrite)
            done = bytearray() if overwrite else self._done(sink, retry_errors)
            report.before, report.failed_before = sum(map(int.bit_count, done)), sink.failed_before
            sink.open(overwrite=overwrite)
            missing = (row for row in self.rows() if not _is_set(done, row.line))
            drafts = ((row, self._draft(row, sink.run)) for row in missing)
            window: Window[Row] = Window(
                self.client, size=max_inflight, ordered=ordered, tell=tell, tick=lambda: on_progress(report)
            )
            on_progress(report)
            try:
                for pairs in window.run(drafts):
                    sink.write(pairs)
                    for _, outcome in pairs:
                        report.count(outcome)
                    report.outstanding = window.outstanding
                    on_progress(report)
            except DropBatch:
                window.drop()
                raise
            sink.finish()
        return report

    def _done(self, sink: Output, retry_errors: bool) -> bytearray:
        """A bit for each line of the input: whether its row stands in the output."""
        there = sink.done(retry_errors=retry_errors)
        done = bytearray(self.checked.lines // 8 + 1)
        for line, agrees in self.checked.index.matches(there):
            if not agrees:
                sink.abandon()
                message = "the output has this custom_id with another request, model or parameters; compute all again "
                raise InvalidBatch([Fault(line, "custom_id", f"{message}(--overwrite) or write to another file")])
            done[line // 8] |= 1 << line % 8
        return done

    def _draft(self, row: Row, run: str) -> _Draft:
        return self.client._prepare({**row.fields, "id": row.job_id(run)})


def _is_set(bits: bytearray, line: int) -> bool:
    return line // 8 < len(bits) and bool(bits[line // 8] >> line % 8 & 1)


# --- prompts in, results out, in order -------------------------------------------------------------------------------


def map_prompts(
    client: Client,
    prompts: Iterable[Any],
    params: Mapping[str, Any],
    *,
    max_inflight: int = MAX_INFLIGHT,
    return_exceptions: bool = False,
) -> Iterator[Any]:
    """See `Client.map`."""
    if not is_column(prompts):
        raise InvalidRequest("prompts", f"a {type(prompts).__name__}", "an iterable of prompts; use submit for one")
    window: Window[int] = Window(client, size=max_inflight, ordered=True)
    return _mapped(window, _drafts(client, prompts, params), return_exceptions)


def _mapped(
    window: Window[int], drafts: Iterator[tuple[int, _Draft | Exception]], return_exceptions: bool
) -> Iterator[Any]:
    try:
        for pairs in window.run(drafts):
            for _, outcome in pairs:
                if isinstance(outcome, Exception) and not return_exceptions:
                    raise outcome
                yield outcome
    finally:
        window.drop()


def _drafts(
    client: Client, prompts: Iterable[Any], params: Mapping[str, Any]
) -> Iterator[tuple[int, _Draft | Exception]]:
    run = secrets.token_hex(6)
    for index, item in enumerate(prompts):
        item = plain(item)
        own = item if isinstance(item, Mapping) else {"prompt": item}
        try:
            draft = client._prepare({**params, **own, "id": f"{run}.{index}"})
            with contextlib.suppress(RedisUnreachable, RedisRefused):  # the window waits for a Redis that is away
                client._check_served([draft])
            yield index, draft
        except InvalidRequest as error:
            yield index, InvalidRequest(f"prompts[{index}].{error.field}", error.value, error.expected)

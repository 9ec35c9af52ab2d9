"""Read jobs from Redis: states, results, streamed text, captured tensors."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import redis

from headrace.client.jobs.cancelling import Canceller
from headrace.client.jobs.lost import find_lost
from headrace.client.jobs.polling import LAST_POLL_S, REMIND_S, PollState, Updates
from headrace.client.jobs.status import Status, read_status
from headrace.client.wire import keys
from headrace.client.wire.activations import TENSOR_NAMES
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.errors import (
    InvalidRequest,
    JobLost,
    NoCheckpoints,
    NoWorker,
    RedisUnreachable,
    ResultTimeout,
    UnknownJob,
    UnreadableRecord,
)
from headrace.client.wire.redis import connect, redis_errors
from headrace.client.wire.results import Outcome, State, parse_outcome, parse_state
from headrace.client.wire.start_advice import start_worker, start_worker_here
from headrace.client.wire.suitability import ServerReport, read_report
from headrace.client.wire.values import show
from headrace.config.model_names import is_served_name

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("headrace.client")

#: Seconds after which a job that is missing at the end of a wait is looked for again.
LOOK_AGAIN_S = 0.2
#: A client spends at most this share of its time on looking for lost messages.
LOOK_SHARE = 0.05


class JobReader:
    """Reads jobs from one Redis. All methods raise RedisUnreachable and RedisRefused.

    Errors about one job have a `job_id`; `client.jobs.handle.job_in_errors` adds the job itself.

    Args:
        connection: to the Redis at `url`.
        model_name: the model whose queue `status` always includes.
        result_ttl_s: how long in seconds the ends of jobs are kept that no worker ended.
    """

    def __init__(self, url: str, connection: redis.Redis, *, model_name: str, result_ttl_s: int = 86_400) -> None:
        #: The Redis where the jobs are.
        self.url = url
        self._redis, self._model_name, self._look_at = connection, model_name, 0.0
        #: Cancels jobs, and ends those that wait.
        self.canceller = Canceller(url, connection, self._poll_many, result_ttl_s=result_ttl_s)

    def poll(self, job_id: str) -> tuple[Outcome | None, State]:
        """The outcome and the state of a job. Ignore the state if there is an outcome.

        Raises:
            UnknownJob: there is no such job.
            UnreadableRecord: the job's record is not valid.
        """
        ((outcome, state),) = self._poll_many([job_id])
        return outcome, cast("State", state)

    def cancel(self, job_ids: Sequence[str]) -> list[bool]:
        """Cancel jobs; see `Canceller.cancel`. Returns for each job whether it had not ended yet."""
        return self.canceller.cancel(job_ids)

    def updates(
        self,
        job_ids: Iterable[str],
        timeout: float | None,
        *,
        events: bool = False,
        accepted: Collection[str] = (),
    ) -> Iterator[Updates]:
        """Wait for jobs: yield updates until every job has ended.

        Args:
            timeout: seconds in all; None waits without limit, and logs a warning every REMIND_S if no worker serves the
                queue.
            events: include the entries of the jobs' event streams, from the first entry.
            accepted: those of the jobs that Redis has had before.

        Raises:
            ResultTimeout, NoWorker: some have not ended after `timeout` seconds.
            UnknownJob: one does not exist.
            JobLost: Redis has lost one.
        """
        check_timeout(timeout)
        polls = PollState()
        for job_id in job_ids:
            polls.add(job_id, events=events, accepted=job_id in accepted)
        started, remind_after = time.monotonic(), REMIND_S
        while polls:
            left = LAST_POLL_S if timeout is None else max(0.0, started + timeout - time.monotonic())
            if updates := self._poll_unless_given_up(polls, left):
                yield updates
                if missing := updates.missing_error():
                    raise missing
            elif timeout is not None and time.monotonic() - started >= timeout:
                raise self.timeout_error(next(iter(polls)), timeout)
            elif timeout is None and time.monotonic() - started > remind_after:
                remind_after += REMIND_S
                self.warn_without_worker(list(polls))
            if polls:
                time.sleep(min(polls.rest_s, left))

    def poll_once(self, polls: PollState, block_s: float = 0.0) -> Updates:
        """Send the next request of `polls` in one round trip, and return the updates in the replies."""
        with redis_errors(self.url):
            pipe = self._redis.pipeline(transaction=False)
            for command in polls.request(block_s):
                pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            return polls.answer(pipe.execute(raise_on_error=False))

    def checkpoints(self, job_id: str, max_bytes: int | None = None) -> dict[str, np.ndarray]:
        """The captured tensors of a job by name, in the order of the checkpoints.

        Args:
            max_bytes: if given, only tensors with known names are read, at most this many bytes in all.

        Raises:
            NoCheckpoints: the job has none.
            InvalidRequest: they take more than `max_bytes`.
        """
        with redis_errors(self.url):  # importing opens files too
            from safetensors import SafetensorError
            from safetensors.numpy import load  # imported here: importing numpy is slow, and few callers need it

        with redis_errors(self.url), connect(self.url, text=False) as connection:
            if max_bytes is None:
                fields = cast("dict[bytes, bytes]", connection.hgetall(keys.checkpoint(job_id)))
            else:
                fields = _read_tensors(connection, job_id, max_bytes)
        if not fields:
            raise NoCheckpoints(job_id)
        try:
            found = {name.decode(): load(data)["tensor"] for name, data in fields.items()}
        except (SafetensorError, KeyError, UnicodeDecodeError) as error:
            raise NoCheckpoints(job_id) from error
        return {name: found[name] for name in dict.fromkeys([*TENSOR_NAMES, *sorted(found)]) if name in found}

    def status(self) -> Status:
        """Queues, workers and slots at this moment."""
        with redis_errors(self.url):
            return read_status(self._redis, self._model_name)

    def server_report(self) -> ServerReport:
        """What Redis says of itself, and why it would lose jobs."""
        with redis_errors(self.url):
            return read_report(self._redis, RedisClock())

    def timeout_error(self, job_id: str, timeout: float) -> ResultTimeout:
        """The error for a wait that took too long: NoWorker if no worker serves the job's queue.

        A job that waits for its ETA needs no worker before that.

        Raises:
            JobLost: Redis has lost the job.
        """
        try:
            outcome, state = self.poll(job_id)
        except UnknownJob:  # Redis had it when the wait began; a record may be absent for a moment
            time.sleep(LOOK_AGAIN_S)
            try:
                outcome, state = self.poll(job_id)
            except UnknownJob:
                raise JobLost(job_id) from None
        if outcome is None and state == "queued" and self.find_lost([job_id]):
            raise JobLost(job_id, without_message=True)
        if outcome is None and state == "queued" and (until := self.waits_until(job_id)) is not None:
            return ResultTimeout(job_id, timeout, state, until)
        model = self._model_of(job_id)
        if outcome is None and not self.status().serves(model):
            start = (start_worker(self.url, [model]), start_worker_here(self.url, [model]))
            return NoWorker(job_id, timeout, state, keys.queue(model), *start)
        return ResultTimeout(job_id, timeout, state)

    def find_lost(self, job_ids: Iterable[str]) -> list[str]:
        """Those of the jobs that are queued and have no message, so that nobody will compute them; see `find_lost`.

        Returns nothing if the last look was expensive and is not long ago: when many waits time out, each would look.
        """
        if time.monotonic() < self._look_at:
            return []
        began_s = time.thread_time()
        try:
            with redis_errors(self.url):
                return find_lost(self._redis, job_ids)
        finally:
            self._look_at = time.monotonic() + (time.thread_time() - began_s) / LOOK_SHARE

    def waits_until(self, job_id: str) -> float | None:
        """The Unix time of the job's ETA or countdown; None if it has none, or if that time has passed."""
        with redis_errors(self.url):
            value = cast("str | None", self._redis.hget(keys.job(job_id), keys.WAITS_UNTIL))
        try:
            until = float(value or 0)
            datetime.fromtimestamp(until, UTC)
        except (ValueError, OverflowError, OSError):  # anybody may have written it
            return None
        return until if until > time.time() else None

    def warn_without_worker(self, waiting: list[str]) -> None:
        """Log a warning if no worker serves the queue of the first job.

        Raises:
            JobLost: one of the jobs is queued and has no message.
        """
        with contextlib.suppress(RedisUnreachable):
            for lost in self.find_lost(waiting):
                raise JobLost(lost, without_message=True)
            if self.waits_until(waiting[0]) is not None:
                return
            model = self._model_of(waiting[0])
            if not self.status().serves(model):
                log.warning(
                    "%d jobs wait and no worker serves queue %s; start one with %s",
                    len(waiting),
                    keys.queue(model),
                    start_worker(self.url, [model]),
                )

    def _poll_many(self, job_ids: Sequence[str]) -> list[tuple[Outcome | None, str | None]]:
        with redis_errors(self.url):
            pipe = self._redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipe.get(keys.result(job_id))
                pipe.hmget(keys.job(job_id), "state", "attempts")
            answers = [_text_or_empty(answer) for answer in map(_state_of, pipe.execute(raise_on_error=False))]
        found = [(parse_outcome(record), state) for record, state in zip(answers[::2], answers[1::2], strict=True)]
        for job_id, (outcome, state) in zip(job_ids, found, strict=True):
            # A record may outlive its result by a second.
            if outcome is None and (state is None or parse_state(state)[1] is not None):
                raise UnknownJob(job_id)
            if outcome is None and state not in ("queued", "running"):
                raise UnreadableRecord(job_id)
        return found

    def _poll_unless_given_up(self, polls: PollState, block_s: float) -> Updates:
        """Poll once. While Redis does not answer, returns no updates until `polls` gives up a job.

        Raises:
            RedisUnreachable: Redis does not answer, and `polls` has given up a job.
        """
        try:
            return self.poll_once(polls, block_s)
        except RedisUnreachable:
            if polls.failed():
                raise
            return Updates()

    def _model_of(self, job_id: str) -> str:
        with redis_errors(self.url):
            model = cast("str | None", self._redis.hget(keys.job(job_id), "model"))
        return model if model is not None and is_served_name(model) else self._model_name


def check_timeout(timeout: Any) -> None:
    """Refuse a timeout that is neither None nor a number of seconds. Raises InvalidRequest."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
        raise InvalidRequest("timeout", show(timeout), "a number of seconds from 0, or None")


def _read_tensors(connection: redis.Redis, job_id: str, max_bytes: int) -> dict[bytes, bytes]:
    """Read a job's tensors one by one, up to `max_bytes`: the values in Redis may have any size."""
    fields, size = {}, 0
    for name in TENSOR_NAMES:
        data = cast("bytes | None", connection.hget(keys.checkpoint(job_id), name))
        if data is not None:
            fields[name.encode()] = data
            size += len(data)
        if size > max_bytes:
            expected = f"{max_bytes} at most; request fewer (8, the logits, is the largest), or shorten the prompt"
            raise InvalidRequest("checkpoints", f"over {max_bytes} bytes of tensors of job {job_id}", expected)
    return fields


def _state_of(answer: Any) -> Any:
    """The state in a job's record, from its fields `state` and `attempts`; any other answer as it is.

    A producer that is not this client writes no record. A worker that takes the message writes `attempts` first.
    """
    if not isinstance(answer, list):
        return answer
    state, attempts = answer
    return "queued" if state is None and attempts is not None else state


def _text_or_empty(answer: Any) -> str | None:
    """The answer for a key or a field; "" if the key has another type, so that it is not a valid record."""
    if isinstance(answer, Exception):
        if "WRONGTYPE" in str(answer):
            return ""
        raise answer
    return cast("str | None", answer)

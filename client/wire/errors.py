"""The errors of headrace; those of batches are in `client.batch.errors`.

HeadraceError
├── InvalidRequest (ValueError)         refused by submit; nothing was queued
├── InvalidBatch (ValueError)           lines of a batch are wrong; nothing was queued
├── InputChanged                        the input of a batch changed while it was read
├── OutputRefused                       a batch must not or cannot write there
├── QueueFull                           refused by submit; nothing was queued
├── RedisUnreachable (ConnectionError)  Redis did not answer
├── RedisRefused                        Redis refuses: it is full or read-only, or the user lacks a right
├── RedisUnsuitable                     refused by submit: this Redis loses jobs, or cannot hold them
├── UnknownJob (KeyError)               no job has this id, or its record has expired
│   └── JobLost                         it was accepted, and Redis has it no more
├── UnreadableRecord                    something else has overwritten the job's record
├── NoCheckpoints (KeyError)            the job captured no tensors, or they have expired
├── StreamChanged                       the streamed text differs from the job's result
├── ResultTimeout (TimeoutError)        no result yet; the job continues
│   └── NoWorker                        ... and no worker serves the queue
└── JobError                            the job ended without a result
    ├── JobFailed                       `code` says why
    ├── JobCancelled
    ├── JobExpired                      its timeout_s passed
    └── ResultNotKept                   it succeeded, and was sent with ignore_result=True
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Self

from headrace.client.wire.connection_advice import NO_DESCRIPTORS, connection_advice


class HeadraceError(Exception):
    """The base class of all errors of headrace.

    Attributes:
        code: a fixed identifier, for example `queue_full`; docs/errors.md says what to do about each.
        job: the `client.Job` or `client.AsyncJob` that the error is about; None if it is not about one job.
    """

    code = "error"
    job: Any = None

    def about(self, job: Any) -> Self:
        """Set `job` and return this error."""
        self.job = job
        return self


class InvalidRequest(HeadraceError, ValueError):
    """Raised when a request is wrong; it was not queued.

    Attributes:
        field: the wrong parameter, for example `max_tokens`.
        value: the given value, shortened; prompts are never quoted.
        expected: which values are right.
    """

    code = "invalid_request"

    def __init__(self, field: str, value: str, expected: str) -> None:
        # A name or a value from outside may have lone surrogates, which cannot be printed or stored.
        field, value = (text.encode("utf-8", "backslashreplace").decode() for text in (field, value))
        super().__init__(field, value, expected)
        self.field, self.value, self.expected = field, value, expected

    def __str__(self) -> str:
        return f"{self.field}: got {self.value}; expected {self.expected}"


class QueueFull(HeadraceError):
    """Raised when the queue already holds as many jobs as `HEADRACE_MAX_QUEUE` allows."""

    code = "queue_full"

    def __init__(self, queue: str, depth: int, limit: int) -> None:
        super().__init__(queue, depth, limit)
        self.queue, self.depth, self.limit = queue, depth, limit

    def __str__(self) -> str:
        return (
            f"queue {self.queue} holds {self.depth} jobs and takes at most {self.limit}; "
            "try again later, add workers, or raise HEADRACE_MAX_QUEUE"
        )


class RedisFailed(HeadraceError):
    """Base class of the errors of Redis. The URL in their messages has no password.

    Attributes:
        accepted: the jobs that `submit_many` had already queued, as a `client.Job` by their index in the requests.
            These jobs continue. They need not be the first ones: messages are sent by priority and model. One more
            message, of at most 16 jobs, may have been queued if Redis received it but did not answer; to repeat such
            a call safely, give the jobs ids.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason
        self.accepted: dict[int, Any] = {}

    def _with_accepted(self, text: str) -> str:
        return f"{text}. {len(self.accepted)} jobs were queued before, see .accepted" if self.accepted else text


class RedisUnreachable(RedisFailed, ConnectionError):
    """Raised when Redis cannot be reached.

    Attributes:
        start: what to do if no Redis runs there (`client.wire.start_advice`).
        start_here: the same for users of the HTTP API, without paths and addresses.
    """

    code = "redis_unreachable"

    def __init__(self, url: str, reason: str, start: str = "", start_here: str = "") -> None:
        super().__init__(url, reason)
        self.start = start or "start it, or correct HEADRACE_REDIS_URL"
        self.start_here = start_here or "start the Redis that HEADRACE_REDIS_URL names"
        self.args = (url, reason, self.start, self.start_here)

    def __str__(self) -> str:
        advice = connection_advice(self.reason) or self.start
        if NO_DESCRIPTORS.lower() in self.reason.lower():
            advice = "this process may open no more files: close some, or raise the limit with `ulimit -n 4096`"
        return self._with_accepted(f"Redis at {self.url} cannot be reached ({self.reason}); {advice}")


class RedisRefused(RedisFailed):
    """Raised when Redis answers with an error: it is out of memory, read-only, or the user lacks a right."""

    code = "redis_refused"

    def __str__(self) -> str:
        advice = "check its memory limit, its disk, and the user's rights"
        return self._with_accepted(f"Redis at {self.url} refused the command ({self.reason}); {advice}")


class RedisUnsuitable(RedisFailed):
    """Raised by `submit` and by workers when the settings of Redis would lose jobs: it evicts keys, or is a cluster."""

    code = "redis_unsuitable"

    def __str__(self) -> str:
        return self._with_accepted(
            f"Redis at {self.url} is not fit for jobs: {self.reason}. HEADRACE_REDIS_UNSUITABLE=allow uses it "
            "nevertheless"
        )


class UnknownJob(HeadraceError, KeyError):
    """Raised when no job has this id: it was never submitted here, or its record has expired."""

    code = "unknown_job"

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"no job {self.job_id!r} on this Redis: the id is wrong, the job is on another Redis (HEADRACE_REDIS_URL), "
            "its record has expired (HEADRACE_RESULT_TTL_S), or another Celery program sent it and no worker has taken "
            "its message yet"
        )


class JobLost(UnknownJob):
    """An `UnknownJob` that was accepted: Redis had it, and has it no more. Submit it again.

    Redis was flushed, has restarted without its data, evicts keys, or a replica without the job has become the primary.
    A worker that was computing the job may still end it; `Job.status` then says so.

    Attributes:
        without_message: Redis had the job's record, but not its message; the record has been removed.
    """

    code = "job_lost"

    def __init__(self, job_id: str, *, without_message: bool = False) -> None:
        super().__init__(job_id)
        self.without_message = without_message

    def __str__(self) -> str:
        if self.without_message:
            return (
                f"job {self.job_id} was accepted, and its message is in no queue and with no worker, so nobody would "
                "compute it: submit it again. The queue was purged (`celery purge`), or another program took the "
                "message or deleted it; to end jobs that wait, use `headrace purge`"
            )
        return (
            f"job {self.job_id} was accepted, and Redis has it no more: submit it again. Redis was flushed, restarted "
            "without its data, evicted it or kept it no longer (HEADRACE_RESULT_TTL_S); `headrace status` shows how it "
            "keeps data"
        )


class UnreadableRecord(HeadraceError):
    """Raised when a job's record is not valid. The job may continue: its result is stored under another key."""

    code = "unreadable_record"

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"the record of job {self.job_id} cannot be read: another program writes to the keys of headrace on "
            "this Redis; check which users may, config/redis-users.acl"
        )


class NoCheckpoints(HeadraceError, KeyError):
    """Raised when a job has no captured tensors: it has not succeeded, did not request any, or they expired."""

    code = "no_checkpoints"

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"job {self.job_id} has no checkpoints: it was submitted without checkpoints='all', has not succeeded, "
            "or they have expired (HEADRACE_CHECKPOINT_TTL_S)"
        )


class StreamChanged(HeadraceError):
    """Raised by `stream` when a job was computed again and its text differs from the text streamed so far.

    `job.result()` has the right text. In float32 a job gives the same text on every machine; in half precision on
    machines of different kinds it may not.
    """

    code = "stream_changed"

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"job {self.job_id} was computed again on a machine that rounds differently, and its text differs from the "
            "text streamed so far; discard that and use job.result()"
        )


class ResultTimeout(HeadraceError, TimeoutError):
    """Raised when a result is not available within the timeout. The job continues; wait for it again.

    Attributes:
        waits_until: the Unix time of the job's ETA or countdown, if it is to come; no worker begins the job before.
    """

    code = "result_timeout"

    def __init__(self, job_id: str, timeout_s: float, state: str, waits_until: float | None = None) -> None:
        super().__init__(job_id, timeout_s, state, waits_until)
        self.job_id, self.timeout_s, self.state, self.waits_until = job_id, timeout_s, state, waits_until

    def __str__(self) -> str:
        if self.waits_until is not None:
            until = datetime.fromtimestamp(self.waits_until, UTC)
            return (
                f"job {self.job_id} is still {self.state} after {self.timeout_s:g} s: it was sent to Celery with an "
                f"ETA or countdown and waits until {until:%Y-%m-%d %H:%M:%S} UTC; wait for it again"
            )
        return f"job {self.job_id} is still {self.state} after {self.timeout_s:g} s; it continues, wait for it again"


class NoWorker(ResultTimeout):
    """A `ResultTimeout` that is raised when no worker serves the queue of the job.

    Attributes:
        queue: the name of the queue in Celery.
        start: the command that starts a worker for it (`client.wire.start_advice`).
        start_here: the same for users of the HTTP API, without paths and addresses.
    """

    code = "no_worker"

    def __init__(
        self, job_id: str, timeout_s: float, state: str, queue: str = "", start: str = "", start_here: str = ""
    ) -> None:
        super().__init__(job_id, timeout_s, state)
        self.queue, self.start, self.start_here = queue, start or "`headrace up`", start_here or "`headrace up`"
        self.args = (job_id, timeout_s, state, queue, self.start, self.start_here)

    def __str__(self) -> str:
        return (
            f"job {self.job_id} is still {self.state} after {self.timeout_s:g} s and no worker serves queue "
            f"{self.queue}; the job waits there: start a worker with {self.start}"
        )


class JobError(HeadraceError):
    """Raised when a job ended without a result.

    Attributes:
        code: a fixed identifier, for example `context_length_exceeded`.
        message: what happened and what to do.
        partial: the text generated so far, of each sample; may be empty.
    """

    # Celery stores the arguments in its JSON result record, so an AsyncResult raises the same exception.
    def __init__(self, code: str = "", message: str = "", partial: list[str] | None = None) -> None:
        super().__init__(code or self.code, message, partial or [])
        self.code, self.message, self.partial = code or self.code, message, partial or []

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"

    def __repr__(self) -> str:
        # Celery puts this into events and logs, which must not contain generated text: so it leaves out `partial`.
        return f"{type(self).__name__}({self.code!r}, {self.message!r})"


class JobFailed(JobError):
    """Raised when the job failed; `code` says why."""


class JobCancelled(JobError):
    """Raised when the job was cancelled."""

    code = "cancelled"


class JobExpired(JobError):
    """Raised when the job did not end within its `timeout_s`."""

    code = "expired"


class ResultNotKept(JobError):
    """Raised when the job succeeded and its result was not kept, because it was sent with `ignore_result=True`."""

    code = "result_not_kept"

    def __init__(self, code: str = "", message: str = "", partial: list[str] | None = None) -> None:
        super().__init__(code, message or NOT_KEPT, partial)


NOT_KEPT = (
    "the job succeeded, and its result was not kept because the job was sent to Celery with ignore_result=True; send "
    "it without that option to read its result"
)

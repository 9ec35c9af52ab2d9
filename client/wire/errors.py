"""Everything that can go wrong, as exceptions.

HeadraceError
├── InvalidRequest (ValueError)         refused by submit; nothing was queued
├── InvalidBatch (ValueError)           lines of a batch are wrong; nothing was queued
├── InputChanged                        the input of a batch changed while it was read
├── OutputRefused                       a batch must not or cannot write there
├── QueueFull                           refused by submit; nothing was queued
├── RedisUnreachable (ConnectionError)  Redis did not answer
├── RedisRefused                        Redis answers, and refuses: it is full, read-only, or the user may not
├── UnknownJob (KeyError)               no job has this id, or its record has expired
├── UnreadableRecord                    something else wrote where the job's record should be
├── NoCheckpoints (KeyError)            no tensors were kept for this job, or not any more
├── StreamChanged                       what was streamed is not what the job came to
├── ResultTimeout (TimeoutError)        no result yet; the job goes on
│   └── NoWorker                        ... and no worker serves the queue
└── JobError                            the job ended without a result
    ├── JobFailed                       `code` says why
    ├── JobCancelled
    └── JobExpired                      its timeout_s passed
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self


class HeadraceError(Exception):
    """The base of all errors of headrace.

    Attributes:
        code: a short fixed word for programs, for example `queue_full`; docs/client.md says what to do about each.
        job: the `client.Job` (`client.AsyncJob`) it is about, where it is about one; else None.
    """

    code = "error"
    job: Any = None

    def about(self, job: Any) -> Self:
        """The same error, of this job."""
        self.job = job
        return self


class InvalidRequest(HeadraceError, ValueError):
    """Raised when a request can be known wrong before it is queued.

    Attributes:
        field: the parameter at fault, for example `max_tokens`.
        value: what was given, shortened; prompts are never quoted.
        expected: what would be right.
    """

    code = "invalid_request"

    def __init__(self, field: str, value: str, expected: str) -> None:
        super().__init__(field, value, expected)
        self.field, self.value, self.expected = field, value, expected

    def __str__(self) -> str:
        return f"{self.field}: got {self.value}; expected {self.expected}"


class Fault(NamedTuple):
    """What is wrong in one line of a batch. Line 0 is the input as a whole."""

    line: int
    field: str
    message: str


class InvalidBatch(HeadraceError, ValueError):
    """Raised when lines of a batch are wrong; nothing was queued.

    Attributes:
        faults: the first of them, by line.
        count: how many there are.
    """

    code = "invalid_batch"

    def __init__(self, faults: list[Fault], count: int | None = None) -> None:
        self.faults, self.count = faults, len(faults) if count is None else count
        super().__init__(faults, self.count)

    def __str__(self) -> str:
        lines = [f"line {fault.line}: {fault.message}" if fault.line else fault.message for fault in self.faults]
        more = [f"and {self.count - len(self.faults)} more"] if self.count > len(self.faults) else []
        return "\n".join(lines + more)


class InputChanged(HeadraceError):
    """Raised when the input of a batch is not what it was when it was checked."""

    code = "input_changed"

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line, self.reason = line, reason

    def __str__(self) -> str:
        return f"the input changed while it was read: line {self.line}: {self.reason}; resume when it is right again"


class OutputRefused(HeadraceError):
    """Raised when the output of a batch exists, is the input, is in use, or is no output of a batch."""

    code = "output_refused"


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


class _RedisFailed(HeadraceError):
    """What the errors of Redis share. The URL in their messages carries no password.

    Attributes:
        accepted: what `submit_many` had queued before, as a `client.Job` by its place in the requests; these jobs go
            on. Messages go by model and priority, so they need not be the first. One message more, of at most 16 jobs,
            may have been queued if Redis fell silent after it had it; repeat such a call with ids of your own.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason
        self.accepted: dict[int, Any] = {}

    def _with_accepted(self, text: str) -> str:
        return f"{text}. {len(self.accepted)} jobs were queued before, see .accepted" if self.accepted else text


class RedisUnreachable(_RedisFailed, ConnectionError):
    """Raised when Redis cannot be reached."""

    code = "redis_unreachable"

    def __str__(self) -> str:
        advice = connection_advice(self.reason) or "start it, or `headrace up`, or set HEADRACE_REDIS_URL"
        return self._with_accepted(f"Redis at {self.url} cannot be reached ({self.reason}); {advice}")


#: What is found out about a server that understands nothing.
NO_TLS, TLS = "the server has no TLS", "the server speaks TLS"

#: What a connection's error says -> what to do about it, for errors that waiting does not mend.
_ADVICE = {
    "certificate verify failed": "its certificate is not one that is trusted for this host: name the authority's file "
    "in HEADRACE_REDIS_URL, rediss://...?ssl_ca_certs=/path/to/ca.pem, and the host as the certificate names it",
    "no such file": "correct the paths in HEADRACE_REDIS_URL, or leave ssl_ca_certs out for the system's authorities",
    "username-password": "correct user and password in HEADRACE_REDIS_URL, redis://user:password@host",
    "authentication required": "put user and password into HEADRACE_REDIS_URL, redis://user:password@host",
    "wrong version number": "it does not speak TLS: redis:// is without",
    "record layer failure": "it does not speak TLS: redis:// is without",
    NO_TLS.lower(): "switch TLS on there, or write redis:// in HEADRACE_REDIS_URL, and all goes in the clear",
    TLS.lower(): "write rediss:// in HEADRACE_REDIS_URL, with ?ssl_ca_certs=/path/to/ca.pem if its authority is yours",
}


def connection_advice(reason: str) -> str | None:
    """What to do about an error of a connection that comes again until something is set right; None for all others."""
    return next((advice for sign, advice in _ADVICE.items() if sign in reason.lower()), None)


class RedisRefused(_RedisFailed):
    """Raised when Redis answers with an error: it is out of memory, read-only, or the user has no right."""

    code = "redis_refused"

    def __str__(self) -> str:
        advice = "see its memory limit, its disk, and the user's rights"
        return self._with_accepted(f"Redis at {self.url} refuses ({self.reason}); {advice}")


class UnknownJob(HeadraceError, KeyError):
    """Raised when no job has this id: it was never submitted here, or its record has expired."""

    code = "unknown_job"

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"no job {self.job_id!r} on this Redis: the id is wrong, another HEADRACE_REDIS_URL is meant, "
            "or its record has expired (HEADRACE_RESULT_TTL_S)"
        )


class UnreadableRecord(HeadraceError):
    """Raised when what stands in place of a job's record is none of ours. The job may go on; its result is apart."""

    code = "unreadable_record"

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"the record of job {self.job_id} cannot be read: something else writes to the keys of headrace on this "
            "Redis; see who may, config/redis-users.acl"
        )


class NoCheckpoints(HeadraceError, KeyError):
    """Raised when a job has no checkpoint tensors: it did not ask, has not succeeded, or they have expired."""

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
    """Raised by `stream` when a job that was computed again came to another text than the one told so far.

    The job itself is well: `job.result()` has its text. In float32 a job gives the same text wherever it is computed;
    half precision on machines of different kinds may not.
    """

    code = "stream_changed"

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id = job_id

    def __str__(self) -> str:
        return (
            f"job {self.job_id} was computed again, on a machine that rounds differently, and its text is not the one "
            "that was streamed so far; leave that out and take job.result()"
        )


class ResultTimeout(HeadraceError, TimeoutError):
    """Raised when the wait for a result was longer than its timeout. The job goes on; ask again."""

    code = "result_timeout"

    def __init__(self, job_id: str, timeout_s: float, state: str) -> None:
        super().__init__(job_id, timeout_s, state)
        self.job_id, self.timeout_s, self.state = job_id, timeout_s, state

    def __str__(self) -> str:
        return f"job {self.job_id} is still {self.state} after {self.timeout_s:g} s; it goes on, ask again"


class NoWorker(ResultTimeout):
    """Raised like `ResultTimeout` when, on top, no worker serves the job's queue."""

    code = "no_worker"

    def __init__(self, job_id: str, timeout_s: float, state: str, queue: str = "") -> None:
        super().__init__(job_id, timeout_s, state)
        self.args = (job_id, timeout_s, state, queue)
        self.queue = queue

    def __str__(self) -> str:
        return (
            f"job {self.job_id} is still {self.state} after {self.timeout_s:g} s and no worker serves queue "
            f"{self.queue}; the job waits there: start one with `celery -A worker worker`"
        )


class JobError(HeadraceError):
    """The job ended without a result.

    Attributes:
        code: a short fixed word, for example `context_length_exceeded`.
        message: what happened and what to do.
        partial: the texts computed so far, one a sample; may be empty.
    """

    # The arguments are what Celery's JSON result record keeps, so an AsyncResult raises the same exception.
    def __init__(self, code: str = "", message: str = "", partial: list[str] | None = None) -> None:
        super().__init__(code or self.code, message, partial or [])
        self.code, self.message, self.partial = code or self.code, message, partial or []

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"

    def __repr__(self) -> str:
        # Goes into Celery's events and logs, where no text of a user's may go: so without `partial`.
        return f"{type(self).__name__}({self.code!r}, {self.message!r})"


class JobFailed(JobError):
    """Raised when the job could not be computed; `code` says why."""


class JobCancelled(JobError):
    """Raised when the job was cancelled."""

    code = "cancelled"


class JobExpired(JobError):
    """Raised when the job was not done within its `timeout_s`."""

    code = "expired"

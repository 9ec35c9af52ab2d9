"""Judge the facts of a run. A pure function, so that tests can pass it wrong facts, which it must report."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.schedule import Kind

#: The faults in which Redis loses jobs.
LOSSES: tuple[Kind, ...] = ("lose_redis", "lose_writes")
#: How far the recorded time of an event may be off, in seconds.
CLOCK_S = 0.3
#: Memory that Redis may keep after its records are deleted: internal buffers and partly filled pages.
MEMORY_SLACK_BYTES = 2**20


@dataclass(frozen=True)
class End:
    """How a job ended: its state, with the code of a failure, or the digest of a success."""

    state: str
    code: str = ""
    digest: str = ""
    #: When this suite first saw it.
    at: float = 0.0
    #: The content of a success, from which the digest is computed.
    content: Any = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.state, self.code, self.digest

    def __str__(self) -> str:
        return " ".join(filter(None, self.key))


@dataclass
class JobFact:
    """A job that was accepted."""

    #: How it ends in an undisturbed engine; None for the poison.
    expected: End | None
    #: Begin and end of the calls that submitted it: several if the first ones raised.
    calls: list[tuple[float, float]]
    may_expire: bool = False
    cancel_asked: bool = False

    @property
    def poison(self) -> bool:
        return self.expected is None


@dataclass(frozen=True)
class Event:
    """An event in a worker process."""

    at: float
    pid: int


@dataclass(frozen=True)
class Delivery(Event):
    """A message reached the process."""

    jobs: tuple[str, ...]


@dataclass
class Computation:
    """A computation of a job; `how` is `succeeded`, an error code, or "" if its process died first."""

    job: str
    pid: int
    started: float
    ended: float | None = None
    how: str = ""


@dataclass(frozen=True)
class Death(Event):
    """The process ended: `kill` and `end` were requested, `poison` is expected, `own` is always an error.

    `weights`: it was started while its weights were replaced, and refused them.
    """

    why: str
    detail: str = ""


@dataclass(frozen=True)
class Fault:
    """A fault, when it began, and when it was undone. `pid` is the process id of the worker."""

    kind: Kind
    began: float
    ended: float
    pid: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Remains:
    """The keys in Redis without a lifetime, with their numbers of elements, and its memory without job records."""

    keys: Mapping[str, int]
    memory_bytes: int


@dataclass
class Facts:
    """Everything that was recorded in a run."""

    lease_s: float
    jobs: dict[str, JobFact] = field(default_factory=dict)
    seen: dict[str, End] = field(default_factory=dict)
    final: dict[str, End] = field(default_factory=dict)
    #: Jobs whose callers were told that Redis has lost them, and when.
    lost: dict[str, float] = field(default_factory=dict)
    deliveries: list[Delivery] = field(default_factory=list)
    computations: list[Computation] = field(default_factory=list)
    #: Process id -> its renewals: when it read the clock, and when the renewal was written.
    renewals: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    deaths: list[Death] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    before: Remains = field(default_factory=lambda: Remains({}, 0))
    after: Remains = field(default_factory=lambda: Remains({}, 0))
    #: Job records and results that never expire.
    without_lifetime: list[str] = field(default_factory=list)
    unacked: tuple[int, int] = (0, 0)
    #: Submissions that raised, by the name of the error.
    refusals: Counter[str] = field(default_factory=Counter)
    #: Errors that the worker logged, by event.
    logged: Counter[str] = field(default_factory=Counter)
    #: A job that was held by this many dying workers may be given up; 0 means no limit.
    max_attempts: int = 0


@dataclass
class Ledger:
    """The figures of a run, and the errors: the run is correct if `wrong` is empty."""

    submitted: int = 0
    submitted_again: int = 0
    #: Jobs that a worker computed although `submit` had raised: their callers never received an id.
    unclaimed: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    #: Jobs that Redis lost, and whose callers were told.
    lost: int = 0
    #: Results of workers that were started with other weights, whose fingerprint says so.
    other_weights: int = 0
    #: Harmless jobs that were held by too many dying workers.
    given_up: int = 0
    redelivered: int = 0
    computed: int = 0
    #: Repeated complete computations, by reason.
    duplicates: dict[str, int] = field(default_factory=dict)
    #: Kind of fault -> seconds from its end until a job ended that a worker held when it began.
    longest_recovery_s: dict[str, float] = field(default_factory=dict)
    actions: dict[str, int] = field(default_factory=dict)
    deaths: dict[str, int] = field(default_factory=dict)
    logged: dict[str, int] = field(default_factory=dict)
    memory_bytes: tuple[int, int] = (0, 0)
    wrong: list[str] = field(default_factory=list)


def balance(facts: Facts) -> Ledger:
    """Judge a run."""
    ledger = Ledger(
        submitted=len(facts.jobs),
        submitted_again=sum(len(job.calls) > 1 for job in facts.jobs.values()),
        refusals=dict(facts.refusals),
        ends=dict(Counter(_name(end) for end in facts.final.values())),
        lost=len(facts.lost),
        computed=sum(c.how == "succeeded" for c in facts.computations),
        longest_recovery_s=_recoveries(facts),
        actions=dict(
            Counter(f"{f.kind} {f.seconds:.0f} s" if f.kind == "kill_redis" else f.kind for f in facts.faults)
        ),
        deaths=dict(Counter(death.why for death in facts.deaths)),
        logged=dict(facts.logged),
        memory_bytes=(facts.before.memory_bytes, facts.after.memory_bytes),
    )
    history = History(facts)
    ledger.redelivered = sum(len(history.deliveries[job]) - 1 for job in history.deliveries)
    ledger.unclaimed = len(history.deliveries.keys() - facts.jobs.keys())
    for job_id, job in facts.jobs.items():
        end = facts.final.get(job_id)
        if end is not None and end.code == "max_attempts" and not job.poison:
            ledger.given_up += 1
        ledger.other_weights += end is not None and history.tells_other_weights(job, end)
        if complaint := _judge_end(history, job_id, job, end):
            ledger.wrong.append(f"{job_id} {complaint}")
    reasons: Counter[str] = Counter()
    for job_id, reason in history.duplicates():
        reasons[reason or "unexplained"] += 1
        if reason is None:
            ledger.wrong.append(f"{job_id} was completed twice for no known reason: {history.describe(job_id)}")
    ledger.duplicates = dict(reasons)
    ledger.wrong += [f"worker {d.pid} ended by itself: {d.detail}" for d in facts.deaths if d.why == "own"]
    ledger.wrong += _judge_remains(facts)
    return ledger


def _name(end: End) -> str:
    return f"{end.state} {end.code}" if end.state == "failed" else end.state


def _judge_end(history: History, job_id: str, job: JobFact, end: End | None) -> str | None:
    """The error in how a job ended; None if it ended correctly."""
    if job_id in history.facts.lost:
        return None if history.may_be_lost(job_id) else "was told lost, and Redis had lost nothing"
    if end is None:
        return f"never ended: {history.describe(job_id)}"
    seen = history.facts.seen.get(job_id)
    if seen is not None and seen.key != end.key:
        return f"ended first as {seen} and then as {end}"
    if end.state == "cancelled":
        return None if job.cancel_asked else "was cancelled without a request"
    if end.state == "expired":
        return None if job.may_expire else "expired without a time limit"
    if end.code == "max_attempts" and history.crashes(job_id) >= max(1, history.facts.max_attempts):
        return None
    expected = job.expected or End("failed", "max_attempts")
    if end.key == expected.key or history.tells_other_weights(job, end):
        return None
    return f"ended as {end} instead of {expected}{difference(expected.content, end.content)}"


def difference(expected: Any, got: Any) -> str:
    """The first place where two JSON values differ, and both values there; empty if they are equal."""
    if isinstance(expected, dict) and isinstance(got, dict):
        places: list[tuple[Any, Any, Any]] = [(k, expected.get(k), got.get(k)) for k in {**expected, **got}]
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        places = list(zip(range(len(got)), expected, got, strict=True))
    else:
        return "" if expected == got else f": {got!r:.200} instead of {expected!r:.200}"
    return next((f" {key}{found}" for key, one, other in places if (found := difference(one, other))), "")


def _judge_remains(facts: Facts) -> Iterator[str]:
    if facts.unacked != (0, 0):
        yield f"left in unacked and unacked_index: {facts.unacked}"
    for name in facts.without_lifetime[:10]:
        yield f"{name} has no lifetime"
    before, after = facts.before.keys, facts.after.keys
    for name in sorted(before.keys() | after.keys()):
        if before.get(name, 0) != after.get(name, 0):
            yield f"{name} had {before.get(name, 0)} elements and has {after.get(name, 0)}"
    grown = facts.after.memory_bytes - facts.before.memory_bytes
    if grown > MEMORY_SLACK_BYTES:
        yield f"Redis holds {grown} bytes more than before"


class History:
    """The facts, grouped by job."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.deliveries: dict[str, list[Delivery]] = defaultdict(list)
        for delivery in sorted(facts.deliveries, key=lambda delivery: delivery.at):
            for job in delivery.jobs:
                self.deliveries[job].append(delivery)
        self.computations: dict[str, list[Computation]] = defaultdict(list)
        for computation in sorted(facts.computations, key=lambda computation: computation.started):
            self.computations[computation.job].append(computation)
        self._died = {death.pid: death.at for death in facts.deaths}

    def crashes(self, job_id: str) -> int:
        """How many workers died while they held the job."""
        return sum(c.ended is None and c.pid in self._died for c in self.computations.get(job_id, ()))

    def may_be_lost(self, job_id: str) -> bool:
        """Whether Redis lost its data, or its last writes, after the job's submission began.

        A fault `lose_writes` begins with the first write that is lost: a job that was accepted earlier is still there.
        """
        calls, told = self.facts.jobs[job_id].calls, self.facts.lost[job_id]
        return any(
            calls[0][0] <= f.ended and f.began <= told and (f.kind == "lose_redis" or calls[-1][1] >= f.began - CLOCK_S)
            for f in self.facts.faults
            if f.kind in LOSSES
        )

    def tells_other_weights(self, job: JobFact, end: End) -> bool:
        """Whether a worker that was started with other weights computed the result, and its fingerprint says so."""
        if job.expected is None or job.expected.content is None or end.content is None:
            return False
        replaced = [f for f in self.facts.faults if f.kind == "replace_weights" and f.pid is None]
        return bool(replaced) and end.content["fingerprint"] != job.expected.content["fingerprint"]

    def duplicates(self) -> Iterator[tuple[str, str | None]]:
        """For each complete computation after the first one: the job, and the reason; None if it is unexplained."""
        for job_id, computations in self.computations.items():
            complete = [c for c in computations if c.how == "succeeded"]
            for first, second in itertools.pairwise(complete):
                yield job_id, self._reason(job_id, first, second)

    def _reason(self, job_id: str, first: Computation, second: Computation) -> str | None:
        if self._lease_ran_out(job_id, first, second):
            return "lease ran out"
        seen = self.facts.seen.get(job_id)
        stored = seen is not None and seen.at + CLOCK_S < second.started
        died = self._died.get(first.pid)
        if died is not None and died <= second.started + CLOCK_S and not stored:
            return "worker died before the result was stored"
        if not stored and self._sent_twice(job_id):
            return "message sent twice"
        if self._went_back(first, second):
            return "Redis lost writes"
        return None

    def _went_back(self, first: Computation, second: Computation) -> bool:
        """Whether Redis lost that the first computation had begun or ended: its message was there again."""
        return any(
            f.kind == "lose_writes" and first.started <= f.ended + CLOCK_S and second.started >= f.ended - CLOCK_S
            for f in self.facts.faults
        )

    def _lease_ran_out(self, job_id: str, first: Computation, second: Computation) -> bool:
        """Whether either worker failed to renew its lease while it held the job."""
        for one in (first, second):
            got = max(
                (d.at for d in self.deliveries.get(job_id, ()) if d.pid == one.pid and d.at <= one.started + CLOCK_S),
                default=one.started,
            )
            until = max(second.started, one.ended or 0)
            if self._longest_pause(one.pid, got, until) > self.facts.lease_s - CLOCK_S:
                return True
        return False

    def _longest_pause(self, pid: int, since: float, until: float) -> float:
        """The longest time from when one renewal read the clock until the next renewal was written."""
        renewals = self.facts.renewals.get(pid, [])
        at = bisect.bisect_left(renewals, (since, since))
        reads, writes = [since], []
        for read, written in renewals[at:]:
            if read > until:
                break
            reads.append(read)
            writes.append(written)
        return max(written - read for read, written in zip(reads, [*writes, until], strict=True))

    def _sent_twice(self, job_id: str) -> bool:
        """Whether the call that submitted the job hit a connection fault: it may have sent two messages."""
        job = self.facts.jobs.get(job_id)
        if job is None:
            return True  # its submission raised
        cut = [f for f in self.facts.faults if f.kind in ("cut", "kill_redis", "stop_redis", *LOSSES)]
        return len(job.calls) > 1 or any(
            fault.began - CLOCK_S <= end and begin <= fault.ended + CLOCK_S for begin, end in job.calls for fault in cut
        )

    def describe(self, job_id: str) -> str:
        """The history of a job in one line, in seconds since it was submitted."""
        job = self.facts.jobs.get(job_id)
        zero = job.calls[0][0] if job else 0.0
        entries = [(d.at, f"delivered to {d.pid}") for d in self.deliveries.get(job_id, ())]
        for c in self.computations.get(job_id, ()):
            entries.append((c.started, f"started by {c.pid}"))
            if c.ended is not None:
                entries.append((c.ended, f"{c.how} in {c.pid}"))
            if c.pid in self._died:
                entries.append((self._died[c.pid], f"{c.pid} died"))
        if (seen := self.facts.seen.get(job_id)) is not None:
            entries.append((seen.at, f"seen {seen.state}"))
        entries += [(f.began, f"({f.kind} for {f.ended - f.began:.1f})") for f in self._near(entries, zero)]
        lines = [f"{at - zero:+.2f} {what}" for at, what in sorted(set(entries))]
        return "; ".join(lines if self.deliveries.get(job_id) else ["never delivered", *lines])

    def _near(self, entries: Iterable[tuple[float, str]], zero: float) -> list[Fault]:
        """The faults at about the time of the job."""
        last = max((at for at, _ in entries), default=zero)
        return [f for f in self.facts.faults if f.began <= last + 2 and f.ended >= zero - 2 and f.kind != "cancel"]


def _recoveries(facts: Facts) -> dict[str, float]:
    """Kind of fault -> the longest recovery: from its end until a job ended that a worker held when it began.

    Jobs are ignored if another fault ended in between.
    """
    longest: dict[str, float] = {}
    faults = [
        fault for fault in facts.faults if fault.kind not in ("cancel", "poison", "skew_clock", "replace_weights")
    ]
    over = sorted(fault.ended for fault in faults)
    for fault in faults:
        for c in facts.computations:
            end = facts.seen.get(c.job)
            met = c.started < fault.began and (c.ended is None or c.ended > fault.began) and fault.pid in (None, c.pid)
            if not met or end is None or bisect.bisect(over, end.at) != bisect.bisect(over, fault.ended):
                continue
            longest[fault.kind] = max(longest.get(fault.kind, 0.0), round(end.at - fault.ended, 1))
    return longest


def table(ledger: Ledger) -> str:
    """The ledger as a table of text."""
    rows: list[tuple[str, Any]] = [
        ("submitted", ledger.submitted),
        ("submitted more than once", ledger.submitted_again),
        ("computed although submit raised", ledger.unclaimed),
        *((f"submit raised {name}", count) for name, count in sorted(ledger.refusals.items())),
        *sorted(ledger.ends.items()),
        ("lost with Redis' data, and told", ledger.lost),
        ("computed with other weights, and told", ledger.other_weights),
        ("given up with dying workers", ledger.given_up),
        ("redelivered", ledger.redelivered),
        ("complete computations", ledger.computed),
        *((f"completed twice: {reason}", count) for reason, count in sorted(ledger.duplicates.items())),
        *((f"longest recovery after {kind}", f"{took} s") for kind, took in sorted(ledger.longest_recovery_s.items())),
        *((f"action {kind}", count) for kind, count in sorted(ledger.actions.items())),
        *((f"workers ended by {why}", count) for why, count in sorted(ledger.deaths.items())),
        *((f"logged {event}", count) for event, count in sorted(ledger.logged.items())),
        ("bytes in Redis before, after", "{} {}".format(*ledger.memory_bytes)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join(
        [*lines, *(f"WRONG {error}" for error in ledger.wrong), "balanced" if not ledger.wrong else "NOT balanced"]
    )

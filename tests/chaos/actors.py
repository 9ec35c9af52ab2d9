"""Redis, the workers, and the callers: real ones, with handles to break them by."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from headrace.client import Client, HeadraceError, Job, JobError, RedisRefused, RedisUnreachable, Result
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.client.wire.results import Outcome, outcome_state, parse_outcome
from headrace.config import Settings
from headrace.worker.redis_server import EmbeddedRedis, die_with_parent
from tests.chaos.jobs import Batch, Draft
from tests.chaos.ledger import Death, End, JobFact

#: A submission that raised is tried again after this time.
RETRY_S = 0.5
#: A worker that died unasked is started again after this time.
RESTART_S = 0.5
#: How often results are asked for.
POLL_S = 0.25
#: Results asked for at once.
POLL_JOBS = 500

#: The suite's own requests to Redis take no longer: it must go on while Redis is stopped.
ADMIN_S = 5.0

BALLAST = "chaos:ballast"


def end_of(outcome: Outcome, at: float = 0.0) -> End:
    """What is compared of an outcome: of a success all that does not hang on when and where it was computed."""
    if isinstance(outcome, Result):
        says = outcome.model_dump(mode="json", exclude={"id", "timings"})
        digest = hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:16]
        return End("succeeded", digest=digest, at=at, says=says)
    return End(outcome_state(outcome), outcome.code, at=at)


class Server:
    """A Redis that may be killed, stopped, cut off and filled. Start it in the main thread.

    With `appendfsync always` all it has answered to is on disk, so that whatever is lost was not lost by Redis. With
    `everysec`, the embedded server's own way, a kill -9 may take the writes of a moment in which an fsync was late.
    """

    def __init__(self, appendfsync: str) -> None:
        self._redis = EmbeddedRedis.ephemeral()
        self._appendfsync = appendfsync

    @property
    def url(self) -> str:
        return self._redis.url

    @property
    def admin(self) -> redis.Redis:
        """A connection of the suite's own, made anew each time: the last one may have been cut. It gives up soon."""
        return redis.Redis.from_url(
            self.url, decode_responses=True, socket_timeout=ADMIN_S, retry=Retry(NoBackoff(), retries=0)
        )

    def start(self) -> Self:
        self._redis.start()
        with self.admin as admin:
            admin.config_set("appendfsync", self._appendfsync)
        return self

    __enter__ = start

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.go_on()
        self._redis.stop()

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self._send(signal.SIGKILL)
        while self._redis.alive:
            time.sleep(0.01)

    def halt(self) -> None:
        self._send(signal.SIGSTOP)

    def go_on(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        if self._redis.alive and self._redis.pid is not None:
            os.kill(self._redis.pid, number)

    def cut(self, salt: int) -> int:
        """Cut connections: all, or a random half. Returns how many."""
        dice = random.Random(f"cut {salt}")
        share = dice.choice((0.5, 1.0))
        with self.admin as admin:
            chosen = [entry["id"] for entry in admin.client_list() if dice.random() <= share]
            return sum(admin.client_kill_filter(_id=name, skipme=True) for name in chosen)

    def fill(self) -> None:
        """Fill it until it refuses the smallest write."""
        with self.admin as admin:
            admin.config_set("maxmemory", int(admin.info("memory")["used_memory"]) + 8 * 2**20)
            for size in (2**20, 2**16, 2**10, 1):
                with contextlib.suppress(redis.ResponseError):
                    while True:
                        admin.rpush(BALLAST, "x" * size)

    def relieve(self) -> None:
        with self.admin as admin:
            admin.delete(BALLAST)
            admin.config_set("maxmemory", 0)


class Worker:
    """A worker that is started again whenever its process ends, as a supervisor would. Call `look` often."""

    def __init__(self, name: str, directory: Path, settings: Settings) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self.deaths: list[Death] = []
        self._directory = directory
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        #: Why the process is to end, if it was asked to; and when the next one is to be started.
        self._asked: str | None = None
        self._start_at = 0.0

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.chaos.startup", str(self._directory)]
        command += ["worker", "-n", f"{self.name}@%h", "--without-gossip", "--without-mingle"]
        ours = self._settings.model_dump(exclude_unset=True)
        environment = {**os.environ, **{f"HEADRACE_{name.upper()}": str(value) for name, value in ours.items()}}
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                die_with_parent(command), env=environment, stdout=out, stderr=out, start_new_session=True
            )
        self._asked = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether this process reads the queue."""
        return self.alive and self._noted("ready")

    def _noted(self, event: str) -> bool:
        return any(note["event"] == event for note in read_notes(self._directory / f"{self.pid}.jsonl"))

    def look(self) -> None:
        """See whether it died, and start it when it is time."""
        if self._process is None or self.alive:
            return
        if all(death.pid != self.pid for death in self.deaths):
            why = self._asked or ("poison" if self._noted("poisoned") else "own")
            detail = f"code {self._process.poll()}: {self._last_words()}" if why == "own" else ""
            self.deaths.append(Death(time.time(), self.pid, why, detail))
            self._start_at = max(self._start_at, time.monotonic() + RESTART_S)
        if time.monotonic() >= self._start_at:
            self.start()

    def kill(self, down_s: float = math.inf) -> None:
        """kill -9, also of one that is stopped; `look` starts the next one after `down_s`."""
        self._ask("kill", down_s)
        self.send(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def end(self, down_s: float) -> None:
        """SIGTERM; `look` starts the next one after `down_s`, or when it has ended."""
        self._ask("end", down_s)
        self.send(signal.SIGTERM)

    def _ask(self, why: str, down_s: float) -> None:
        self.look()  # what died before did not die of this
        if self.alive:
            self._asked = why
        self._start_at = time.monotonic() + down_s

    def send(self, number: signal.Signals) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def _last_words(self) -> str:
        errors = list(errors_in(self.log))
        return errors[-1] if errors else "no error in its log"


def read_notes(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that a worker wrote (tests/chaos/startup.py)."""
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last one may be torn
                yield json.loads(line)


def errors_in(log: Path) -> Iterator[str]:
    """The errors in a worker's log: the event, and what was raised."""
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("level") in ("error", "critical"):
                    raised = str(entry.get("error") or entry.get("exception") or entry.get("trace") or "").strip()
                    yield f"{str(entry['event'])[:80]} {raised.splitlines()[-1][:120] if raised else ''}".strip()
        elif re.match(r"\S*(Error|Exception)\b", line):
            yield line[:160]


class Submitter:
    """Submits a plan in a thread of its own, each batch until it is accepted."""

    def __init__(self, settings: Settings, catalogue: list[dict[str, Any]]) -> None:
        self._client = Client(settings=settings)
        self._catalogue = catalogue
        #: How each request of the catalogue ends.
        self.expected: list[End] = []
        self._extra: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        #: What was accepted so far; read by other threads.
        self.jobs: dict[str, JobFact] = {}
        self.refusals: Counter[str] = Counter()
        self.failure: BaseException | None = None

    def start(self, plan: list[Batch]) -> None:
        self._thread = threading.Thread(target=self._run, args=(plan,), name="chaos-submit", daemon=True)
        self._thread.start()

    def add(self, batch: Batch) -> None:
        """Submit this one too, as soon as may be."""
        self._extra.put(batch)

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._client.close()

    def _run(self, plan: list[Batch]) -> None:
        try:
            zero = time.monotonic()
            for batch in plan:
                while (rest := zero + batch.at - time.monotonic()) > 0 and not self._stop.wait(min(rest, 0.1)):
                    self._submit_extra()
                if self._stop.is_set():
                    return
                self._submit(batch)
            self._submit_extra()
        except BaseException as error:
            self.failure = error
            raise

    def _submit_extra(self) -> None:
        while not self._extra.empty():
            self._submit(self._extra.get())

    def _submit(self, batch: Batch) -> None:
        left = list(batch.drafts)
        calls: list[tuple[float, float]] = []
        while left and not self._stop.is_set():
            began = time.time()
            try:
                accepted = dict(enumerate(self._call(left)))
            except HeadraceError as error:
                self.refusals[type(error).__name__] += 1
                # With ids of their own all are submitted again, as a caller would who knows nothing.
                failed = isinstance(error, (RedisRefused, RedisUnreachable))
                accepted = error.accepted if failed and not left[0].own_id else {}
                self._stop.wait(RETRY_S)
            calls.append((began, time.time()))
            for place, job in accepted.items():
                self._note(left[place], job, list(calls))
            left = [draft for place, draft in enumerate(left) if place not in accepted]

    def _call(self, drafts: list[Draft]) -> list[Job]:
        fields = [draft.fields(self._catalogue) for draft in drafts]
        return [self._client.submit(**fields[0])] if len(fields) == 1 else self._client.submit_many(fields)

    def _note(self, draft: Draft, job: Job, calls: list[tuple[float, float]]) -> None:
        expected = None if draft.request is None else self.expected[draft.request]
        self.jobs[job.id] = JobFact(expected, calls, may_expire=draft.timeout_s is not None)


class Collector:
    """Asks for the outcomes of all accepted jobs in a thread of its own, and keeps what it saw first."""

    def __init__(self, url: str, jobs: dict[str, JobFact]) -> None:
        self._redis = connect(url)
        self._jobs = jobs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-collect", daemon=True)
        self.seen: dict[str, End] = {}

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._redis.close()

    @property
    def waiting(self) -> list[str]:
        """Accepted jobs of which no end was seen."""
        return [job_id for job_id in list(self._jobs) if job_id not in self.seen]

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            with contextlib.suppress(redis.RedisError):
                self._look()

    def _look(self) -> None:
        waiting = self.waiting
        for start in range(0, len(waiting), POLL_JOBS):
            part = waiting[start : start + POLL_JOBS]
            records = cast("list[str | None]", self._redis.mget([keys.result(job_id) for job_id in part]))
            for job_id, record in zip(part, records, strict=True):
                if (outcome := parse_outcome(record)) is not None:
                    self.seen[job_id] = end_of(outcome, time.time())


def final_ends(settings: Settings, job_ids: list[str]) -> dict[str, End]:
    """How jobs ended, asked of a new client as any caller would."""
    ends: dict[str, End] = {}
    with Client(settings=settings) as client:
        for job in client.as_completed([client.job(job_id) for job_id in job_ids], timeout=60):
            try:
                ends[job.id] = end_of(job.result(timeout=1))
            except JobError as error:
                ends[job.id] = end_of(error)
    return ends

"""Real Redis, workers and callers, with methods that inject faults."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import queue
import random
import re
import shutil
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

from headrace.client import Client, HeadraceError, Job, JobError, JobLost, RedisRefused, RedisUnreachable, Result
from headrace.client.jobs.reading import JobReader
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.client.wire.results import Outcome, outcome_state, parse_outcome
from headrace.config import Settings
from headrace.worker.child_processes import die_with_parent
from headrace.worker.redis_server import EmbeddedRedis
from tests.chaos.clocks import next_error, read_error, real_time
from tests.chaos.jobs import Batch, PlannedJob
from tests.chaos.ledger import Death, End, JobFact
from tests.chaos.weights import ModelDirectory
from tests.varying import VARYING

#: Seconds until a submission that raised is repeated.
RETRY_S = 0.5
#: Seconds until a worker that died by itself is restarted.
RESTART_S = 0.5
#: Seconds between polls for results.
POLL_S = 0.25
#: Number of results in one poll.
POLL_JOBS = 500

#: Timeout in seconds of this suite's own requests to Redis, so that it continues while Redis is stopped.
ADMIN_S = 5.0

BALLAST = "chaos:ballast"


def end_of(outcome: Outcome, at: float = 0.0) -> End:
    """The part of an outcome that must not depend on when and where the job was computed."""
    if isinstance(outcome, Result):
        content = outcome.model_dump(mode="json", exclude=VARYING)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return End("succeeded", digest=digest, at=at, content=content)
    return End(outcome_state(outcome), outcome.code, at=at)


class Server:
    """A Redis that can be killed, stopped, disconnected and filled. Start it in the main thread.

    With `appendfsync always` every acknowledged write is on disk, so Redis itself loses no job. With `everysec`, the
    setting of the embedded server, a kill -9 may lose writes that were delayed by a slow fsync.
    """

    def __init__(self, appendfsync: str) -> None:
        self._redis = EmbeddedRedis.ephemeral()
        self._appendfsync = appendfsync

    @property
    def url(self) -> str:
        return self._redis.url

    @property
    def admin(self) -> redis.Redis:
        """A new connection for this suite, with a short timeout. It is not reused, because faults cut connections."""
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
        self.resume()
        self._redis.stop()

    def kill(self) -> None:
        """kill -9, and wait until the process has ended."""
        self._send(signal.SIGKILL)
        while self._redis.alive:
            time.sleep(0.01)

    def pause(self) -> None:
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        if self._redis.alive and self._redis.pid is not None:
            os.kill(self._redis.pid, number)

    def cut(self, salt: int) -> int:
        """Kill all connections or a random half of them. Returns their number."""
        dice = random.Random(f"cut {salt}")
        share = dice.choice((0.5, 1.0))
        with self.admin as admin:
            chosen = [entry["id"] for entry in admin.client_list() if dice.random() <= share]
            return sum(admin.client_kill_filter(_id=name, skipme=True) for name in chosen)

    def lose(self) -> None:
        """Lose all data and end all connections, as when an empty replica becomes the primary."""
        with self.admin as admin:
            admin.flushall()
            for entry in admin.client_list():
                admin.client_kill_filter(_id=entry["id"], skipme=True)

    def keep(self) -> None:
        """Keep a copy of all data, which `lose_writes` will go back to."""
        shutil.copy(self._append_only_file, self._kept)

    def lose_writes(self) -> None:
        """Lose what was written since `keep`, and end all connections."""
        self.kill()
        self._kept.rename(self._append_only_file)
        self.start()

    @property
    def _append_only_file(self) -> Path:
        return self._redis.directory / "appendonly.aof"

    @property
    def _kept(self) -> Path:
        return self._redis.directory / "kept.aof"

    def fill(self) -> None:
        """Fill the memory until Redis refuses the smallest write."""
        with self.admin as admin:
            admin.config_set("maxmemory", int(admin.info("memory")["used_memory"]) + 8 * 2**20)
            for size in (2**20, 2**16, 2**10, 1):
                with contextlib.suppress(redis.ResponseError):
                    while True:
                        admin.rpush(BALLAST, "x" * size)

    def free_memory(self) -> None:
        with self.admin as admin:
            admin.delete(BALLAST)
            admin.config_set("maxmemory", 0)


class Worker:
    """A worker process with its supervisor, which restarts it whenever it ends. Call `supervise` often."""

    def __init__(self, name: str, directory: Path, settings: Settings) -> None:
        self.name = name
        self.log = directory / f"{name}.log"
        self.deaths: list[Death] = []
        self._directory = directory
        self._clock = directory / f"{name}.clock"
        #: The model that it loads.
        self.model = ModelDirectory(directory / f"{name}-model")
        self._settings = settings.model_copy(update={"model": str(self.model.directory), "served_name": "demo"})
        self._process: subprocess.Popen[bytes] | None = None
        #: Why the current process was told to end, if it was; and when the next one is started.
        self._end_reason: str | None = None
        self._start_at = 0.0
        self._started_with_other_weights = False
        self._writes_at_start = 0

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.chaos.startup", str(self._directory), str(self._clock)]
        command += ["worker", "-n", f"{self.name}@%h", "--without-gossip", "--without-mingle"]
        ours = self._settings.model_dump(exclude_unset=True)
        environment = {**os.environ, **{f"HEADRACE_{name.upper()}": str(value) for name, value in ours.items()}}
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                die_with_parent(command), env=environment, stdout=out, stderr=out, start_new_session=True
            )
        self._end_reason = None
        self._started_with_other_weights = self.model.replaced
        self._writes_at_start = self.model.writes

    def skew(self, salt: int) -> float:
        """Let its clock jump, also for the processes that follow. Returns by how much it is wrong."""
        error_s = next_error(salt, read_error(self._clock))
        self._clock.write_text(str(error_s))
        return error_s

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def ready(self) -> bool:
        """Whether the process consumes the queue."""
        return self.alive and self._noted("ready")

    def _noted(self, event: str) -> bool:
        return any(note["event"] == event for note in read_notes(self._directory / f"{self.pid}.jsonl"))

    def supervise(self) -> None:
        """Record the death of the process, and start the next one when it is due."""
        if self._process is None or self.alive:
            return
        if all(death.pid != self.pid for death in self.deaths):
            why = self._end_reason or ("poison" if self._noted("poisoned") else "own")
            replaced = self._started_with_other_weights or self.model.writes > self._writes_at_start
            if why == "own" and replaced and not self._noted("ready"):
                why = "weights"  # it refused them
            detail = f"code {self._process.poll()}: {self._last_error()}" if why == "own" else ""
            self.deaths.append(Death(real_time(), self.pid, why, detail))
            self._start_at = max(self._start_at, time.monotonic() + RESTART_S)
        if time.monotonic() >= self._start_at:
            self.start()

    def kill(self, down_s: float = math.inf) -> None:
        """kill -9, even if the process is stopped; `supervise` starts the next one after `down_s` seconds."""
        self._expect_end("kill", down_s)
        self.send(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def end(self, down_s: float) -> None:
        """SIGTERM; `supervise` starts the next one after `down_s` seconds, or when this one has ended."""
        self._expect_end("end", down_s)
        self.send(signal.SIGTERM)

    def _expect_end(self, why: str, down_s: float) -> None:
        self.supervise()  # record a death that had another cause
        if self.alive:
            self._end_reason = why
        self._start_at = time.monotonic() + down_s

    def send(self, number: signal.Signals) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def _last_error(self) -> str:
        errors = list(errors_in(self.log))
        return errors[-1] if errors else "no error in the log"


def read_notes(path: Path) -> Iterator[dict[str, Any]]:
    """The events that a worker process recorded (tests/chaos/startup.py)."""
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line may be incomplete
                yield json.loads(line)


def errors_in(log: Path) -> Iterator[str]:
    """The errors in a worker's log: each as the event and the last line of the exception."""
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
    """Submits a plan in its own thread, and repeats each batch until it is accepted."""

    def __init__(self, settings: Settings, catalogue: list[dict[str, Any]]) -> None:
        self._client = Client(settings=settings)
        self._catalogue = catalogue
        #: The expected end of each request of the catalogue.
        self.expected: list[End] = []
        self._extra: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        #: The jobs that were accepted so far; other threads read it.
        self.jobs: dict[str, JobFact] = {}
        self.refusals: Counter[str] = Counter()
        self.failure: BaseException | None = None

    def start(self, plan: list[Batch]) -> None:
        self._thread = threading.Thread(target=self._run, args=(plan,), name="chaos-submit", daemon=True)
        self._thread.start()

    def add(self, batch: Batch) -> None:
        """Submit another batch as soon as possible."""
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
        left = list(batch.jobs)
        calls: list[tuple[float, float]] = []
        while left and not self._stop.is_set():
            began = real_time()
            try:
                accepted = dict(enumerate(self._call(left)))
            except HeadraceError as error:
                self.refusals[type(error).__name__] += 1
                # Jobs with chosen ids are all submitted again, as by a caller who ignores `accepted`.
                failed = isinstance(error, (RedisRefused, RedisUnreachable))
                accepted = error.accepted if failed and not left[0].chosen_id else {}
                self._stop.wait(RETRY_S)
            calls.append((began, real_time()))
            for place, job in accepted.items():
                self._note(left[place], job, list(calls))
            left = [planned for place, planned in enumerate(left) if place not in accepted]

    def _call(self, jobs: list[PlannedJob]) -> list[Job]:
        fields = [planned.fields(self._catalogue) for planned in jobs]
        return [self._client.submit(**fields[0])] if len(fields) == 1 else self._client.submit_many(fields)

    def _note(self, planned: PlannedJob, job: Job, calls: list[tuple[float, float]]) -> None:
        expected = None if planned.request is None else self.expected[planned.request]
        self.jobs[job.id] = JobFact(expected, calls, may_expire=planned.timeout_s is not None)


class Collector:
    """Polls for the outcomes of all accepted jobs in its own thread, and keeps the first outcome that it sees.

    Set `loses` after Redis has lost its data: from then on it also asks as a caller does whether a job is lost.
    """

    def __init__(self, url: str, jobs: dict[str, JobFact]) -> None:
        self._redis = connect(url)
        self._reader = JobReader(url, self._redis, model_name="demo")
        self._jobs = jobs
        self.loses = False
        #: When the caller of each lost job was told so.
        self.lost: dict[str, float] = {}
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
        """Accepted jobs whose end was not seen yet, and that are not lost."""
        return [job_id for job_id in list(self._jobs) if job_id not in self.seen and job_id not in self.lost]

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            with contextlib.suppress(redis.RedisError):
                self._poll()

    def _poll(self) -> None:
        waiting = self.waiting
        for start in range(0, len(waiting), POLL_JOBS):
            part = waiting[start : start + POLL_JOBS]
            records = cast("list[str | None]", self._redis.mget([keys.result(job_id) for job_id in part]))
            for job_id, record in zip(part, records, strict=True):
                if (outcome := parse_outcome(record)) is not None:
                    self.seen[job_id] = end_of(outcome, real_time())
                elif self.loses:
                    with contextlib.suppress(RedisUnreachable):
                        self._ask_whether_lost(job_id)

    def _ask_whether_lost(self, job_id: str) -> None:
        try:
            Job(job_id, self._reader, accepted=True).status()
        except JobLost:
            self.lost[job_id] = real_time()


def final_ends(settings: Settings, job_ids: list[str]) -> dict[str, End]:
    """The ends of jobs as a new client reads them."""
    ends: dict[str, End] = {}
    with Client(settings=settings) as client:
        for job in client.as_completed([client.job(job_id) for job_id in job_ids], timeout=60):
            try:
                ends[job.id] = end_of(job.result(timeout=1))
            except JobError as error:
                ends[job.id] = end_of(error)
    return ends

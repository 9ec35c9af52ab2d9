"""The traffic of a soak: callers of every kind, each in a thread, and the book in which they enter their jobs."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
from celery.result import AsyncResult

from headrace.client import Client, InvalidRequest, Job, JobError, JobLost
from headrace.config import Settings
from tests.patience import PATIENCE_S

#: Mean seconds between the actions of one caller.
PAUSE_S = 2.0
WORDS = ["the", "river", "house", "nobody", "has", "lived", "since", "war", "and", "sea", "is", "far", "here"]
LONG = 180


class Book:
    """Accepted jobs by kind, and how each ended. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accepted: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._open: dict[str, str] = {}
        self._files: set[str] = set()
        self.surprises: list[str] = []
        self.batches = 0

    def accept(self, kind: str, job_id: str) -> None:
        """A job was accepted."""
        with self._lock:
            self._accepted[kind] += 1
            self._open[job_id] = kind

    def end(self, job_id: str, state: str) -> None:
        """A job has ended, or its caller was told that it is lost."""
        with self._lock:
            self._ends[f"{self._open.pop(job_id)} {state}"] += 1

    def refuse(self, what: str) -> None:
        """A request was refused, as it should be."""
        with self._lock:
            self._refused[what] += 1

    def file(self, file_id: str, *, exists: bool) -> None:
        """A file was uploaded or made, or it was deleted."""
        with self._lock:
            (self._files.add if exists else self._files.discard)(file_id)

    def add_batch(self) -> None:
        """A batch was created over HTTP; its record remains."""
        with self._lock:
            self.batches += 1

    def surprise(self, text: str) -> None:
        """Something happened that must not happen."""
        with self._lock:
            if len(self.surprises) < 100:
                self.surprises.append(text[:400])

    def accepted(self) -> dict[str, int]:
        with self._lock:
            return dict(self._accepted)

    def ends(self) -> dict[str, int]:
        with self._lock:
            return dict(self._ends)

    def refused(self) -> dict[str, int]:
        with self._lock:
            return dict(self._refused)

    def open(self) -> list[str]:
        with self._lock:
            return [f"{kind} {job_id}" for job_id, kind in self._open.items()]

    def files_left(self) -> int:
        with self._lock:
            return len(self._files)

    def so_far(self) -> str:
        with self._lock:
            return (
                f"{self._accepted.total()} accepted, {len(self._open)} open, "
                f"{self._refused.total()} refused, {len(self.surprises)} surprises"
            )


class Traffic:
    """Callers that run until `stop`."""

    def __init__(self, settings: Settings, url: str, directory: Path, seed: str, book: Book) -> None:
        self.settings, self.url, self.directory, self.book = settings, url, directory, book
        self._stop = threading.Event()
        callers: list[Callable[[random.Random], None]] = [
            self.single,
            self.stream,
            self.cancelled,
            self.countdown,
            self.expiring,
            self.failing,
            self.http_completion,
            self.http_stream,
            self.http_batch,
            self.client_batch,
            self.files,
            self.looking,
        ]
        self.client = Client(settings=settings)
        self.api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S)
        self._threads = [
            threading.Thread(target=self._run, args=(caller, random.Random(f"{seed} {caller.__name__}")), daemon=True)
            for caller in callers
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop submitting, and return when all accepted jobs have ended or PATIENCE_S has passed."""
        self._stop.set()
        deadline = time.monotonic() + 2 * PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.client.close()
        self.api.close()
        self.http.close()

    def _run(self, caller: Callable[[random.Random], None], dice: random.Random) -> None:
        while not self._stop.wait(dice.expovariate(1 / PAUSE_S)):
            try:
                caller(dice)
            except Exception as error:
                self.book.surprise(f"{caller.__name__}: {type(error).__name__}: {error}")

    # --- the client ------------------------------------------------------------------------------------------------

    def single(self, dice: random.Random) -> None:
        """A few jobs of all kinds of parameters, one by one or together, each waited for."""
        jobs: list[Job]
        if dice.random() < 0.5:
            jobs = [self.client.submit(prompt(dice), **params(dice)) for _ in range(dice.randint(1, 4))]
        else:
            jobs = self.client.submit_many([{"prompt": prompt(dice), **params(dice)} for _ in range(20)])
        for job in jobs:
            self.book.accept("single", job.id)
        for job in self.client.as_completed(jobs, PATIENCE_S):
            self._end(job)

    def stream(self, dice: random.Random) -> None:
        """A stream that is read to its end, or left after some events; then the job ends all the same."""
        job = self.client.submit(prompt(dice), **params(dice) | {"stream": True})
        self.book.accept("stream", job.id)
        left = dice.choice((1, 3, 10_000))
        events = job.stream(PATIENCE_S)
        with contextlib.suppress(JobError), contextlib.closing(events):  # type: ignore[type-var]
            for _ in events:
                left -= 1
                if not left:
                    break
        self._end(job)

    def cancelled(self, dice: random.Random) -> None:
        """A job or many that are cancelled at once, or while they run."""
        jobs = self.client.submit_many([prompt(dice)] * dice.choice((1, 5)), max_tokens=LONG, ignore_eos=True)
        for job in jobs:
            self.book.accept("cancelled", job.id)
        self._stop.wait(dice.choice((0.0, 0.05, 0.3)))
        self.client.cancel(jobs)
        for job in jobs:
            self._end(job)

    def countdown(self, dice: random.Random) -> None:
        """A job with a countdown, sent by Celery; one of four is cancelled while it waits."""
        signature = self.client.signature(prompt(dice), **params(dice))
        sent: AsyncResult[Any] = signature.apply_async(countdown=dice.choice((1, 3, 20)))
        self.book.accept("countdown", sent.id)
        job = self.client.job(sent.id)
        if dice.random() < 0.25:
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:  # the record exists when a worker has taken the message
                with contextlib.suppress(KeyError):
                    job.cancel()
                    break
                time.sleep(0.1)
        with contextlib.suppress(Exception):  # the state says how it ended
            sent.get(timeout=PATIENCE_S)
        self._end(job)

    def expiring(self, dice: random.Random) -> None:
        """A job that expires before it begins, while it runs, or perhaps not at all."""
        job = self.client.submit(prompt(dice), max_tokens=LONG, ignore_eos=True, timeout_s=dice.choice((0.01, 0.2, 1)))
        self.book.accept("expiring", job.id)
        self._end(job)

    def failing(self, dice: random.Random) -> None:
        """Requests that are refused here, by the server, or only by the worker."""
        try:
            self.client.submit("x", **dice.choice(({"top_p": 2}, {"max_new_tokens": 3}, {"n": 0}, {"model": "no"})))
            self.book.surprise("a wrong request was accepted")
        except InvalidRequest as error:
            self.book.refuse(f"client {error.field}")
        answer = self.http.post("/v1/completions", content=dice.choice((b"{", b"[]", b'{"prompt": 7}', b'{"n": -1}')))
        self.book.refuse(f"http {answer.status_code}")
        job = self.client.submit([1] * 2000, max_tokens=4)  # longer than the model's context
        self.book.accept("failing", job.id)
        self._end(job)

    def client_batch(self, dice: random.Random) -> None:
        """A batch of rows from memory to a file, sometimes gzipped, sometimes resumed."""
        rows = [{"custom_id": str(i), "prompt": prompt(dice), **params(dice)} for i in range(dice.choice((5, 40)))]
        output = self.directory / f"{uuid.uuid4().hex}.jsonl{dice.choice(('', '.gz'))}"
        name = output.name
        self.book.accept("client.batch", name)
        try:
            report = self.client.batch(rows, output)
            again = self.client.batch(rows, output, resume=True)
            done = report.succeeded + report.failed == len(rows) == again.before
            self.book.end(name, "done" if done else f"{report} {again}")
            if not done:
                self.book.surprise(f"client.batch: {report} {again}")
        finally:
            for path in self.directory.glob(f"{name}*"):
                path.unlink()

    # --- HTTP ------------------------------------------------------------------------------------------------------

    def http_completion(self, dice: random.Random) -> None:
        """A completion, or one whose caller leaves before the answer: then its jobs are cancelled."""
        body = {"prompt": [prompt(dice), prompt(dice)], "max_tokens": dice.choice((4, 16, LONG)), "n": 2}
        name = uuid.uuid4().hex
        self.book.accept("http", name)
        try:
            answer = self.http.post("/v1/completions", json=body, timeout=dice.choice((0.05, PATIENCE_S)))
            self.book.end(name, str(answer.status_code))
        except httpx.TimeoutException:
            self.book.end(name, "left")

    def http_stream(self, dice: random.Random) -> None:
        """A stream of server-sent events, read to its end or dropped."""
        name, left = uuid.uuid4().hex, dice.choice((1, 4, 10_000))
        self.book.accept("http stream", name)
        chunks = self.api.completions.create(model="demo", prompt=prompt(dice), max_tokens=60, stream=True)
        with contextlib.closing(chunks):
            for _ in chunks:
                left -= 1
                if not left:
                    break
        self.book.end(name, "dropped" if not left else "read")

    def http_batch(self, dice: random.Random) -> None:
        """A batch of uploaded rows, waited for or cancelled; its files are deleted."""
        rows = "\n".join(
            json.dumps(
                {
                    "custom_id": str(i),
                    "method": "POST",
                    "url": "/v1/completions",
                    "body": {"prompt": prompt(dice), "max_tokens": 8 if i % 7 else 5000},
                }
            )
            for i in range(dice.choice((3, 30)))
        )
        source = self._upload(rows.encode())
        batch = self.api.batches.create(input_file_id=source, endpoint="/v1/completions", completion_window="24h")
        self.book.add_batch()
        self.book.accept("http batch", batch.id)
        if dice.random() < 0.2:
            self.api.batches.cancel(batch.id)
        deadline = time.monotonic() + PATIENCE_S
        while batch.status not in ("completed", "failed", "expired", "cancelled") and time.monotonic() < deadline:
            time.sleep(0.2)
            batch = self.api.batches.retrieve(batch.id)
        for made in (batch.output_file_id, batch.error_file_id):
            if made is not None:
                self.book.file(made, exists=True)
                self.api.files.content(made).read()
                self._delete(made)
        self._delete(source)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            self.book.end(batch.id, batch.status)

    def files(self, dice: random.Random) -> None:
        """Files that are uploaded, listed, read and deleted; uploads that are refused."""
        names = [self._upload(dice.randbytes(dice.choice((10, 100_000)))) for _ in range(dice.randint(1, 3))]
        self.api.files.list(limit=10)
        for name in names:
            self.api.files.content(name).read()
            self._delete(name)
        answer = self.http.post("/v1/files", content=b"x" * 1000, headers={"content-type": "multipart/form-data"})
        self.book.refuse(f"http {answer.status_code}")

    def looking(self, dice: random.Random) -> None:
        """What monitoring and people look at."""
        self.client.status()
        for path in ("/health", "/v1/models", "/status.json", "/", "/v1/batches", "/nothing"):
            self.book.refuse(f"http {self.http.get(path).status_code} {path}")

    # --- what they share -------------------------------------------------------------------------------------------

    def _end(self, job: Job) -> None:
        try:
            self.book.end(job.id, job.wait(PATIENCE_S))
        except JobLost:
            self.book.end(job.id, "lost")

    def _upload(self, content: bytes) -> str:
        file_id = self.api.files.create(file=("rows.jsonl", content), purpose="batch").id
        self.book.file(file_id, exists=True)
        return file_id

    def _delete(self, file_id: str) -> None:
        self.api.files.delete(file_id)
        self.book.file(file_id, exists=False)


def prompt(dice: random.Random) -> str:
    """A prompt of 1 to 60 words."""
    return " ".join(dice.choices(WORDS, k=dice.choice((1, 5, 60))))


def params(dice: random.Random) -> dict[str, Any]:
    """Parameters of a job that can be computed."""
    chosen: dict[str, Any] = {
        "max_tokens": dice.choice((1, 8, 40)),
        "temperature": dice.choice((0, 0.7, 1.0)),
        "n": dice.choice((1, 1, 2)),
        "priority": dice.choice(("interactive", "normal", "bulk")),
    }
    if dice.random() < 0.3:
        chosen["logprobs"] = dice.randint(0, 5)
    if dice.random() < 0.3:
        chosen["stop"] = [dice.choice(WORDS)]
    if dice.random() < 0.02:
        chosen["checkpoints"] = "all"
    return chosen

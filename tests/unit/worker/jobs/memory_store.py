"""A store in memory, with the contract of `headrace.worker.jobs.store.Store`."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.client.wire.results import State
from headrace.worker.jobs.store import JobRecord, Waiting


@dataclass
class MemoryStore:
    """A store whose `results` and `cancels` tests set, as Celery's backend and a client would."""

    results: dict[str, str] = field(default_factory=dict)
    cancels: set[str] = field(default_factory=set)
    states: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, Waiting] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)
    workers: dict[str, dict[str, str | int | float]] = field(default_factory=dict)
    tensors: dict[str, dict[str, bytes]] = field(default_factory=dict)
    events: dict[str, list[str]] = field(default_factory=dict)

    #: How many seconds Redis' clock is ahead of this machine's.
    ahead_s: float = 0.0

    def now(self) -> float:
        return time.time() + self.ahead_s

    def lookup(self, job_ids: Sequence[str]) -> list[JobRecord]:
        return [
            JobRecord(
                job_id in self.results,
                job_id in self.cancels,
                self.attempts.get(job_id, 0),
                self.states.get(job_id),
                self.marks.get(job_id),
            )
            for job_id in job_ids
        ]

    def announce(self, jobs: Mapping[str, Waiting]) -> None:
        for job_id, waiting in jobs.items():
            self.states.setdefault(job_id, "queued")
            self.waiting.setdefault(job_id, waiting)

    def count_attempts(self, job_ids: Sequence[str], worker: str = "", shared: Container[str] = ()) -> list[int]:
        self.attempts.update({job_id: self.attempts.get(job_id, 0) + (job_id not in shared) for job_id in job_ids})
        return [self.attempts[job_id] for job_id in job_ids]

    def started(self, job_ids: Iterable[str], worker: str) -> None:
        self.states.update(dict.fromkeys(job_ids, "running"))

    def returned(self, job_ids: Iterable[str], attempted: Iterable[str]) -> None:
        self.states.update(dict.fromkeys(job_ids, "queued"))
        self.attempts.update({job_id: self.attempts[job_id] - 1 for job_id in attempted})

    def ended(self, job_ids: Iterable[str], state: State | None = None) -> None:
        self.cancels.difference_update(job_ids)

    def finish(self, records: Mapping[str, str]) -> None:
        for job_id, record in records.items():
            self.results.setdefault(job_id, record)
        self.ended(records)

    def save_tensors(self, job_id: str, tensors: Mapping[str, bytes]) -> None:
        self.tensors[job_id] = dict(tensors)

    def append_events(self, events: Mapping[str, str]) -> list[str]:
        for job_id, event in events.items():
            self.events.setdefault(job_id, []).append(event)
        return []

    def cancelled(self, job_ids: Sequence[str]) -> set[str]:
        return self.cancels.intersection(job_ids)

    def renew(self, delivery_tags: Iterable[str]) -> None:
        self.leases.update({tag: time.time() for tag in delivery_tags if tag in self.leases})

    def ends(self, job_ids: Sequence[str]) -> tuple[set[str], set[str]]:
        return self.results.keys() & set(job_ids), self.cancelled(job_ids)

    def lost(self, delivery_tags: Sequence[str]) -> set[str]:
        return set(delivery_tags) - self.leases.keys()

    def fill_index(self) -> None:
        pass

    def prune_index(self) -> bool:
        return False

    def heartbeat(self, worker: str, record: Mapping[str, str | int | float], adapters: Iterable[str] = ()) -> None:
        self.workers[worker] = dict(record)

    def fingerprints(self, model_name: str) -> dict[str, str]:
        return {
            name: str(record.get("fingerprint", ""))
            for name, record in self.workers.items()
            if record["model"] == model_name
        }

    def queued(self, model_name: str) -> dict[str, int]:
        return {}

    def deregister(self, worker: str) -> None:
        self.workers.pop(worker, None)

"""One run: a storm over workers that compute, then calm, then the facts."""

from __future__ import annotations

import heapq
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from headrace.client import Client, HeadraceError, JobError
from headrace.client.wire import keys
from headrace.client.wire.requests import parse_request
from headrace.config import Settings, load_settings
from tests.chaos.actors import Collector, Server, Submitter, Worker, end_of, errors_in, final_ends, read_notes
from tests.chaos.jobs import catalogue, plan, poison
from tests.chaos.ledger import Computation, Delivery, End, Facts, Fault, Remains
from tests.chaos.schedule import Action, Kind, storm
from tests.patience import PATIENCE_S

#: How often the run looks at its workers.
TICK_S = 0.05
#: Share of the storm in which jobs are submitted.
SUBMIT_SHARE = 0.85
#: How often the figures so far are told.
TELL_S = 10.0


@dataclass(frozen=True)
class Plan:
    """What a run is made of; `actions` instead of the storm of its seed, where given."""

    seed: int = 1
    jobs: int = 2000
    span_s: float = 180.0
    requests: int = 400
    workers: int = 2
    slots: int = 8
    lease_s: int = 4
    appendfsync: str = "always"
    without: Sequence[Kind] = ()
    actions: Sequence[Action] | None = None
    say: Callable[[str], None] = field(default=lambda _: None)
    #: Told the figures so far every `TELL_S`.
    tell: Callable[[dict[str, Any]], None] = field(default=lambda _: None)

    @property
    def settings(self) -> Settings:
        """Of the reference and of the workers: results name the number of threads."""
        return load_settings(slots=self.slots, lease_s=self.lease_s, threads=1, log_format="json")

    @property
    def storm(self) -> list[Action]:
        if self.actions is not None:
            return sorted(self.actions)
        return storm(
            self.seed, self.span_s, workers=self.workers, lease_s=float(self.lease_s), without=list(self.without)
        )


def reference_ends(requests: list[dict[str, Any]], settings: Settings) -> list[End]:
    """How each request ends in an engine of this process that nothing disturbs."""
    import torch

    from headrace.worker.engine.build import load_engine

    threads = torch.get_num_threads()
    ends = []
    try:
        with load_engine(settings.model_copy(update={"slots": 64})) as engine:
            futures = [engine.submit(parse_request(request)) for request in requests]
            for future in futures:
                try:
                    ends.append(end_of(future.result()))
                except JobError as error:
                    ends.append(end_of(error))
    finally:
        torch.set_num_threads(threads)  # other tests share this process
    return ends


def run(what: Plan) -> Facts:
    """Make the facts of a run. Takes its span, and about as long as the jobs that are left then need."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-chaos-")))
        server = stack.enter_context(Server(what.appendfsync))
        return Run(what, server, directory, stack).carry_out()


class Run:
    """The actors of a run, and what is done to them."""

    def __init__(
        self,
        what: Plan,
        server: Server,
        directory: Path,
        stack: ExitStack,
    ) -> None:
        self.what, self.server, self.directory = what, server, directory
        self.requests = catalogue(what.seed, what.requests)
        self.settings = what.settings.model_copy(update={"redis_url": server.url})
        self.workers = [Worker(f"w{i}", directory, self.settings) for i in range(what.workers)]
        for worker in self.workers:
            stack.callback(worker.kill)
        self.submitter = Submitter(self.settings, self.requests)
        stack.callback(self.submitter.close)
        self.collector = Collector(server.url, self.submitter.jobs)
        self.canceller = Client(settings=self.settings)
        stack.callback(self.canceller.close)
        #: Does what has to ask Redis, which may be stopped: the storm goes on meanwhile.
        self.aside = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="chaos-aside"))
        #: When the storm began: what was before is none of it.
        self.began = 0.0
        self._tell_at = 0.0
        self.faults: list[Fault] = []
        #: Faults of workers that are over when the next process is ready: action, when it began, and the old process.
        self._returning: dict[int, tuple[Action, float, int]] = {}

    def carry_out(self) -> Facts:
        for worker in self.workers:
            worker.start()
        self.what.say(f"seed {self.what.seed}: computing the reference of {len(self.requests)} requests")
        self.submitter.expected = reference_ends(self.requests, self.what.settings)
        self._wait(lambda: all(worker.ready for worker in self.workers), 120)
        self._warm_up()
        before = self._remains()
        self.began = time.time()
        self.what.say(f"storm of {self.what.span_s:.0f} s over {self.what.jobs} jobs")
        self.collector.start()
        self.submitter.start(plan(self.what.seed, self.what.jobs, self.what.span_s * SUBMIT_SHARE, len(self.requests)))
        self._blow()
        self._drain()
        return self._facts(before)

    # --- the storm -------------------------------------------------------------------------------------------------

    def _blow(self) -> None:
        """Begin and end each fault at its time, and look after the workers in between."""
        zero = time.monotonic()
        steps: list[tuple[float, int, Action, Callable[[], None] | None]] = []
        for number, action in enumerate(self.what.storm):
            heapq.heappush(steps, (action.at, number, action, None))
        while steps:
            at, number, action, undo = heapq.heappop(steps)
            self._rest(zero + at)
            if undo is not None:
                undo()
                continue
            self.what.say(f"{at:6.1f} {action.kind} {action.worker if action.worker >= 0 else ''} {action.seconds:.1f}")
            if (undo := self._begin(action)) is not None:
                heapq.heappush(steps, (action.at + action.seconds, number, action, undo))
        self._rest(zero + self.what.span_s)

    def _rest(self, until: float) -> None:
        self._supervise()
        while (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, TICK_S))
            self._supervise()
            if self.began and time.monotonic() >= self._tell_at:
                self._tell_at = time.monotonic() + TELL_S
                self.what.tell(self._so_far())

    def _so_far(self) -> dict[str, Any]:
        seen = list(self.collector.seen.values())
        return {
            "seconds": round(time.time() - self.began),
            "submitted": len(self.submitter.jobs),
            "ended": dict(Counter(end.state for end in seen)),
            "refusals": dict(self.submitter.refusals),
            "actions": dict(Counter(fault.kind for fault in list(self.faults))),
            "deaths": dict(Counter(death.why for worker in self.workers for death in worker.deaths)),
        }

    def _supervise(self) -> None:
        for index, worker in enumerate(self.workers):
            worker.look()
            if index in self._returning and worker.pid != self._returning[index][2] and worker.ready:
                self._returned(index)

    def _returned(self, index: int) -> None:
        action, began, pid = self._returning.pop(index)
        self._note(action, began, pid)

    def _note(self, action: Action, began: float, pid: int | None = None) -> None:
        self.faults.append(Fault(action.kind, began, time.time(), pid, action.seconds))

    def _begin(self, action: Action) -> Callable[[], None] | None:
        """Do it. Returns how it is undone, if it is not over at once or by itself."""
        began = time.time()
        if action.kind in ("kill_worker", "end_worker"):
            self._take_down(action, began)
            return None
        worker = self.workers[action.worker]
        ways: dict[Kind, tuple[Callable[[], Any], Callable[[], Any] | None]] = {
            "stop_worker": (lambda: worker.send(signal.SIGSTOP), lambda: worker.send(signal.SIGCONT)),
            "kill_redis": (self.server.kill, self.server.start),
            "stop_redis": (self.server.halt, self.server.go_on),
            "fill_redis": (self.server.fill, self.server.relieve),
            "cut": (lambda: self.aside.submit(self._cut, action, began), None),
            "cancel": (lambda: self.aside.submit(self._cancel, action, began), None),
            "poison": (lambda: self._poison(action, began), None),
        }
        do, undo = ways[action.kind]
        pid = worker.pid if action.kind == "stop_worker" else None
        do()
        if undo is None:
            return None

        def over() -> None:
            undo()
            self._note(action, began, pid)

        return over

    def _take_down(self, action: Action, began: float) -> None:
        if action.worker in self._returning:
            self._returned(action.worker)  # it took longer to start than was allowed for
        worker = self.workers[action.worker]
        self._returning[action.worker] = (action, began, worker.pid)
        take = worker.kill if action.kind == "kill_worker" else worker.end
        take(action.seconds)

    def _cut(self, action: Action, began: float) -> None:
        with suppress(redis.RedisError):  # it is away
            self.server.cut(action.salt)
        self._note(action, began)

    def _cancel(self, action: Action, began: float) -> None:
        waiting = self.collector.waiting
        for job_id in random.Random(f"cancel {action.salt}").sample(waiting, min(3, len(waiting))):
            self.submitter.jobs[job_id].cancel_asked = True
            with suppress(HeadraceError):
                self.canceller.cancel(job_id)
        self._note(action, began)

    def _poison(self, action: Action, began: float) -> None:
        self.submitter.add(poison(action.salt, len(self.requests)))
        self._note(action, began)

    # --- calm ------------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Wait until all jobs have ended and all messages are acknowledged; a job counts as lost when no more end."""
        self.what.say("calm")
        left, last_progress = -1, time.monotonic()
        while not self.submitter.done or self.collector.waiting or self._returning:
            if left != (left := len(self.collector.waiting)):
                self.what.say(f"{left} jobs wait")
                last_progress = time.monotonic()
            if time.monotonic() - last_progress > PATIENCE_S:
                break
            self._rest(time.monotonic() + 0.1)
        self._wait(lambda: self._unacked() == (0, 0) and not self._queued(), 3 * self.what.lease_s + 12, strict=False)

    def _wait(self, condition: Callable[[], bool], timeout_s: float, strict: bool = True) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                assert not strict, "it did not come about in time"
                return
            self._rest(time.monotonic() + TICK_S)

    def _warm_up(self) -> None:
        """One job for each worker, so that all that Redis keeps for ever is there; their records go again."""
        with Client(settings=self.settings) as client:
            jobs = [client.submit("Hello.", max_tokens=2) for _ in self.workers]
            for job in jobs:
                job.result(PATIENCE_S)
        self._wait(lambda: self._unacked() == (0, 0), 10)

    def _unacked(self) -> tuple[int, int]:
        with suppress(redis.RedisError), self.server.admin as admin:
            return int(admin.hlen(keys.unacked())), int(admin.zcard(keys.unacked_index()))
        return -1, -1

    def _queued(self) -> int:
        with suppress(redis.RedisError), self.server.admin as admin:
            return sum(int(admin.llen(name)) for name in keys.queue_lists(self.settings.model_name))
        return -1

    def _remains(self) -> Remains:
        """What stays for ever. Job records and results are taken away here, for their memory to be free."""
        with self.server.admin as admin:
            for start in keys.job("*"), keys.result("*"):
                if names := list(admin.scan_iter(start, count=1000)):
                    admin.delete(*names)
            sizes = {name: size(admin, name) for name in admin.scan_iter("*", count=1000)}
            admin.memory_purge()
            info = admin.info("memory")
        # Beside what connections and the log of writes take for a moment.
        passing = sum(int(info[name]) for name in ("mem_clients_normal", "mem_clients_slaves", "mem_aof_buffer"))
        return Remains(sizes, int(info["used_memory"]) - passing)

    # --- the facts -------------------------------------------------------------------------------------------------

    def _facts(self, before: Remains) -> Facts:
        self.collector.close()
        facts = Facts(
            float(self.what.lease_s),
            jobs=dict(self.submitter.jobs),
            seen=dict(self.collector.seen),
            final=final_ends(self.settings, list(self.collector.seen)),
            deaths=[death for worker in self.workers for death in worker.deaths],
            faults=self.faults,
            before=before,
            unacked=self._unacked(),
            refusals=self.submitter.refusals,
            logged=Counter(event.split(":")[0][:60] for worker in self.workers for event in errors_in(worker.log)),
            max_attempts=getattr(self.settings, "max_attempts", 0),
        )
        if self.submitter.failure is not None:
            raise self.submitter.failure
        for path in self.directory.glob("*.jsonl"):
            add_notes(facts, int(path.stem), [note for note in read_notes(path) if note["at"] >= self.began])
        with self.server.admin as admin:
            mortal = [*admin.scan_iter(keys.job("*"), count=1000), *admin.scan_iter(keys.result("*"), count=1000)]
            facts.without_lifetime = [name for name in mortal if admin.ttl(name) < 0]
        facts.after = self._remains()
        return facts


def add_notes(facts: Facts, pid: int, notes: Iterable[dict[str, Any]]) -> None:
    """Put what a worker noted among the facts."""
    running: dict[str, list[Computation]] = {}
    for note in notes:
        match note["event"]:
            case "delivered":
                facts.deliveries.append(Delivery(note["at"], pid, tuple(note["jobs"])))
            case "started":
                computation = Computation(note["job"], pid, note["at"])
                running.setdefault(note["job"], []).append(computation)
                facts.computations.append(computation)
            case "ended":
                computation = running[note["job"]].pop(0)
                computation.ended, computation.how = note["at"], note["how"]
            case "renewed":
                facts.renewals.setdefault(pid, []).append((note["began"], note["at"]))


def size(admin: redis.Redis, name: str) -> int:
    """How many elements a key has; 0 for one that has a lifetime, and for the names of workers, which stay a while."""
    count = {"string": "strlen", "list": "llen", "hash": "hlen", "set": "scard", "zset": "zcard", "stream": "xlen"}
    kind = str(admin.type(name))
    if kind not in count or name == keys.workers() or admin.ttl(name) >= 0:
        return 0
    return int(getattr(admin, count[kind])(name))

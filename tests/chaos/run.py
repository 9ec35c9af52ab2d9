"""One run: inject faults while workers compute, wait for all jobs, then collect the facts."""

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
from headrace.model.kernels import isa
from tests.chaos.actors import Collector, Server, Submitter, Worker, end_of, errors_in, final_ends, read_notes
from tests.chaos.adapters import ADAPTER_BYTES, write_adapters
from tests.chaos.clocks import ClientClock, next_error, real_time
from tests.chaos.jobs import catalogue, plan, poison
from tests.chaos.ledger import LOSSES, Computation, Delivery, End, Facts, Fault, Remains
from tests.chaos.schedule import Action, Kind, storm
from tests.patience import PATIENCE_S

#: Seconds between checks of the workers.
TICK_S = 0.05
#: Share of the run during which jobs are submitted.
SUBMIT_SHARE = 0.85
#: Seconds between reports of the current figures.
FIGURES_INTERVAL_S = 10.0


@dataclass(frozen=True)
class Plan:
    """The parameters of a run. `actions`, if given, replaces the faults of the seed."""

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
    log: Callable[[str], None] = field(default=lambda _: None)
    #: Called with the current figures every `FIGURES_INTERVAL_S`.
    on_figures: Callable[[dict[str, Any]], None] = field(default=lambda _: None)

    @property
    def settings(self) -> Settings:
        """The settings of the reference and of the first worker."""
        return load_settings(
            slots=self.slots, lease_s=self.lease_s, threads=1, log_format="json", adapter_bytes=ADAPTER_BYTES
        )

    def settings_of(self, worker: int) -> Settings:
        """The settings of a worker: each has an instruction set and a number of threads of its own.

        float32 results must not depend on either.
        """
        rungs = mixed_rungs()
        return self.settings.model_copy(update={"cpu_isa": rungs[worker % len(rungs)], "threads": 1 + worker % 2})

    @property
    def storm(self) -> list[Action]:
        if self.actions is not None:
            return sorted(self.actions)
        return storm(
            self.seed, self.span_s, workers=self.workers, lease_s=float(self.lease_s), without=list(self.without)
        )


def mixed_rungs() -> list[str]:
    """This machine's instruction sets: the best one, the last one, then those between."""
    best, *others = [each.name for each in isa.available()] or [isa.NONE]
    return [best, *others[-1:], *others[:-1]]


def reference_ends(requests: list[dict[str, Any]], settings: Settings) -> list[End]:
    """How each request ends in an undisturbed engine in this process."""
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


def run(run_plan: Plan) -> Facts:
    """Carry out a run and return its facts. Takes `span_s`, plus the time that the remaining jobs need."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-chaos-")))
        server = stack.enter_context(Server(run_plan.appendfsync))
        return Run(run_plan, server, directory, stack).carry_out()


class Run:
    """The actors of a run, and the faults that are injected into them."""

    def __init__(
        self,
        run_plan: Plan,
        server: Server,
        directory: Path,
        stack: ExitStack,
    ) -> None:
        self.run_plan, self.server, self.directory = run_plan, server, directory
        self.requests = catalogue(run_plan.seed, run_plan.requests)
        self.settings = run_plan.settings.model_copy(update={"redis_url": server.url})
        self._adapters_dir = str(write_adapters(directory / "adapters"))
        at = {"redis_url": server.url, "adapters_dir": self._adapters_dir}
        self.workers = [
            Worker(f"w{i}", directory, run_plan.settings_of(i).model_copy(update=at)) for i in range(run_plan.workers)
        ]
        for worker in self.workers:
            stack.callback(worker.kill)
        self.submitter = Submitter(self.settings, self.requests)
        stack.callback(self.submitter.close)
        self.collector = Collector(server.url, self.submitter.jobs)
        self.canceller = Client(settings=self.settings)
        self.client_clock = stack.enter_context(ClientClock())
        stack.callback(self.canceller.close)
        #: Runs calls to Redis, which may block while it is stopped, so that the faults keep their schedule.
        self.background = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="chaos-background"))
        #: When the first fault could begin; earlier events are ignored.
        self.began = 0.0
        self._next_figures_at = 0.0
        self.faults: list[Fault] = []
        #: Faults that end when the next worker process is ready: action, when it began, and the old process id.
        self._returning: dict[int, tuple[Action, float, int]] = {}

    def carry_out(self) -> Facts:
        for worker in self.workers:
            worker.start()
        self.run_plan.log(f"seed {self.run_plan.seed}: computing the reference of {len(self.requests)} requests")
        self.submitter.expected = reference_ends(self.requests, self._reference_settings)
        self._wait(lambda: all(worker.ready for worker in self.workers), 120)
        self._warm_up()
        before = self._remains()
        self.began = real_time()
        self.run_plan.log(f"injecting faults for {self.run_plan.span_s:.0f} s into {self.run_plan.jobs} jobs")
        self.collector.start()
        self.submitter.start(
            plan(self.run_plan.seed, self.run_plan.jobs, self.run_plan.span_s * SUBMIT_SHARE, len(self.requests))
        )
        self._inject_faults()
        self._drain()
        return self._facts(before)

    @property
    def _reference_settings(self) -> Settings:
        """Those of the workers, whose weights nobody has replaced yet."""
        model = str(self.workers[0].model.directory)
        named = {"model": model, "served_name": "demo", "adapters_dir": self._adapters_dir}
        return self.run_plan.settings.model_copy(update=named)

    # --- the storm -------------------------------------------------------------------------------------------------

    def _inject_faults(self) -> None:
        """Begin and end each fault at its time, and supervise the workers in between."""
        zero = time.monotonic()
        steps: list[tuple[float, int, Action, Callable[[], None] | None]] = []
        for number, action in enumerate(self.run_plan.storm):
            heapq.heappush(steps, (action.at, number, action, None))
        while steps:
            at, number, action, undo = heapq.heappop(steps)
            self._supervise_until(zero + at)
            if undo is not None:
                undo()
                continue
            self.run_plan.log(
                f"{at:6.1f} {action.kind} {action.worker if action.worker >= 0 else ''} {action.seconds:.1f}"
            )
            if (undo := self._begin(action)) is not None:
                heapq.heappush(steps, (action.at + action.seconds, number, action, undo))
        self._supervise_until(zero + self.run_plan.span_s)

    def _supervise_until(self, until: float) -> None:
        self._supervise()
        while (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, TICK_S))
            self._supervise()
            if self.began and time.monotonic() >= self._next_figures_at:
                self._next_figures_at = time.monotonic() + FIGURES_INTERVAL_S
                self.run_plan.on_figures(self._so_far())

    def _so_far(self) -> dict[str, Any]:
        seen = list(self.collector.seen.values())
        return {
            "seconds": round(real_time() - self.began),
            "submitted": len(self.submitter.jobs),
            "ended": dict(Counter(end.state for end in seen)),
            "refusals": dict(self.submitter.refusals),
            "actions": dict(Counter(fault.kind for fault in list(self.faults))),
            "deaths": dict(Counter(death.why for worker in self.workers for death in worker.deaths)),
        }

    def _supervise(self) -> None:
        for index, worker in enumerate(self.workers):
            worker.supervise()
            if index in self._returning and worker.pid != self._returning[index][2] and worker.ready:
                self._returned(index)

    def _returned(self, index: int) -> None:
        action, began, pid = self._returning.pop(index)
        self._note(action, began, pid)

    def _note(self, action: Action, began: float, pid: int | None = None) -> None:
        self.faults.append(Fault(action.kind, began, real_time(), pid, action.seconds))

    def _begin(self, action: Action) -> Callable[[], None] | None:
        """Begin a fault. Returns the function that undoes it, or None if it ends at once or by itself."""
        began = real_time()
        if action.kind in ("kill_worker", "end_worker"):
            self._take_down(action, began)
            return None
        worker = self.workers[action.worker]
        ways: dict[Kind, tuple[Callable[[], Any], Callable[[], Any] | None]] = {
            "stop_worker": (lambda: worker.send(signal.SIGSTOP), lambda: worker.send(signal.SIGCONT)),
            "kill_redis": (self.server.kill, self.server.start),
            "stop_redis": (self.server.pause, self.server.resume),
            "fill_redis": (self.server.fill, self.server.free_memory),
            "lose_writes": (self.server.keep, self._lose_writes),
            "replace_weights": (lambda: worker.model.replace(action.salt), worker.model.restore),
            "skew_clock": (lambda: self._skew(action, began), None),
            "lose_redis": (lambda: self.background.submit(self._lose, action, began), None),
            "cut": (lambda: self.background.submit(self._cut, action, began), None),
            "cancel": (lambda: self.background.submit(self._cancel, action, began), None),
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
            self._returned(action.worker)  # it took longer to start than WORKER_START_S
        worker = self.workers[action.worker]
        self._returning[action.worker] = (action, began, worker.pid)
        take = worker.kill if action.kind == "kill_worker" else worker.end
        take(action.seconds)

    def _cut(self, action: Action, began: float) -> None:
        with suppress(redis.RedisError):  # Redis is down
            self.server.cut(action.salt)
        self._note(action, began)

    def _lose(self, action: Action, began: float) -> None:
        with suppress(redis.RedisError):  # Redis is down
            self.server.lose()
            self.collector.loses = True
            self._note(action, began)

    def _lose_writes(self) -> None:
        self.server.lose_writes()
        self.collector.loses = True

    def _skew(self, action: Action, began: float) -> None:
        """Let one clock jump: of a worker, or of the clients in this process. It stays so until the next jump."""
        victim = random.Random(f"whose clock {action.salt}").randrange(len(self.workers) + 1)
        if victim < len(self.workers):
            error_s = self.workers[victim].skew(action.salt)
        else:
            error_s = self.client_clock.error_s = next_error(action.salt, self.client_clock.error_s)
        name = self.workers[victim].name if victim < len(self.workers) else "the client"
        self.run_plan.log(f"       the clock of {name} is wrong by {error_s:.0f} s")
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

    # --- waiting ---------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Wait until all jobs have ended and all messages are acknowledged, or for PATIENCE_S without progress."""
        self.run_plan.log("no more faults: waiting for all jobs")
        left, last_progress = -1, time.monotonic()
        while not self.submitter.done or self.collector.waiting or self._returning:
            if left != (left := len(self.collector.waiting)):
                self.run_plan.log(f"{left} jobs have not ended")
                last_progress = time.monotonic()
            if time.monotonic() - last_progress > PATIENCE_S:
                break
            self._supervise_until(time.monotonic() + 0.1)
        self._wait(
            lambda: self._unacked() == (0, 0) and not self._queued(), 3 * self.run_plan.lease_s + 12, strict=False
        )

    def _wait(self, condition: Callable[[], bool], timeout_s: float, strict: bool = True) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                assert not strict, "timed out while waiting for a condition"
                return
            self._supervise_until(time.monotonic() + TICK_S)

    def _warm_up(self) -> None:
        """Run one job for each worker, so that every permanent key exists before the keys are counted."""
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
        """The permanent keys and the memory of Redis. Deletes what it has of jobs first, to free their memory."""
        with self.server.admin as admin:
            for start in keys.job("*"), keys.result("*"), keys.jobs("*"), keys.submitted(), keys.owners():
                if names := list(admin.scan_iter(start, count=1000)):
                    admin.delete(*names)
            sizes = {name: size(admin, name) for name in admin.scan_iter("*", count=1000)}
            admin.memory_purge()
            info = admin.info("memory")
        # Do not count the temporary buffers of connections and of the append-only file.
        passing = sum(int(info[name]) for name in ("mem_clients_normal", "mem_clients_slaves", "mem_aof_buffer"))
        return Remains(sizes, int(info["used_memory"]) - passing)

    def _final_ends(self) -> dict[str, End]:
        """The ends of jobs as a new client reads them, or as they were seen before Redis lost the results."""
        seen, lost_at = self.collector.seen, max((f.ended for f in self.faults if f.kind in LOSSES), default=0.0)
        early = {job_id: end for job_id, end in seen.items() if end.at <= lost_at}
        return early | final_ends(self.settings, [job_id for job_id in seen if job_id not in early])

    # --- the facts -------------------------------------------------------------------------------------------------

    def _facts(self, before: Remains) -> Facts:
        self.collector.close()
        facts = Facts(
            float(self.run_plan.lease_s),
            jobs=dict(self.submitter.jobs),
            seen=dict(self.collector.seen),
            lost=dict(self.collector.lost),
            final=self._final_ends(),
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
    """Add the recorded events of a worker process to the facts."""
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
    """The number of elements of a key; 0 for keys with a lifetime and for the worker names, which are removed late."""
    count = {"string": "strlen", "list": "llen", "hash": "hlen", "set": "scard", "zset": "zcard", "stream": "xlen"}
    kind = str(admin.type(name))
    if kind not in count or name == keys.workers() or admin.ttl(name) >= 0:
        return 0
    return int(getattr(admin, count[kind])(name))

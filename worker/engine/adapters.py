"""The LoRA adapters of one engine: loaded when a job first names them, unloaded to make room for others. No tensors.

Jobs hold their adapter from their preparation to their end, so it is never unloaded under them. If an adapter's files
are replaced, new jobs get the new one, and running jobs end with the one that they hold.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog

from headrace.client.wire.errors import JobCancelled, JobError, JobFailed
from headrace.client.wire.results import Result
from headrace.config.adapter_names import is_adapter_name
from headrace.model.trusted_files import ModelError
from headrace.worker.engine.loaded_adapter import FILES, LoadedAdapter, Packed, Version, version_of
from headrace.worker.engine.stats import AdapterStats

log = structlog.get_logger("headrace.engine")

#: Adapters that are loaded at the same time.
MAX_THREADS = 2
#: Seconds between two looks at whether a job that waits for memory still wants it.
WAIT_S = 0.5
#: Seconds for which an adapter that could not be loaded is not tried again, unless its files change.
RETRY_S = 5.0
#: How often, and after how many seconds, an adapter is read again whose files were written while it was read.
WRITING_TRIES, WRITING_S = 20, 0.1
#: Seconds for which `stats` uses the names that it has read from the directory.
LISTED_S = 1.0


@dataclass
class _Count:
    """What has run on an adapter."""

    jobs: int = 0
    tokens: int = 0


def _without_loader(folder: Path) -> Packed:
    raise ModelError(f"{folder}: this engine computes no adapters")


class Adapters:
    """The adapters of one engine, by name. May be used from any thread.

    Args:
        load: loads the adapter in a directory. Raises ModelError if it is missing, wrong, or for another model.
        named: name -> directory of the adapters that stay loaded; see `load_named`.
        folder: a directory of further adapters, a directory each.
        budget_bytes: memory for all adapters.
        reserved: names that no adapter may have: those of the models.
    """

    def __init__(
        self,
        load: Callable[[Path], Packed] = _without_loader,
        *,
        named: Mapping[str, Path] | None = None,
        folder: Path | None = None,
        budget_bytes: int = 2**30,
        reserved: Collection[str] = (),
    ) -> None:
        self.budget_bytes = budget_bytes
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="headrace-adapter")
        self._load, self._folder, self._reserved = load, folder, frozenset(reserved)
        self._named = dict(named or {})
        self._pinned = frozenset(self._named)
        self._changed = threading.Condition()  # guards the attributes below
        self._locks: dict[str, threading.Lock] = {}  # held while an adapter of this name is loaded
        self._wanted: dict[str, list[tuple[Future[Result], Callable[[], None]]]] = {}  # see `load_then`
        self._loaded: dict[str, LoadedAdapter] = {}  # the least recently used first
        self._replaced: set[LoadedAdapter] = set()  # their files were replaced, and jobs still hold them
        self._failed: dict[str, tuple[Version, float, JobFailed]] = {}  # with the time when to try again
        self._counts: dict[str, _Count] = {}
        self._waiting = 0
        self._listing: tuple[float, list[str]] = (0.0, [])  # what `names` returned, and until when `stats` uses it

    # --- names -----------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of all adapters, loaded or not, sorted."""
        names = sorted({*self._named, *self._in_folder()})
        self._listing = time.monotonic() + LISTED_S, names
        return names

    def _in_folder(self) -> list[str]:
        try:
            entries = os.listdir(self._folder) if self._folder is not None else []
        except OSError:
            return []
        return [name for name in entries if (place := self._place(name)) is not None and (place / FILES[0]).is_file()]

    def _place(self, name: str) -> Path | None:
        """The directory that an adapter of this name has or would have; None for a name that no adapter can have."""
        if name in self._named:
            return self._named[name]
        if self._folder is None or not is_adapter_name(name) or name in self._reserved:
            return None
        return self._folder / name

    def add(self, name: str, folder: Path) -> None:
        """Give the adapter in a directory a name. It is loaded and unloaded as those of `folder` are."""
        with self._changed:
            self._named[name] = folder
            self._listing = (0.0, [])

    # --- adapters --------------------------------------------------------------------------------------------------

    def load_named(self) -> None:
        """Load the adapters of `named`.

        Raises:
            ModelError: one of them cannot be loaded.
        """
        for name in sorted(self._pinned):
            try:
                self.get(name)
            except JobFailed as error:
                raise ModelError(f"HEADRACE_ADAPTERS: {error.message} (in {self._named[name]})") from error

    def knows(self, name: str) -> bool:
        """Whether `get` answers at once: there is nothing to load or to wait for."""
        # While a job waits for memory, later ones queue behind it, also for loaded adapters: else it might never come.
        return not self._waiting and self._current(name, version_of(self._place(name))) is not None

    def load_then(self, name: str, job: Future[Result], then: Callable[[], None]) -> None:
        """Load an adapter for a job in a thread, and call `then` in it, also if that fails: `get` raises the reason.

        Jobs for the same adapter wait together, so that they hold up no others.
        """
        with self._changed:
            jobs = self._wanted.setdefault(name, [])
            jobs.append((job, then))
            first = len(jobs) == 1
        if first:
            self._threads.submit(self._load_for_all, name)

    def _load_for_all(self, name: str) -> None:
        with contextlib.suppress(JobError):  # each job gets its own
            self._get(name, lambda: any(not job.done() for job, _ in list(self._wanted[name])))
        with self._changed:
            jobs = self._wanted.pop(name)
            loaded = self._loaded.get(name)
            if loaded is not None:
                for job, _ in jobs:
                    self._hold(loaded, job)
        for _, then in jobs:
            then()

    def get(self, name: str, job: Future[Result] | None = None) -> LoadedAdapter:
        """The adapter of this name, loaded now if it is not, or if its files were replaced.

        If there is no memory for it, this waits until jobs end that hold others.

        Args:
            name: as a request gives it.
            job: holds the adapter until it is done.

        Raises:
            JobFailed: there is no such adapter, or it cannot be loaded.
            JobCancelled: the job was cancelled while it waited.
        """
        return self._get(name, lambda: job is None or not job.done(), job)

    def _get(self, name: str, wanted: Callable[[], bool], job: Future[Result] | None = None) -> LoadedAdapter:
        place = self._place(name)
        if place is None or (name not in self._named and not place.is_dir()):
            raise JobFailed("adapter_not_found", f"adapter: {name!r} is none of this worker's: {self._listed()}")
        version = version_of(place)
        if (found := self._current(name, version, job)) is not None:
            return found
        with self._lock_of(name):
            if (found := self._current(name, version, job)) is not None:  # loaded meanwhile for another job
                return found
            loaded = self._read(name, place, version)
            self._insert(loaded, wanted, job)
            return loaded

    def _current(self, name: str, version: Version, job: Future[Result] | None = None) -> LoadedAdapter | None:
        """The loaded adapter of this name, if its files are still those; counts as a use if there is a job."""
        with self._changed:
            found = self._loaded.get(name)
            if found is None or version is None or found.version != version:
                return None
            if job is not None:
                self._loaded[name] = self._loaded.pop(name)
                self._hold(found, job)
            return found

    def _lock_of(self, name: str) -> threading.Lock:
        with self._changed:
            return self._locks.setdefault(name, threading.Lock())

    def _read(self, name: str, place: Path, version: Version) -> LoadedAdapter:
        """Load an adapter whose files have this version, or the one that is being written over it."""
        before, again_at, error = self._failed.get(name, (None, 0.0, None))
        if error is not None and before == version and time.monotonic() < again_at:
            raise JobFailed(error.code, error.message)
        for _ in range(WRITING_TRIES):
            try:
                return LoadedAdapter(name, self._load(place), version)
            except Exception as reason:
                failed, before, version = self._failure(name, place, reason), version, version_of(place)
            if before == version:
                break
            time.sleep(WRITING_S)
        log.error("adapter.failed", adapter=name, error=failed.message)
        self._failed[name] = version, time.monotonic() + RETRY_S, failed
        raise failed

    def _failure(self, name: str, place: Path, reason: Exception) -> JobFailed:
        """Why an adapter cannot be loaded, without the directories, which are the worker's own affair."""
        text = type(reason).__name__
        if isinstance(reason, (ModelError, OSError)):
            text = str(reason).replace(str(place), name)
        if self._folder is not None:
            text = text.replace(str(self._folder), "HEADRACE_ADAPTERS_DIR")
        return JobFailed("adapter_failed", f"adapter {name!r} cannot be loaded: {text}")

    def _listed(self) -> str:
        names = self.names()
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        return shown or "it has none; set HEADRACE_ADAPTERS or HEADRACE_ADAPTERS_DIR"

    # --- memory ----------------------------------------------------------------------------------------------------

    def _insert(self, new: LoadedAdapter, wanted: Callable[[], bool], job: Future[Result] | None) -> None:
        """Take a loaded adapter, in place of an older one of its name, once there is room for it."""
        with self._changed:
            self._check_size(new)
            self._waiting += 1
            try:
                while not self._make_room(new):
                    if not wanted():
                        raise JobCancelled(message="the job was cancelled before it started")
                    self._changed.wait(WAIT_S)
            finally:
                self._waiting -= 1
            self._unload(new.name)
            self._loaded[new.name] = new
            if job is not None:
                self._hold(new, job)
        packed = new.packed
        log.info("adapter.loaded", adapter=new.name, rank=packed.rank, memory_bytes=packed.nbytes, digest=packed.digest)

    def _check_size(self, new: LoadedAdapter) -> None:
        """Refuse an adapter for which there is no room even if all that can be unloaded is."""
        pinned = sum(self._loaded[name].packed.nbytes for name in self._pinned - {new.name} if name in self._loaded)
        if new.packed.nbytes > (room := self.budget_bytes - pinned):
            raise JobFailed(
                "adapter_failed",
                f"adapter {new.name!r} cannot be loaded: it takes {new.packed.nbytes} bytes; the adapters of this "
                f"model may take {self.budget_bytes}, of which those that stay loaded leave {room}. Raise "
                "HEADRACE_ADAPTER_BYTES",
            )

    def _make_room(self, new: LoadedAdapter) -> bool:
        """Unload unused adapters until there is room for a new one. Returns whether there is."""
        idle = [name for name, each in self._loaded.items() if not each.jobs and name not in self._pinned | {new.name}]
        while self._bytes_without(new.name) + new.packed.nbytes > self.budget_bytes:
            if not idle:
                return False
            self._unload(idle.pop(0))
        return True

    def _bytes_without(self, name: str) -> int:
        """The memory of all adapters but an unused one of this name, which is about to be replaced."""
        kept = [each for each in self._loaded.values() if each.name != name or each.jobs]
        return sum(each.packed.nbytes for each in (*kept, *self._replaced))

    def _unload(self, name: str) -> None:
        """Forget an adapter; its memory is free once no job holds it."""
        old = self._loaded.pop(name, None)
        if old is None:
            return
        if old.jobs:
            self._replaced.add(old)
        log.info("adapter.unloaded", adapter=name, digest=old.packed.digest)

    def _hold(self, adapter: LoadedAdapter, job: Future[Result]) -> None:
        if job not in adapter.jobs:
            adapter.jobs.add(job)
            job.add_done_callback(lambda done: self._release(adapter, done))

    def _release(self, adapter: LoadedAdapter, job: Future[Result]) -> None:
        """Count a job that has ended, and let its adapter be unloaded."""
        with self._changed:
            adapter.jobs.discard(job)
            if not adapter.jobs:
                self._replaced.discard(adapter)
            if not job.cancelled() and job.exception() is None:
                count = self._counts.setdefault(adapter.name, _Count())
                count.jobs += 1
                count.tokens += job.result().usage.completion_tokens
            self._changed.notify_all()

    def stats(self) -> list[AdapterStats]:
        """All adapters, with what has run on each."""
        until, names = self._listing
        if time.monotonic() >= until:
            names = self.names()
        with self._changed:
            return [self._stats(name) for name in names]

    def _stats(self, name: str) -> AdapterStats:
        loaded, count = self._loaded.get(name), self._counts.get(name, _Count())
        if loaded is None:
            return AdapterStats(name, jobs=count.jobs, tokens=count.tokens)
        packed = loaded.packed
        return AdapterStats(
            name,
            loaded=True,
            rank=packed.rank,
            nbytes=packed.nbytes,
            digest=packed.digest,
            running=len(loaded.jobs),
            jobs=count.jobs,
            tokens=count.tokens,
        )

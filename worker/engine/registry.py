"""The models of a process: loaded, computing in turn, unloaded when nobody asks for them, and loaded again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable

import structlog

from headrace.config import Settings
from headrace.model.hub import find_model
from headrace.worker.engine.engine import Engine, EngineStats
from headrace.worker.engine.errors import EngineStopped, ModelUnavailable
from headrace.worker.engine.step_loop import Turns

log = structlog.get_logger("headrace.worker")


class Models:
    """Engines by the names of their models. May be used from any thread.

    Args:
        names: in the order of the settings; those without a name of their own mean the first.
        load: builds the engine of a model, not started.
        find: looks for the files of a model that is not loaded yet.
        idle_s: a model that has had no job for so long may be unloaded; 0: none is.

    `load` and `find` raise whatever is wrong with the model.
    """

    def __init__(
        self,
        names: Iterable[str],
        load: Callable[[str], Engine],
        *,
        find: Callable[[str], object] = lambda _: None,
        idle_s: float = 0.0,
    ) -> None:
        self.names = tuple(names)
        self._load, self._find, self._idle_s = load, find, idle_s
        #: Called once, from whatever thread, if an engine cannot go on or a model cannot be loaded.
        self.on_fatal: Callable[[BaseException], None] = lambda _: None
        self._lock = threading.Lock()  # of what stands here
        self._one_loads = threading.Lock()
        self._turns = Turns()
        self._engines: dict[str, Engine] = {}
        self._used_at: dict[str, float] = {}
        self._fetched: set[str] = set()
        self._let_go = False  # of engines whose memory is to be given back
        self._stopped = False

    @classmethod
    def from_settings(cls, settings: Settings) -> Models:
        """The models of the settings, none of them loaded yet."""
        return cls(
            settings.models,
            lambda name: Engine.from_settings(settings, name),
            find=lambda name: find_model(settings.models[name]),
            idle_s=settings.idle_unload_s,
        )

    # --- loading and unloading -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load all, or if idle ones are to be unloaded the first, and see that the files of the others are there.

        So what cannot work is known before a job is taken.

        Raises:
            ModelUnavailable: one cannot be loaded.
        """
        for name in self.names:
            if not self._idle_s or name == self.names[0]:
                self.get(name)
                continue
            try:
                self._find(name)
            except Exception as error:
                raise ModelUnavailable(name, error) from error

    def get(self, name: str) -> Engine:
        """The engine of a model, which is loaded now if it is not.

        Raises:
            ModelUnavailable: it cannot be.
            EngineStopped: the process ends.
        """
        if engine := self.loaded.get(name):
            return engine
        with self._one_loads:
            if engine := self.loaded.get(name):
                return engine
            try:
                engine = self._load(name)
            except Exception as error:
                raise ModelUnavailable(name, error) from error
            self._take_in(name, engine)
            return engine

    def _take_in(self, name: str, engine: Engine) -> None:
        engine.on_fatal = lambda error: self.on_fatal(error)
        with self._lock:
            if self._stopped:
                raise EngineStopped("the process ends")
            self._engines[name] = engine
            self._used_at[name] = time.monotonic()
        engine.start(self._turns)

    def fetch(self, names: Iterable[str], then: Callable[[], None]) -> None:
        """Load those that are not, each in a thread that ends with it, and call `then`. Others compute meanwhile."""
        with self._lock:
            missing = [name for name in names if name not in self._engines and name not in self._fetched]
            self._fetched.update(missing)
        for name in missing:
            threading.Thread(target=self._fetch, args=(name, then), name="headrace-load", daemon=True).start()

    def _fetch(self, name: str, then: Callable[[], None]) -> None:
        log.info("model.wanted", model=name)
        try:
            self.get(name)
        except EngineStopped:
            return
        except Exception as error:
            self.on_fatal(error)  # and it is not tried again
            return
        with self._lock:
            self._fetched.discard(name)
        then()

    def unload_idle(self, busy: Collection[str]) -> None:
        """Unload those that have had no job for long enough; `busy` are the models of the jobs there are.

        Nothing may be submitted meanwhile to one that is not busy. What they held is given back at the next call: the
        thread in which they took turns may look at them once more.
        """
        if self._let_go:
            from headrace.worker.engine.build import release_memory

            release_memory()
            self._let_go = False
        now = time.monotonic()
        with self._lock:
            self._used_at.update(dict.fromkeys(set(busy) & self._engines.keys(), now))
            idle = [name for name in self._engines if self._idle_s and now - self._used_at[name] > self._idle_s]
            engines = [self._engines.pop(name) for name in idle]
        for name, engine in zip(idle, engines, strict=True):
            engine.stop()
            log.info("model.unloaded", model=name)
            self._let_go = True

    # --- while they compute ----------------------------------------------------------------------------------------

    @property
    def unloads(self) -> bool:
        """Whether idle ones are unloaded."""
        return self._idle_s > 0

    @property
    def loaded(self) -> dict[str, Engine]:
        """The engines there are."""
        with self._lock:
            return dict(self._engines)

    def stats(self) -> dict[str, EngineStats]:
        """What each engine is doing."""
        return {name: engine.stats() for name, engine in self.loaded.items()}

    def cancel(self, job_id: str) -> None:
        """Cancel a job, whichever engine has it."""
        for engine in self.loaded.values():
            engine.cancel(job_id)

    def stop(self, *, finish: bool = False, drop_waiting: bool = False) -> None:
        """Stop all engines, as `Engine.stop`, and load no more."""
        with self._lock:
            self._stopped = True
        engines = self.loaded.values()
        for engine in engines:
            engine.stop(finish=finish, drop_waiting=drop_waiting, wait=False)
        for engine in engines:
            engine.stop(finish=finish, drop_waiting=drop_waiting)

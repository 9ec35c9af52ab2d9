"""The models of a process: loads them, runs their engines in one thread, unloads idle ones, and loads them again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable

import structlog

from headrace.config import Settings
from headrace.worker.engine import build
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.errors import EngineStopped, ModelUnavailable
from headrace.worker.engine.stats import EngineStats
from headrace.worker.engine.step_loop import StepLoop

log = structlog.get_logger("headrace.worker")


class ModelRegistry:
    """The engines of a process, by the names of their models. May be used from any thread.

    Args:
        names: the names of the models, in the order of the settings. A job that names no model goes to the first.
        load: builds the engine of a model, without starting it. Raises if the model cannot be loaded.
        find: looks for the files of a model that is not loaded yet. Raises if they cannot be found.
        idle_s: seconds without a job after which a model may be unloaded; 0 keeps all loaded.
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
        #: Called once, from any thread, if an engine cannot continue or a model cannot be loaded.
        self.on_fatal: Callable[[BaseException], None] = lambda _: None
        self._lock = threading.Lock()  # guards the attributes below
        self._loading = threading.Lock()  # held while a model loads: one at a time
        self._loop = StepLoop()
        self._engines: dict[str, Engine] = {}
        self._used_at: dict[str, float] = {}
        self._fingerprints: dict[str, str] = {}  # of every model that was ever loaded; guarded by `_loading`
        self._load_requested: set[str] = set()
        self._unreleased = False  # engines were unloaded whose memory has not been freed yet
        self._stopped = False

    @classmethod
    def from_settings(cls, settings: Settings) -> ModelRegistry:
        """A registry for the models of the settings. None is loaded yet."""
        return cls(
            settings.models,
            lambda name: build.load_engine(settings, name),
            find=lambda name: build.find_files(settings, name),
            idle_s=settings.idle_unload_s,
        )

    # --- loading and unloading -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Load all models. If idle models are unloaded, load the first only, and check the files of all.

        A wrong setting is therefore reported before a job is taken.

        Raises:
            ModelUnavailable: a model cannot be loaded or found.
        """
        for name in self.names if self._idle_s else ():
            try:
                self._find(name)
            except Exception as error:
                raise ModelUnavailable(name, error) from error
        for name in self.names[:1] if self._idle_s else self.names:
            self.get(name)

    def get(self, name: str) -> Engine:
        """The engine of a model. Loads the model first if necessary.

        Raises:
            ModelUnavailable: the model cannot be loaded.
            EngineStopped: the process is ending.
        """
        if engine := self.loaded.get(name):
            return engine
        with self._loading:
            if engine := self.loaded.get(name):
                return engine
            try:
                engine = self._load(name)
            except Exception as error:
                raise ModelUnavailable(name, error) from error
            self._compare(name, engine)
            self._register(name, engine)
            return engine

    def _compare(self, name: str, engine: Engine) -> None:
        """Say so if a model that is loaded again computes other results than before: its files were replaced."""
        before = self._fingerprints.setdefault(name, engine.fingerprint)
        if before != engine.fingerprint:
            log.warning("model.changed", model=name, before=before, fingerprint=engine.fingerprint)
            self._fingerprints[name] = engine.fingerprint

    def _register(self, name: str, engine: Engine) -> None:
        engine.on_fatal = lambda error: self.on_fatal(error)
        with self._lock:
            if self._stopped:
                raise EngineStopped("the process is ending")
            self._engines[name] = engine
            self._used_at[name] = time.monotonic()
        engine.start(self._loop)

    def load_in_background(self, names: Iterable[str], then: Callable[[], None]) -> None:
        """Load the models that are not loaded, each in a thread of its own, and call `then` after each one.

        Loaded models continue to compute meanwhile.
        """
        with self._lock:
            missing = [name for name in names if name not in self._engines and name not in self._load_requested]
            self._load_requested.update(missing)
        for name in missing:
            threading.Thread(target=self._load_in_thread, args=(name, then), name="headrace-load", daemon=True).start()

    def _load_in_thread(self, name: str, then: Callable[[], None]) -> None:
        log.info("model.wanted", model=name)
        try:
            self.get(name)
        except EngineStopped:
            return
        except Exception as error:
            self.on_fatal(error)  # the name stays in _load_requested, so that it is not tried again
            return
        with self._lock:
            self._load_requested.discard(name)
        then()

    def unload_idle(self, busy: Collection[str]) -> None:
        """Unload models that have had no job for `idle_s`.

        The memory of unloaded models is freed at the next call, because the step loop may refer to them until then.

        Args:
            busy: models that have jobs. The caller must not submit jobs to other models during this call.
        """
        if self._unreleased:
            build.release_memory()
            self._unreleased = False
        now = time.monotonic()
        with self._lock:
            self._used_at.update(dict.fromkeys(set(busy) & self._engines.keys(), now))
            idle = [name for name in self._engines if self._idle_s and now - self._used_at[name] > self._idle_s]
            engines = [self._engines.pop(name) for name in idle]
        for name, engine in zip(idle, engines, strict=True):
            engine.stop()
            log.info("model.unloaded", model=name)
            self._unreleased = True

    # --- loaded models ---------------------------------------------------------------------------------------------

    @property
    def unloads(self) -> bool:
        """Whether idle models are unloaded."""
        return self._idle_s > 0

    @property
    def loaded(self) -> dict[str, Engine]:
        """The engines of the loaded models, by name."""
        with self._lock:
            return dict(self._engines)

    def stats(self) -> dict[str, EngineStats]:
        """Load and counters of each engine, by the name of its model."""
        return {name: engine.stats() for name, engine in self.loaded.items()}

    def cancel(self, job_id: str) -> None:
        """Cancel a job in whichever engine has it."""
        for engine in self.loaded.values():
            engine.cancel(job_id)

    def stop(self, *, finish: bool = False, drop_waiting: bool = False) -> None:
        """Stop all engines like `Engine.stop`, and load no more models."""
        with self._lock:
            self._stopped = True
        engines = self.loaded.values()
        for engine in engines:
            engine.stop(finish=finish, drop_waiting=drop_waiting, wait=False)
        for engine in engines:
            engine.stop(finish=finish, drop_waiting=drop_waiting)

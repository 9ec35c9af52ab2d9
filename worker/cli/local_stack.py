"""Who serves the jobs of one command: what runs, else a Redis and a worker of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from rich.console import Console

from headrace.client import Client, RedisUnreachable
from headrace.client.wire.errors import HeadraceError
from headrace.client.wire.keys import queue
from headrace.config import Settings, load_settings
from headrace.config.tracing import setup_tracing
from headrace.worker.redis_server import EmbeddedRedis, die_with_parent

#: The longest a worker may take to load its model when a command starts one.
START_TIMEOUT_S = 300
#: Jobs of a worker of ours that died wait for so long at most: there is no other on that Redis.
OWN_LEASE_S = 20
#: Pauses before a worker of ours that died is started again: the first, and the longest.
RESTART_S, LONGEST_RESTART_S = 0.5, 60.0

note = Console(stderr=True, highlight=False)


def settings_for(model: str | None, **overrides: Any) -> Settings:
    """The settings of a command that may name a model: one of HEADRACE_MODEL by its name, or any other."""
    settings = load_settings(**overrides)
    if model is None:
        return settings
    if model in settings.models:
        return settings.only(model)
    return load_settings(**overrides, model=model, served_name=None)


class NothingRuns(HeadraceError):
    """Raised when no worker serves the model, and none may or can be started."""


class Serving(NamedTuple):
    """A client whose jobs are served. Call `look` often: it brings back what died of a pair of our own."""

    client: Client
    look: Callable[[], None]
    #: Whether Redis and worker end with this command.
    own: bool


def run_worker() -> int:
    """Run a worker in this process until a signal ends it, as `celery -A worker worker` does. Returns the exit code.

    Raises:
        NothingRuns: a model cannot be loaded.
    """
    from headrace.worker.celery import app  # reads the settings, and registers what starts an embedded Redis server

    # Without its banner: a reason why the worker cannot start would stand below twenty lines of it.
    code = app.start(["--quiet", "worker", "--without-gossip", "--without-mingle"])
    if (reason := getattr(app, "headrace_unavailable", None)) is not None:
        raise NothingRuns(reason)
    return int(code or 0)


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[Serving]:
    """Use what runs, else start a Redis and a worker for this call. Raises NothingRuns, RedisUnreachable."""
    with contextlib.ExitStack() as stack:
        stack.callback(setup_tracing(settings, "headrace"))
        with Client(settings=settings) as client:
            try:
                status = client.status()
                if status.serves(settings.model_name):
                    yield Serving(client, lambda: None, own=False)
                    return
                if settings.redis_url is not None:
                    served = ", ".join(sorted({worker.model for worker in status.workers})) or "nothing"
                    raise NothingRuns(
                        f"no worker serves {queue(settings.model_name)} on the Redis that HEADRACE_REDIS_URL names; "
                        f"start one with `celery -A worker worker`. Served there: {served}"
                    )
            except RedisUnreachable:
                if settings.redis_url is not None:
                    raise
        with own_pair(settings) as pair:
            yield pair


@contextlib.contextmanager
def own_pair(settings: Settings) -> Iterator[Serving]:
    """A client of a Redis and a worker that exist for this call only. Start it in the main thread."""
    with EmbeddedRedis.ephemeral() as server:
        own = settings.model_copy(update={"redis_url": server.url, "lease_s": min(settings.lease_s, OWN_LEASE_S)})
        with Client(settings=own) as client, contextlib.closing(_Worker(own)) as worker:
            with note.status(f"no worker runs; starting one with model {settings.model_name} for this call"):
                worker.wait_until_served(client)

            def look() -> None:
                server.start()  # does nothing while it is alive
                worker.look()

            yield Serving(client, look, own=True)


class _Worker:
    """A worker as our child process, started again when it dies."""

    def __init__(self, settings: Settings) -> None:
        self._model = settings.model_name
        ours = {name: getattr(settings, name) for name in ("redis_url", "model", "served_name", "dtype", "lease_s")}
        given = {f"HEADRACE_{name.upper()}": "" if value is None else str(value) for name, value in ours.items()}
        self._environment = {**os.environ, **given}
        # No port: that of the environment may be another worker's.
        self._environment |= {"HEADRACE_LOG_FORMAT": "json", "HEADRACE_METRICS_PORT": "0"}
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        self._pause, self._restart_at = RESTART_S, 0.0
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "celery", "--quiet", "-A", "worker", "worker"]
        command = die_with_parent([*command, "--without-gossip", "--without-mingle"])
        return subprocess.Popen(command, env=self._environment, stdout=self._output, stderr=self._output)  # noqa: S603

    def wait_until_served(self, client: Client) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not client.status().serves(self._model):
            if self._process.poll() is not None or time.monotonic() > deadline:
                if (reason := self._model_failure()) is not None:
                    raise NothingRuns(reason)
                what = "ended" if self._process.poll() is not None else f"was not ready after {START_TIMEOUT_S} s"
                raise NothingRuns(
                    "\n".join([f"the worker started for this call {what}; its last lines:", *self._lines()[-20:]])
                )
            time.sleep(0.05)

    def look(self) -> None:
        """Start it again if it died, the later the more often it did."""
        if self._process.poll() is None:
            return
        if not self._restart_at:
            note.print(f"the worker of this call ended with code {self._process.returncode}; starting another")
            self._restart_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_RESTART_S)
        elif time.monotonic() >= self._restart_at:
            self._restart_at, self._process = 0.0, self._start()

    def close(self) -> None:
        self._process.kill()  # nobody else's jobs are on its Redis, which goes too
        self._process.wait()
        self._output.close()

    def _lines(self) -> list[str]:
        self._output.seek(0)
        return self._output.read().decode(errors="replace").strip().splitlines()

    def _model_failure(self) -> str | None:
        """Why the worker could not load its model; None if it ended for another reason."""
        for line in self._lines():
            with contextlib.suppress(ValueError):
                event = json.loads(line) if line.startswith("{") else {}
                if event.get("event") == "worker.model_failed":
                    return str(event.get("error"))
        return None

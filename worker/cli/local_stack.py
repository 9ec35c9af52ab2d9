"""Serves the jobs of one command: by running workers, else by a local stack (Redis and a worker) for this command."""

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
from headrace.client.wire.redis import resolve_url
from headrace.client.wire.start_advice import start_worker
from headrace.config import Settings, load_settings
from headrace.config.tracing import setup_tracing
from headrace.extras import why_no_worker
from headrace.worker.child_processes import die_with_parent
from headrace.worker.redis_server import EmbeddedRedis

#: The longest a worker may take to load its model when a command starts one.
START_TIMEOUT_S = 300
#: Longest lease of a local worker. No other worker reads that Redis: its jobs wait for the lease if it dies.
OWN_LEASE_S = 20
#: Pauses before a local worker that died is restarted: the first, and the longest.
RESTART_S, LONGEST_RESTART_S = 0.5, 60.0

note = Console(stderr=True, highlight=False)


def settings_for(model: str | None, **overrides: Any) -> Settings:
    """The settings of a command that may name a model: one of HEADRACE_MODEL by its name, or any other."""
    settings = load_settings(**overrides)
    if model is None:
        return settings
    if model in settings.models:
        return settings.only(model)
    return load_settings(**overrides, model=model, served_name=None, adapters=None, adapters_dir=None)


class NothingRuns(HeadraceError):
    """Raised when no worker serves the model, and none may or can be started."""


class ServingStack(NamedTuple):
    """A client whose jobs are served. Call `supervise` often: it restarts the processes of a local stack that died."""

    client: Client
    supervise: Callable[[], None]
    #: Whether it is a local stack: Redis and worker end with this command.
    local: bool


@contextlib.contextmanager
def find_or_start_stack(
    settings: Settings, open_client: Callable[[Settings], Client] = lambda settings: Client(settings=settings)
) -> Iterator[ServingStack]:
    """Yield a client of the workers that serve the model, else of a local stack that exists during the block.

    Raises:
        NothingRuns: no worker serves the model on the Redis that the settings name, or the local one cannot start.
        RedisUnreachable: the Redis that the settings name does not answer.
    """
    with contextlib.ExitStack() as at_exit:
        at_exit.callback(setup_tracing(settings, "headrace"))
        with open_client(settings) as client:
            if _is_served(client, settings):
                yield ServingStack(client, lambda: None, local=False)
                return
        with start_local_stack(settings) as stack:
            yield stack


def _is_served(client: Client, settings: Settings) -> bool:
    """Whether workers serve the model; an error if none does on a Redis that the settings name."""
    try:
        status = client.status()
    except RedisUnreachable:
        if settings.redis_url is not None:
            raise
        return False
    if not status.serves(settings.model_name) and settings.redis_url is not None:
        served = ", ".join(sorted({worker.model for worker in status.workers})) or "nothing"
        raise NothingRuns(
            f"no worker serves {queue(settings.model_name)} on the Redis that HEADRACE_REDIS_URL names; start one with "
            f"{start_worker(resolve_url(settings), [settings.model_name], settings)}. Served there: {served}"
        )
    return status.serves(settings.model_name)


def check_worker_packages() -> None:
    """Raise NothingRuns, which says what to install, if this environment cannot load a model."""
    if reason := why_no_worker():
        raise NothingRuns(reason)


@contextlib.contextmanager
def start_local_stack(settings: Settings) -> Iterator[ServingStack]:
    """A client of an embedded Redis and a worker that exist only during the block. Call it in the main thread.

    Raises:
        NothingRuns: packages of the worker are missing, or the worker ended or was not ready after `START_TIMEOUT_S`.
        EmbeddedRedisError: no Redis can be started here.
    """
    check_worker_packages()
    with EmbeddedRedis.ephemeral() as server:
        own = settings.model_copy(update={"redis_url": server.url, "lease_s": min(settings.lease_s, OWN_LEASE_S)})
        with Client(settings=own) as client, contextlib.closing(_WorkerProcess(own)) as worker:
            with note.status(f"no worker runs; starting one with model {settings.model_name} for this call"):
                worker.wait_until_served(client)

            def supervise() -> None:
                server.start()  # does nothing while it is alive
                worker.supervise()

            yield ServingStack(client, supervise, local=True)


class _WorkerProcess:
    """A worker as a child process, restarted when it dies."""

    def __init__(self, settings: Settings) -> None:
        self._model = settings.model_name
        ours = {name: getattr(settings, name) for name in ("redis_url", "model", "served_name", "dtype", "lease_s")}
        given = {f"HEADRACE_{name.upper()}": "" if value is None else str(value) for name, value in ours.items()}
        self._environment = {**os.environ, **given}
        # No metrics port: another worker may use the one in the environment.
        self._environment |= {"HEADRACE_LOG_FORMAT": "json", "HEADRACE_METRICS_PORT": "0"}
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        self._pause, self._restart_at = RESTART_S, 0.0
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the user's own modules in the working directory must not be taken for parts of this program.
        command = die_with_parent([sys.executable, "-P", "-m", "headrace.worker.cli", "up"])
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

    def supervise(self) -> None:
        """Restart it with exponential backoff if it died."""
        if self._process.poll() is None:
            return
        if not self._restart_at:
            note.print(f"the worker of this call ended with code {self._process.returncode}; starting another")
            self._restart_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_RESTART_S)
        elif time.monotonic() >= self._restart_at:
            self._restart_at, self._process = 0.0, self._start()

    def close(self) -> None:
        self._process.kill()  # its Redis, which ends too, holds no jobs of others
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

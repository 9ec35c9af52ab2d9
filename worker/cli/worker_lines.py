"""What `headrace up` says to a person: one line when it is ready, and what becomes of the jobs when it stops."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import click

from headrace.client.wire.redis import resolve_url
from headrace.client.wire.start_advice import start_worker, use_worker
from headrace.config import Settings

#: Seconds after which a start that is not ready says that it goes on.
SLOW_START_S = 4.0
#: The loggers whose events become sentences.
LOGGERS = ("headrace.worker", "headrace.engine")


def are_for_people(settings: Settings) -> bool:
    """Whether the lines on standard error are read by a person, not by a program."""
    return settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())


class WorkerLines(logging.Filter):
    """Writes sentences in place of the log lines about the start and the end of a worker. Other lines pass.

    Args:
        settings: of the worker.
        write: writes a line.
    """

    def __init__(self, settings: Settings, write: Callable[[str], object] = lambda line: click.echo(line, err=True)):
        super().__init__()
        self._settings, self._write = settings, write
        self._own_redis = False
        self._slow = threading.Timer(SLOW_START_S, self._say_slow)
        self._slow.daemon = True

    def __enter__(self) -> None:
        for name in LOGGERS:
            logging.getLogger(name).addFilter(self)
        self._slow.start()

    def __exit__(self, *_: object) -> None:
        self._slow.cancel()
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Called by logging: whether the record is written as a log line."""
        event = record.msg if isinstance(record.msg, dict) else {}
        match event.get("event"):
            case "redis.embedded":
                self._own_redis = True
            case "model.loaded" | "worker.model_failed":  # the command ends with the reason of the second
                pass
            case "worker.ready":
                self._slow.cancel()
                self._write(f"headrace: {self._ready(event)}")
            case "worker.stopping":
                self._write(f"headrace: {_stopping(event)}")
            case "worker.draining":
                left = f"{_jobs(event['running'])} still running, at most {event['tokens']} tokens to go"
                self._write(f"headrace: {left}")
            case "worker.stopped":
                self._write(f"headrace: {self._stopped(event)}")
            case _:
                return True
        return False

    def _say_slow(self) -> None:
        names = ", ".join(self._settings.models)
        self._write(f"headrace: loading {names}; a first start also compiles kernels for this machine")

    def _ready(self, event: Mapping[str, Any]) -> str:
        names, url = list(self._settings.models), resolve_url(self._settings)
        kept = " (started here)" if self._own_redis else ""
        following = use_worker('generate "Hello."', url, names[0])
        return (
            f"ready, model{'s' * (len(names) > 1)} {', '.join(names)}, Redis at {event['url']}{kept}; "
            f"next, in another terminal: {following}"
        )

    def _stopped(self, event: Mapping[str, Any]) -> str:
        states = ("succeeded", "failed", "cancelled", "expired")
        ended = ", ".join(f"{event[state]} {state}" for state in states if event[state])
        shown = f"stopped; jobs since the start: {ended or 'none'}"
        if event["queued"] is None:
            return f"{shown}; Redis did not answer, so it is not known what remains queued"
        left = {name: count for name, count in event["queued"].items() if count}
        if not left:
            return f"{shown}; nothing remains queued"
        counts = ", ".join(f"{_jobs(count)} for {name}" for name, count in left.items())
        again = start_worker(resolve_url(self._settings), left, self._settings)
        return f"{shown}; {counts} remain queued: {again} computes them"


def _stopping(event: Mapping[str, Any]) -> str:
    running, held = event["running"], event["held"]
    if not held:
        return "stopping"
    others = f"; those that wait return to the queue: {held - running}" if held > running else ""
    again = "Ctrl-C again returns all to the queue at once"
    return f"stopping; jobs that run are finished first: {running}{others}. {again}"


def _jobs(count: int) -> str:
    return f"{count} job" if count == 1 else f"{count} jobs"

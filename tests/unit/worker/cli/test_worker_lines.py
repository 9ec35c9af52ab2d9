"""What `headrace up` says on a terminal in place of log lines."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from headrace.config import load_settings
from headrace.worker.cli.worker_lines import WorkerLines

ENDED = {"event": "worker.stopped", "succeeded": 0, "failed": 0, "cancelled": 0, "expired": 0, "returned": 0}


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"event": "redis.embedded"}, None),
        ({"event": "model.loaded"}, None),
        (
            {"event": "worker.ready", "url": "redis://host:6379/0"},
            "ready, models gpt2, chat, Redis at redis://host:6379/0; next, in another terminal: "
            '`HEADRACE_REDIS_URL=redis://host:6379/0 headrace generate "Hello." --model gpt2`',
        ),
        ({"event": "worker.stopping", "running": 0, "held": 0}, "stopping"),
        (
            {"event": "worker.stopping", "running": 1, "held": 4},
            "stopping; jobs that run are finished first: 1; those that wait return to the queue: 3. "
            "Ctrl-C again returns all to the queue at once",
        ),
        (
            {"event": "worker.draining", "running": 2, "tokens": 30, "seconds": 2.0},
            "2 jobs still running, at most 30 tokens to go",
        ),
        (
            {**ENDED, "succeeded": 7, "expired": 1, "queued": {"gpt2": 0, "chat": 5}},
            "stopped; jobs since the start: 7 succeeded, 1 expired; 5 jobs for chat remain queued: "
            "`HEADRACE_REDIS_URL=redis://host:6379/0 headrace up --model ./chat` computes them",
        ),
        ({**ENDED, "queued": {"gpt2": 0}}, "stopped; jobs since the start: none; nothing remains queued"),
        (
            {**ENDED, "queued": None},
            "stopped; jobs since the start: none; Redis did not answer, so it is not known what remains queued",
        ),
    ],
)
def test_start_and_end_are_sentences(event: dict[str, Any], line: str | None) -> None:
    said: list[str] = []
    lines = WorkerLines(load_settings(model="gpt2,chat=./chat", redis_url="redis://host:6379/0"), said.append)
    record = logging.LogRecord("headrace.worker", logging.INFO, "", 0, "", (), None)
    record.msg = event  # type: ignore[assignment]  # as structlog passes it
    assert not lines.filter(record)
    assert said == ([f"headrace: {line}"] if line else [])


@pytest.mark.parametrize("message", [{"event": "job.finished"}, "a line of a library"])
def test_other_lines_are_logged(message: Any) -> None:
    record = logging.LogRecord("headrace.worker", logging.INFO, "", 0, message, (), None)
    assert WorkerLines(load_settings(), pytest.fail).filter(record)

"""Logging: every logger writes the same fields, once, and no private data."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from headrace.config.logging import setup_logging
from headrace.config.settings import Settings, load_settings


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Restore the logging of the process, which these tests change."""
    names = ("headrace", "celery", "kombu", "celery.app.trace", "celery.pool")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    root = logging.getLogger()
    for handler in [one for one in root.handlers if one.get_name() == "headrace"]:
        root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def start(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO | None = None, **overrides: Any) -> io.StringIO:
    """Set up logging to a stream."""
    stream = stream or io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    setup_logging(load_settings(**overrides))
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail_with_a_local_variable() -> None:
    prompt = "the private words of " + "somebody"
    raise ValueError(len(prompt))


def test_both_kinds_of_loggers_give_the_same_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = start(monkeypatch)
    structlog.contextvars.bind_contextvars(job_id="j1")
    structlog.get_logger("headrace.engine").info("job.finished", tokens=3)
    logging.getLogger("celery.worker").warning("lost %d of %s", 1, "them")
    ours, theirs = lines(stream)
    assert ours == {
        "event": "job.finished",
        "job_id": "j1",
        "level": "info",
        "logger": "headrace.engine",
        "timestamp": ours["timestamp"],
        "tokens": 3,
    }
    assert theirs == {
        "event": "lost 1 of them",
        "job_id": "j1",
        "level": "warning",
        "logger": "celery.worker",
        "timestamp": theirs["timestamp"],
    }
    for line in (ours, theirs):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line["timestamp"])


def test_arguments_in_the_old_style_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = start(monkeypatch)
    structlog.get_logger("headrace.x").info("took %s of %s", 1, 2)
    assert lines(stream)[0]["event"] == "took 1 of 2"


def test_a_second_setup_does_not_double_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch)
    logger = structlog.get_logger("headrace.x")
    logger.info("before")
    stream = start(monkeypatch)
    logger.info("after")
    logging.getLogger("celery").error("theirs")
    assert [line["event"] for line in lines(stream)] == ["after", "theirs"]


def test_other_handlers_stay(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    start(monkeypatch)
    logging.getLogger("kombu").warning("seen by both")
    assert "seen by both" in caplog.text


@pytest.mark.parametrize(
    ("log_level", "seen"),
    [
        (
            "debug",
            ["ours debug", "ours info", "ours error", "celery debug", "celery info", "celery error", "trace error"],
        ),
        ("info", ["ours info", "ours error", "celery error", "trace error"]),
        ("error", ["ours error", "celery error", "trace error"]),
    ],
)
def test_levels(monkeypatch: pytest.MonkeyPatch, log_level: str, seen: list[str]) -> None:
    stream = start(monkeypatch, log_level=log_level)
    loggers = {
        "ours": structlog.get_logger("headrace.x"),
        "celery": logging.getLogger("celery.worker"),
        # Celery's tracer logs results, which contain users' text, at the level info.
        "trace": logging.getLogger("celery.app.trace"),
    }
    for name, logger in loggers.items():
        for level in ("debug", "info", "error"):
            getattr(logger, level)(f"{name} {level}")
    assert [line["event"] for line in lines(stream)] == seen


# How a line looks


@pytest.mark.parametrize(
    ("log_format", "terminal", "is_json"),
    [("auto", True, False), ("auto", False, True), ("console", False, False), ("json", True, True)],
)
def test_format(monkeypatch: pytest.MonkeyPatch, log_format: str, terminal: bool, is_json: bool) -> None:
    stream = start(monkeypatch, Terminal() if terminal else io.StringIO(), log_format=log_format)
    structlog.get_logger("headrace.x").info("job.accepted", job_id="j1")
    assert stream.getvalue().startswith("{") == is_json
    assert "job.accepted" in stream.getvalue()


@pytest.mark.parametrize(("terminal", "no_color", "colors"), [(True, "", True), (True, "1", False), (False, "", False)])
def test_colors_only_on_a_terminal_that_wants_them(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, no_color: str, colors: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    stream = start(monkeypatch, Terminal() if terminal else io.StringIO(), log_format="console")
    structlog.get_logger("headrace.x").info("job.accepted")
    assert ("\x1b[" in stream.getvalue()) == colors


# What must not be in it


@pytest.mark.parametrize("log_format", ["console", "json"])
@pytest.mark.parametrize("logger", [structlog.get_logger("headrace.x"), logging.getLogger("celery.worker")])
def test_tracebacks_show_no_local_variables(monkeypatch: pytest.MonkeyPatch, log_format: str, logger: Any) -> None:
    stream = start(monkeypatch, log_format=log_format)
    try:
        fail_with_a_local_variable()
    except ValueError:
        logger.exception("job.failed")
    text = stream.getvalue()
    assert "Traceback (most recent call last)" in text
    assert "fail_with_a_local_variable" in text
    assert "ValueError: 29" in text
    assert "the private words of somebody" not in text


def test_a_traceback_is_one_string_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = start(monkeypatch, log_format="json")
    structlog.get_logger("headrace.x").error("job.failed", exc_info=ValueError("why"))
    (line,) = lines(stream)
    assert line["exception"] == "ValueError: why"
    assert "exc_info" not in line


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:6379/0", "redis://:***@host:6379/0"),
        ("redis://user:secret@host/0", "redis://user:***@host/0"),
        ("rediss://user:secret@host/0", "rediss://user:***@host/0"),
        ("sentinel://:secret@a:26379;sentinel://:secret@b:26379", "sentinel://:***@b:26379"),
        ("redis://:se/cr@et@host/0", "redis://:***@host/0"),
        ("redis+socket://user:secret@/run/redis.sock", "redis+socket://user:***@/run/redis.sock"),
        ("unix:///run/redis.sock?password=secret&db=0", "unix:///run/redis.sock?password=***&db=0"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("unix:///run/redis.sock?db=0", "unix:///run/redis.sock?db=0"),
        ("https://example.org:443/a@b", "https://example.org:443/a@b"),
    ],
)
@pytest.mark.parametrize("log_format", ["console", "json"])
def test_passwords_are_replaced_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch, log_format: str, url: str, shown: str
) -> None:
    stream = start(monkeypatch, log_format=log_format)
    logger = structlog.get_logger("headrace.x")
    error = ConnectionError(f"cannot connect to {url} now")
    logger.info(f"connecting to {url} now")
    logger.info("connecting", url=url, options={"urls": [url, (url,)]}, error=error)
    logger.error("failed", exc_info=error)
    logging.getLogger("kombu").warning("gave up on %s", url)
    text = stream.getvalue()
    assert "secret" not in text
    assert "cr@et" not in text
    assert text.count(shown) >= 7


def test_settings_in_a_field_keep_their_password_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = start(monkeypatch)
    settings = Settings(redis_url="redis://:secret@host/0", slots=5)
    structlog.get_logger("headrace.x").info("worker.started", settings=settings, nothing=None, yes=True, ratio=0.5)
    (line,) = lines(stream)
    assert "secret" not in line["settings"]
    assert "slots=5" in line["settings"]
    assert (line["nothing"], line["yes"], line["ratio"]) == (None, True, 0.5)

"""Logging of headrace programs: one line per event on standard error, with the same fields for every logger."""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from headrace.config.settings import Settings

_HANDLER = "headrace"

# Up to the last @ of the word: a password may contain an unescaped @ or /.
_PASSWORD = re.compile(r"((?:rediss?|redis\+socket|unix|sentinel)://[^\s:/?#@]*:)\S*@")
_PASSWORD_IN_QUERY = re.compile(r"((?:rediss?|redis\+socket|unix|sentinel)://\S*?[?&]password=)[^\s&]+")

#: Loggers of libraries, and whether `log_level=debug` enables them. The last two would log arguments and results of
#: tasks, which contain prompts and generated text.
_LIBRARY_LOGGERS = {"celery": True, "kombu": True, "celery.app.trace": False, "celery.pool": False}


def setup_logging(settings: Settings, file: str | None = None) -> None:
    """Send all lines of structlog and of the standard library to one handler. A second call replaces the handler.

    The lines go to standard error, or are appended to `file`.

    Every line has `timestamp` (ISO 8601, UTC), `level`, `logger`, `event`, and the bound context variables (`job_id`).
    Exceptions have a traceback without local variables, because these may contain prompts. Passwords in Redis URLs are
    replaced by `***`.
    """
    handler = logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared_processors(),
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                redact,
                _renderer(settings, terminal=file is None and sys.stderr.isatty()),
            ],
        )
    )
    root = logging.getLogger()
    for old in [other for other in root.handlers if other.get_name() == _HANDLER]:
        root.removeHandler(old)
        if isinstance(old, logging.FileHandler):
            old.close()
    root.addHandler(handler)
    _set_levels(settings)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared_processors(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        # A logger that was used before this call must use the new configuration too.
        cache_logger_on_first_use=False,
    )


def redact(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:  # noqa: ARG001 (structlog's signature)
    """structlog processor: replace passwords of Redis URLs in all fields, also in nested ones."""
    return {name: _redacted(value) for name, value in event.items()}


def _redacted(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, dict):
        return {name: _redacted(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(item) for item in value]
    # The renderer would call repr() on any other object, for example an exception.
    text = value if isinstance(value, str) else repr(value)
    return _PASSWORD_IN_QUERY.sub(r"\1***", _PASSWORD.sub(r"\1***@", text))


def _shared_processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]


def _renderer(settings: Settings, *, terminal: bool) -> Processor:
    if settings.log_format == "console" or (settings.log_format == "auto" and terminal):
        colors = terminal and not os.environ.get("NO_COLOR")  # https://no-color.org
        return structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
    return structlog.processors.JSONRenderer()


def _set_levels(settings: Settings) -> None:
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    logging.getLogger("headrace").setLevel(level)
    for name, at_debug in _LIBRARY_LOGGERS.items():
        logging.getLogger(name).setLevel(logging.DEBUG if at_debug and level == logging.DEBUG else logging.WARNING)

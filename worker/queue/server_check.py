"""The worker looks at its Redis when it connects: a Redis that loses jobs is refused, and other dangers are logged."""

from __future__ import annotations

import redis
import structlog

from headrace.client.wire.clock import RedisClock
from headrace.client.wire.redis import connect, resolve_url
from headrace.client.wire.suitability import ServerReport, check_suitable, read_report
from headrace.config import Settings

log = structlog.get_logger("headrace.worker")

#: What this process has logged, by URL: a worker that connects again does not repeat it.
_logged: set[tuple[str, str]] = set()


def check_server(settings: Settings) -> None:
    """Look at the Redis that the settings name now. If it does not answer, this does nothing.

    Raises:
        RedisUnsuitable: it loses jobs, and the settings do not allow that.
    """
    url = resolve_url(settings)
    try:
        with connect(url) as connection:
            report = read_report(connection, RedisClock())
    except redis.RedisError:
        return  # the worker looks again when it has connected
    _log_new(url, report, allowed=settings.redis_unsuitable == "allow")
    if settings.redis_unsuitable == "refuse":
        check_suitable(url, report)


def _log_new(url: str, report: ServerReport, *, allowed: bool) -> None:
    if report.unchecked and _is_new(url, report.unchecked):
        log.info("redis.unchecked", reason=report.unchecked)
    for finding in report.warnings:
        if _is_new(url, finding.problem):
            log.warning("redis.not_durable", problem=finding.problem, hint=finding.fix)
    for finding in report.problems if allowed else ():
        if _is_new(url, finding.problem):
            log.warning("redis.loses_jobs", problem=finding.problem, hint=finding.fix)


def _is_new(url: str, text: str) -> bool:
    new = (url, text) not in _logged
    _logged.add((url, text))
    return new

"""Looks at a Redis before jobs are sent there: whether it can hold them, and what its clock says."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field

import redis

from headrace.client.wire.clock import RedisClock
from headrace.client.wire.errors import RedisRefused, RedisUnreachable
from headrace.client.wire.redis import connect, redis_errors, resolve_url
from headrace.client.wire.suitability import check_suitable, read_report
from headrace.config import Settings

log = logging.getLogger("headrace.client")

#: A Redis is looked at again after this many seconds: another server may have become the primary.
LOOK_S = 600.0


@dataclass
class _Server:
    clock: RedisClock = field(default_factory=RedisClock)
    looked_at: float = float("-inf")
    warned: bool = False


#: What this process knows, by URL, for all its clients.
_servers: dict[str, _Server] = {}


class ServerCheck:
    """The Redis of a client.

    Args:
        connection: to the Redis at `url`.
        allow_unsuitable: do not ask whether it can hold jobs.
    """

    def __init__(self, connection: redis.Redis, url: str, *, allow_unsuitable: bool) -> None:
        self._redis, self._url, self._allow = connection, url, allow_unsuitable
        self._server = _servers.setdefault(url, _Server())

    @property
    def clock(self) -> RedisClock:
        """Redis' clock."""
        return self._server.clock

    def before_submit(self) -> None:
        """Ask Redis what is not known yet; mostly this sends nothing.

        Raises:
            RedisUnsuitable: it would lose jobs.
            RedisUnreachable, RedisRefused: it does not answer, or answers with an error.
        """
        with redis_errors(self._url):
            if not self._allow and time.monotonic() - self._server.looked_at > LOOK_S:
                self._look()
            self.measure()

    def measure(self) -> None:
        """Ask for Redis' time, unless it is known. Raises redis.RedisError."""
        self.clock.update(self._redis)

    def _look(self) -> None:
        report = read_report(self._redis, self.clock)
        check_suitable(self._url, report)
        self._server.looked_at = time.monotonic()
        if report.persistence == "none" and not self._server.warned:
            self._server.warned = True
            log.warning("this Redis may lose jobs: %s", "; ".join(map(str, report.warnings)))


def check_redis(settings: Settings) -> None:
    """Refuse a Redis that loses jobs before a server depends on it. If it does not answer, this does nothing.

    Raises:
        RedisUnsuitable: it loses jobs, and the settings do not allow that.
    """
    url = resolve_url(settings)
    with contextlib.suppress(RedisUnreachable, RedisRefused), connect(url) as connection:
        ServerCheck(connection, url, allow_unsuitable=settings.redis_unsuitable == "allow").before_submit()

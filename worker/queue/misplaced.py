"""Says in the log that messages for headrace are in lists of Redis that no worker reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import redis
import structlog

from headrace.client.wire.misplaced import find_misplaced

log = structlog.get_logger("headrace.worker")

#: Seconds between two searches.
LOOK_S = 60.0


class MisplacedMessages:
    """Looks for misplaced messages and logs each list that has some once, until it is empty again."""

    def __init__(self, models: Iterable[str]) -> None:
        self._models = list(models)
        self._reported: set[str] = set()
        self._allowed = True

    def look(self, connection: redis.Redis) -> None:
        """Look once. Without Redis nothing is reported; without the right to read the lists it never looks again."""
        if not self._allowed:
            return
        with contextlib.suppress(redis.RedisError, OSError):
            try:
                found = find_misplaced(connection, self._models)
            except redis.exceptions.NoPermissionError:
                self._allowed = False
                return
            for place in found:
                if place.key not in self._reported:
                    log.warning("messages.misplaced", key=place.key, messages=place.messages, hint=place.advice)
            self._reported = {place.key for place in found}

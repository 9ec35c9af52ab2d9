"""The time of the Redis that clients and workers share. Deadlines, leases and heartbeats use it.

The clocks of machines differ, sometimes by hours, and may jump. Each process measures how far Redis' clock is from its
own monotonic clock, which does not jump, and so knows Redis' time without a request.
"""

from __future__ import annotations

import time
from typing import Any

import redis

#: A measurement is used for this many seconds. Until the first one succeeds, Redis is asked more often.
MEASURE_S, RETRY_S = 60.0, 5.0
#: A difference between clocks of more than this many seconds is told.
SKEW_S = 5.0
#: If the clock of this machine moves by more than this many seconds against its monotonic clock, it has jumped, or the
#: machine was suspended, during which the monotonic clock stands still.
JUMP_S = 1.0


class RedisClock:
    """Redis' time, by the last good answer to TIME; the clock of this machine until there is one."""

    def __init__(self) -> None:
        self._ahead_s: float | None = None  # Redis' time minus this process' monotonic clock
        self._round_trip_s = float("inf")
        self._due_at = float("-inf")
        self._wall_ahead_s = 0.0  # this machine's time minus its monotonic clock, at the last attempt

    def now(self) -> float:
        """The Unix time in seconds on Redis' clock."""
        return time.time() if self._ahead_s is None else time.monotonic() + self._ahead_s

    def update(self, connection: redis.Redis) -> None:
        """Ask for the time if the last answer is old. A user without the right to ask keeps this machine's clock.

        Raises:
            redis.ConnectionError, redis.TimeoutError: Redis does not answer.
        """
        if not self.is_due():
            return
        sent_at = time.monotonic()
        try:
            reply = connection.time()
        except redis.ResponseError as error:
            self.take(error, sent_at)
        except redis.RedisError as error:
            self.take(error, sent_at)
            raise
        else:
            self.take(reply, sent_at)

    def is_due(self) -> bool:
        """Whether the last answer is old, or this machine's clock has jumped since."""
        jumped = abs(time.time() - time.monotonic() - self._wall_ahead_s) > JUMP_S
        return jumped or time.monotonic() >= self._due_at

    def take(self, reply: Any, sent_at: float) -> None:
        """Take the reply to TIME, which was sent at `sent_at` on the monotonic clock and has just arrived.

        A slow reply is less exact: it replaces a quick one only if that is old, or if the two contradict each other. An
        error in place of a reply changes nothing.
        """
        received_at = time.monotonic()
        was_due, self._wall_ahead_s = self.is_due(), time.time() - received_at
        try:
            seconds, microseconds = map(int, reply)
        except (TypeError, ValueError):
            self._due_at = received_at + (RETRY_S if self._ahead_s is None else MEASURE_S)
            return
        round_trip_s = received_at - sent_at
        ahead_s = seconds + microseconds / 1e6 - (sent_at + received_at) / 2
        if round_trip_s > self._round_trip_s and not was_due and not self._contradicts(ahead_s, round_trip_s):
            return
        self._ahead_s, self._round_trip_s, self._due_at = ahead_s, round_trip_s, received_at + MEASURE_S

    def _contradicts(self, ahead_s: float, round_trip_s: float) -> bool:
        """Whether a measurement shows that Redis' clock has jumped since the last one."""
        inexact_s = (round_trip_s + self._round_trip_s) / 2 + 0.01
        return self._ahead_s is None or abs(ahead_s - self._ahead_s) > inexact_s

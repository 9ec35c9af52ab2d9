"""The time of the Redis that clients and workers share. Deadlines, leases and heartbeats use it.

The clocks of machines differ, sometimes by hours, and may jump. Each process measures how far Redis' clock is from its
own monotonic clock, which does not jump, and so knows Redis' time without a request.
"""

from __future__ import annotations

import time
from typing import Any

#: A measurement is used for this many seconds.
MEASURE_S = 60.0
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
        self._measured_at = float("-inf")
        self._wall_ahead_s = 0.0  # this machine's time minus its monotonic clock, at the measurement
        self._unavailable = False

    def now(self) -> float:
        """The Unix time in seconds on Redis' clock."""
        return time.time() if self._ahead_s is None else time.monotonic() + self._ahead_s

    def is_due(self) -> bool:
        """Whether TIME should be asked again. Never, if Redis has denied it."""
        if self._unavailable:
            return False
        jumped = abs(time.time() - time.monotonic() - self._wall_ahead_s) > JUMP_S
        return jumped or time.monotonic() - self._measured_at > MEASURE_S

    def take(self, reply: Any, sent_at: float) -> None:
        """Take the reply to TIME, which was sent at `sent_at` on the monotonic clock and has just arrived.

        A slow reply is less exact: it replaces a quick one only if that is old, or if the two contradict each other.
        """
        received_at = time.monotonic()
        try:
            seconds, microseconds = map(int, reply)
        except (TypeError, ValueError):
            self._unavailable = True
            return
        round_trip_s = received_at - sent_at
        ahead_s = seconds + microseconds / 1e6 - (sent_at + received_at) / 2
        if round_trip_s > self._round_trip_s and not self.is_due() and not self._contradicts(ahead_s, round_trip_s):
            return
        self._ahead_s, self._round_trip_s, self._measured_at = ahead_s, round_trip_s, received_at
        self._wall_ahead_s = time.time() - received_at

    def _contradicts(self, ahead_s: float, round_trip_s: float) -> bool:
        """Whether a measurement shows that Redis' clock has jumped since the last one."""
        inexact_s = (round_trip_s + self._round_trip_s) / 2 + 0.01
        return self._ahead_s is None or abs(ahead_s - self._ahead_s) > inexact_s

"""Whether the worker is alive and ready, as its probes, its metrics and its record say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery.worker import state

from headrace.worker.jobs.store import WORKER_TTL_S

if TYPE_CHECKING:
    from headrace.worker.engine.registry import ModelRegistry


class Health:
    """The state of the engines and of the connection to Redis. May be used from any thread.

    Args:
        models: the engines.
        stall_s: an engine is stalled if one step takes longer than this many seconds.
        consuming: whether Celery reads the queue.
    """

    def __init__(self, models: ModelRegistry, stall_s: float, consuming: Callable[[], bool]) -> None:
        self._models, self._stall_s, self._consuming = models, stall_s, consuming
        #: Redis did not answer the last request of the heartbeat.
        self.redis_down = False
        #: When Redis last answered, by the monotonic clock.
        self.answered_at = float("-inf")
        #: The heartbeat has ended.
        self.ended = False

    @property
    def stalled_for_s(self) -> float:
        """How long an engine has been in its current step if that is too long, else 0. All engines share one thread."""
        age_s = max((stats.step_age_s for stats in self._models.stats().values()), default=0.0)
        return age_s if age_s > self._stall_s else 0.0

    @property
    def redis_answers(self) -> bool:
        """Whether Redis accepted the last heartbeat, recently enough that the worker's record has not expired."""
        return not self.redis_down and time.monotonic() - self.answered_at < WORKER_TTL_S

    def why_not_alive(self) -> str:
        """The problem that a restart would solve; empty if there is none."""
        age_s = self.stalled_for_s
        return f"the engine has been at one step for {age_s:.0f} s" if age_s else ""

    def why_not_ready(self) -> str:
        """Why no job would be taken and computed now; empty if one would."""
        if stopping() or self.ended:
            return "the worker is stopping"
        if not self.redis_answers:
            return "Redis does not take the worker's heartbeat"
        if not self._consuming():
            return "the queue is not being read yet"
        return self.why_not_alive()


def stopping() -> bool:
    """Whether this process was told to end."""
    return any(flag is not None and flag is not False for flag in (state.should_stop, state.should_terminate))

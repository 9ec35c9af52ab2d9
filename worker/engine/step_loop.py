"""One thread in which the engines of a process compute, a step each in turn.

Not a thread for each: torch gives every thread that computes a team of as many threads as there are cores, and where
the teams together have more than that, all of them sleep where they would wait for a neighbour for a moment. A step is
as fast as it is alone this way, and comes half as often while another model has work too.
"""

from __future__ import annotations

import threading
from typing import Protocol


class Player(Protocol):
    """What takes turns: an engine."""

    over: threading.Event

    def turn(self) -> float: ...


class Turns:
    """The thread. It runs while there is anybody in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._news = threading.Event()
        self._players: list[Player] = []
        self._thread: threading.Thread | None = None

    def join(self, player: Player) -> None:
        """Let another one take turns, until it is `over`."""
        with self._lock:
            self._players.append(player)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="headrace-engine", daemon=True)
                self._thread.start()
        self.wake()

    def wake(self) -> None:
        """Somebody has something to do."""
        self._news.set()

    def here(self) -> bool:
        """Whether this is the thread."""
        return self._thread is threading.current_thread()

    def _loop(self) -> None:
        while players := self._present():
            self._news.clear()
            rests = [player.turn() for player in players]
            if rest := min(rests):
                self._news.wait(rest)

    def _present(self) -> list[Player]:
        with self._lock:
            self._players = [player for player in self._players if not player.over.is_set()]
            if not self._players:
                self._thread = None
            return list(self._players)

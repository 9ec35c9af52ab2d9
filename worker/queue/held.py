"""The messages that this process has taken out of Redis and has neither acknowledged nor returned.

Most of them are in the pool. The others wait inside Celery: for their ETA or countdown, or for a rate limit. For Redis
there is no difference: each has a lease, which this process has to renew until the message is settled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

#: Celery keeps at most this many waiting messages, with at most this many bytes of bodies. Of more messages only the
#: delivery tag is kept, and the text remains in Redis.
MAX_WAITING, MAX_WAITING_BYTES = 1_000, 2**26
#: A process that holds this many waiting messages takes no more of any kind.
MAX_PARKED = 100_000


@dataclass(eq=False)
class HeldMessage:
    """One message without an acknowledgement.

    Attributes:
        tag: its delivery tag.
        taken: it has been given to the pool.
        request: Celery's Request while it waits; None if only the tag is kept.
        timer_entry: returns the message to its queue when its ETA comes, if only the tag is kept.
        model: the model of its queue.
        until: the Unix time of its ETA, if it has one.
        job_ids: its jobs; None until somebody has asked.
        size: bytes of its body.
        announced: the records of its jobs say that they wait.
    """

    tag: str
    taken: bool = False
    request: Any = None
    timer_entry: Any = None
    model: str | None = None
    until: float | None = None
    job_ids: tuple[str, ...] | None = None
    size: int = 0
    announced: bool = False


class Holder(Protocol):
    """What the consumer does with waiting messages. Call these in the main thread; unknown tags are ignored."""

    def check_revoked(self) -> None:
        """End the waiting messages that were revoked or have expired."""

    def release(self, tag: str) -> None:
        """Give a waiting message to the pool now, because its jobs were cancelled."""

    def acknowledge(self, tag: str) -> None:
        """Remove a waiting message whose jobs have all ended."""

    def forget(self, tag: str) -> None:
        """Drop a message whose lease has run out: another worker has it."""


class HeldMessages:
    """Keeps the held messages by delivery tag. May be used from any thread."""

    #: Set by the consumer.
    holder: Holder

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: dict[str, HeldMessage] = {}
        self._waiting: dict[str, HeldMessage] = {}
        self._requests = self._bytes = 0

    def add(self, tag: str) -> None:
        """A message has been taken."""
        with self._lock:
            self._messages.setdefault(tag, HeldMessage(tag))

    def wait(self, message: HeldMessage) -> None:
        """A message waits inside Celery from now on."""
        with self._lock:
            self._messages[message.tag] = self._waiting[message.tag] = message
            if message.request is not None:
                self._requests += 1
                self._bytes += message.size

    def take(self, tag: str) -> None:
        """A message no longer waits: it goes to the pool, or is settled."""
        with self._lock:
            if (message := self._messages.get(tag)) is not None:
                message.taken = True
                self._leave(tag)

    def _leave(self, tag: str) -> None:
        """Remove a message from the waiting ones. The caller holds the lock."""
        if (message := self._waiting.pop(tag, None)) is not None and message.request is not None:
            self._requests -= 1
            self._bytes -= message.size
            message.request = None

    def remove(self, tags: Iterable[str]) -> None:
        """Messages have been acknowledged or returned, or their leases are given up."""
        with self._lock:
            for tag in tags:
                self._leave(tag)
                self._messages.pop(tag, None)

    def tags(self) -> list[str]:
        """The delivery tags of all held messages."""
        with self._lock:
            return list(self._messages)

    def untaken(self) -> list[str]:
        """The delivery tags of the messages that have not been given to the pool."""
        with self._lock:
            return [message.tag for message in self._messages.values() if not message.taken]

    def waiting(self) -> list[HeldMessage]:
        """The messages that wait inside Celery."""
        with self._lock:
            return list(self._waiting.values())

    def waiting_for(self, model: str) -> int:
        """How many messages for a model wait inside Celery."""
        with self._lock:
            return sum(message.model == model for message in self._waiting.values())

    def waits(self, tag: str) -> HeldMessage | None:
        """The message with this tag if it waits."""
        with self._lock:
            return self._waiting.get(tag)

    @property
    def keeps_tags_only(self) -> bool:
        """Whether Celery keeps as many waiting messages as it may."""
        return self._requests >= MAX_WAITING or self._bytes >= MAX_WAITING_BYTES

    @property
    def full(self) -> bool:
        """Whether no more messages may be taken."""
        return len(self._waiting) >= MAX_PARKED

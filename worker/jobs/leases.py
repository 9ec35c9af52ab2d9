"""Renews the leases of held messages, and finds jobs that other workers ended because a lease ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from headrace.worker.jobs.deliveries import DeliveryBook
from headrace.worker.jobs.store import Store
from headrace.worker.queue.held import HeldMessages

#: How many leases one request renews.
LEASES_AT_ONCE = 1_000


class Leases:
    """The leases of this process. Used by the heartbeat thread only.

    Args:
        store: keeps the leases.
        book: the messages that this process holds.
        lease_s: other workers may take a message whose lease was not renewed for this many seconds.
        let_go: called with jobs that another worker has ended.
        held: all messages that this process has not acknowledged, also those that wait inside Celery.
        forget: called with the delivery tag of each message outside the pool that another worker has taken.
    """

    def __init__(
        self,
        store: Store,
        book: DeliveryBook,
        lease_s: float,
        let_go: Callable[[Sequence[str]], None],
        held: HeldMessages | None = None,
        forget: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._held, self._forget = held or HeldMessages(), forget
        self._store, self._book, self._lease_s, self._let_go = store, book, lease_s, let_go
        self._renew_at = 0.0
        self._renewed_at = float("-inf")
        #: Jobs whose lease may have run out, so that another worker may have ended them.
        self._doubtful: set[str] = set()

    def renew_soon(self) -> None:
        """Renew at the next call, whenever the last renewal was."""
        self._renew_at = 0.0

    def renew(self, now: float) -> None:
        """Renew all leases if it is time. `now` is the monotonic clock's. Raises redis.RedisError."""
        if now < self._renew_at:
            return
        held, deliveries = self._held.tags(), self._book.deliveries()
        in_pool = {delivery.tag for delivery in deliveries if delivery.tag is not None}
        if not (held or deliveries):
            return
        outside = [tag for tag in held if tag not in in_pool]
        self._store.renew(in_pool)
        for part in batched(outside, LEASES_AT_ONCE):
            self._store.renew(part)
            for tag in self._store.lost(part):
                self._forget(tag)
        late = now - self._lease_s / 2  # half, because the clocks of two machines differ and a lookup costs little
        for delivery in deliveries:
            if max(delivery.received_at, self._renewed_at) < late:
                self._doubtful.update(list(delivery.open))
        self._renewed_at, self._renew_at = now, now + self._lease_s / 4
        self._doubtful.intersection_update(self._book.open_jobs())
        if doubtful := list(self._doubtful):
            records = zip(doubtful, self._store.lookup(doubtful), strict=True)
            if ended := [job_id for job_id, record in records if record.finished]:
                self._let_go(ended)


def batched(tags: Iterable[str], size: int) -> Iterator[list[str]]:
    """The tags in lists of at most this size. Python 3.12 has it as `itertools.batched`."""
    left = iter(tags)
    while part := list(islice(left, size)):
        yield part

"""Renews the leases of held messages, and finds jobs that other workers ended because a lease ran out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from headrace.worker.jobs.deliveries import DeliveryBook
from headrace.worker.jobs.store import Store


class Leases:
    """The leases of this process. Used by the heartbeat thread only.

    Args:
        store: keeps the leases.
        book: the messages that this process holds.
        lease_s: other workers may take a message whose lease was not renewed for this many seconds.
        let_go: called with jobs that another worker has ended.
    """

    def __init__(
        self, store: Store, book: DeliveryBook, lease_s: float, let_go: Callable[[Sequence[str]], None]
    ) -> None:
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
        deliveries = self._book.deliveries()
        if not deliveries or now < self._renew_at:
            return
        self._store.renew([delivery.tag for delivery in deliveries if delivery.tag is not None])
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

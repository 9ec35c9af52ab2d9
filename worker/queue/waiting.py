"""What the consumer does with messages that wait inside Celery, for their ETA or countdown, or for a rate limit."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import structlog
from celery.utils.time import maybe_iso8601, maybe_make_aware
from celery.utils.time import timezone as zones
from celery.worker import state
from kombu.transport import virtual

from headrace.worker.queue.held import HeldMessage, HeldMessages
from headrace.worker.queue.messages import model_of

log = structlog.get_logger("headrace.worker")


class WaitingConsumer(Protocol):
    """What `WaitingMessages` needs of the consumer; all but the last two are Celery's."""

    timer: Any
    qos: Any
    task_consumer: Any
    task_buckets: Any
    on_task_request: Callable[[Any], Any]

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Refuse a message."""

    def return_message(self, tag: str) -> None:
        """Return a message to its queue."""

    def acknowledge_message(self, tag: str) -> None:
        """Acknowledge a message."""


def eta_of(headers: Any, timezone: Any) -> float | None:
    """The ETA in the headers of a message, as a Unix time; None if it has none.

    Raises:
        ValueError: it is not a time; the text says what it is.
    """
    eta = headers.get("eta")
    if eta is None:
        return None
    try:
        # `to_system`, because Celery converts it so, and fails for times at the ends of the calendar.
        return float(zones.to_system(maybe_make_aware(maybe_iso8601(eta), timezone)).timestamp())
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"its eta is {str(eta)[:80]!r}; expected a time in ISO 8601") from error


class WaitingMessages:
    """Implements `Holder` for a consumer. Used in the main thread only.

    Celery keeps waiting messages in its timer and in the token buckets of rate limits, and forgets both when the
    connection to Redis is lost.
    """

    def __init__(self, consumer: WaitingConsumer, held: HeldMessages) -> None:
        self._consumer, self._held = consumer, held
        held.holder = self

    def add(self, request: Any) -> None:
        """A message has become a Request. It waits until it is given to the pool."""
        message = HeldMessage(
            request.message.delivery_tag,
            request=request,
            model=model_of(request.delivery_info),
            until=None if request.eta is None else request.eta.timestamp(),
            size=len(request.body),
        )
        self._held.wait(message)

    def park(self, message: Any, until: float, job_ids: Callable[[], Sequence[str]]) -> bool:
        """Keep only the tag of a message whose ETA is to come, if Celery keeps many. Returns whether that was done.

        Its text remains in Redis. When its time comes, it returns to its queue, and any worker with room takes it.
        """
        if until <= time.time() or not self._held.keeps_tags_only:
            return False
        tag = message.delivery_tag
        entry = self._consumer.timer.call_after(until - time.time(), self._consumer.return_message, (tag,))
        model = model_of(message.delivery_info)
        self._held.wait(HeldMessage(tag, timer_entry=entry, model=model, until=until, job_ids=tuple(job_ids())))
        self._drop_text(tag)
        return True

    def take_out(self, tag: str) -> Any:
        """Remove a message from Celery's timer or token bucket. Returns its Request; None if it does not wait here."""
        message = self._held.waits(tag)
        if message is None:
            return None
        request, entry = message.request, message.timer_entry
        if request is not None:
            entry = None if self._leave_bucket(request) else request._eta_timer_entry
            if entry is not None:
                self._consumer.qos.decrement_eventually()
            state.task_ready(request)
        if entry is not None:
            self._consumer.timer.cancel(entry)
            entry.args = ()  # the timer keeps a cancelled entry until its time comes
        self._held.take(tag)
        return request

    def _leave_bucket(self, request: Any) -> bool:
        for bucket in filter(None, self._consumer.task_buckets.values()):
            left = deque(item for item in bucket.contents if item[0] is not request)
            if len(left) < len(bucket.contents):
                bucket.contents = left
                return True
        return False

    def check_revoked(self) -> None:
        """End the waiting messages that were revoked or have expired; `JobRequest` takes them out."""
        for message in self._held.waiting():
            if (request := message.request) is not None:
                try:
                    request.revoked()
                except Exception as error:  # its stamps, which anybody may have written, cannot be compared
                    self.take_out(message.tag)
                    self._consumer.on_invalid_task(None, request.message, error)

    def release(self, tag: str) -> None:
        """Give a waiting message to the pool now, which finds that its jobs were cancelled."""
        if (request := self.take_out(tag)) is not None:
            state.task_reserved(request)
            self._consumer.on_task_request(request)

    def acknowledge(self, tag: str) -> None:
        """Remove a waiting message whose jobs have all ended."""
        if self._held.waits(tag) is not None:
            self.take_out(tag)
            self._consumer.acknowledge_message(tag)

    def forget(self, tag: str) -> None:
        """Drop a message whose lease has run out: another worker has it."""
        if self._held.waits(tag) is not None:
            log.warning("message.lost", reason="its lease ran out while it waited, so another worker has it")
            self.take_out(tag)
        self._drop_text(tag)
        self._held.remove([tag])

    def _drop_text(self, tag: str) -> None:
        """Let the channel forget a message, which it would keep until it is acknowledged."""
        channel = getattr(self._consumer.task_consumer, "channel", None)
        if (qos := getattr(channel, "_qos", None)) is not None:
            virtual.QoS.ack(qos, tag)  # type: ignore[no-untyped-call]

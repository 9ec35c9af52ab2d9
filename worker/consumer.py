"""What Celery 5.7.0 needs to live through the loss of Redis."""

from __future__ import annotations

from typing import Any

import structlog
from celery.worker import state
from celery.worker.consumer import Consumer

log = structlog.get_logger("millrace.worker")

#: Pause before an acknowledgement is sent again that Redis did not take.
ACK_RETRY_S = 1.0


class SafeConsumer(Consumer):
    """Keeps the messages in hand, with their leases, when the connection to Redis is lost.

    Stock Celery would put every message in hand back into the queue, so each job in flight runs twice; and where Redis
    is really gone (kill -9, restart), kombu reads the host name of a connection it has just collected, and the
    AttributeError ends the worker (Consumer.on_connection_error_after_connected, kombu.transport.redis._connparams).
    Here the channels are told not to restore; the engine goes on, the monitor renews the leases, and acknowledgements
    go out by delivery tag over whatever connection there is then.
    """

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        """Called by Celery before it reconnects."""
        for channel in self._channels():
            qos = getattr(channel, "_qos", None)
            if qos is not None:
                qos.restore_at_shutdown = False
        for request in list(state.requests.values()):
            tag = request.message.delivery_tag
            # The pool calls both from the main thread.
            request._on_ack = lambda *_, tag=tag: self._ack(tag)
            request._on_reject = lambda _log, _errors, requeue=False, tag=tag: self._reject(tag, requeue)
        super().on_connection_error_after_connected(exc)

    def _channels(self) -> set[Any]:
        connection = self.connection
        transport = getattr(connection, "transport", None)
        channels = {getattr(connection, "_default_channel", None), *(getattr(transport, "channels", None) or ())}
        return channels - {None}

    def _ack(self, tag: str) -> None:
        self._settle(tag, lambda qos: qos._remove_from_indices(tag).execute())

    def _reject(self, tag: str, requeue: bool) -> None:
        if requeue:
            self._settle(tag, lambda qos: qos.restore_by_tag(tag, leftmost=True))
        else:
            self._ack(tag)

    def _settle(self, tag: str, action: Any) -> None:
        """Acknowledge or return a message by its tag; again and again while there is no connection."""
        try:
            action(self.task_consumer.channel.qos)
        except Exception as error:
            log.info("ack.retried", error=type(error).__name__)
            self.timer.call_after(ACK_RETRY_S, self._settle, (tag, action))

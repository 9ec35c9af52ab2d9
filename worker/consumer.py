"""What Celery 5.7.0 needs to live through the loss of Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
from celery.worker import state
from celery.worker.consumer import Consumer

from client.schema import GROUP_TASK_NAME, TASK_NAME

log = structlog.get_logger("millrace.worker")

#: Pause before acknowledgements are sent again that Redis did not take.
ACK_RETRY_S = 1.0


class SafeConsumer(Consumer):
    """Keeps the messages in hand, with their leases, when the connection to Redis is lost.

    Stock Celery would put every message in hand back into the queue, so each job in flight runs twice; and where Redis
    is really gone (kill -9, restart), kombu reads the host name of a connection it has just collected, and the
    AttributeError ends the worker (Consumer.on_connection_error_after_connected, kombu.transport.redis._connparams).
    Here the channels are told not to restore; the engine goes on and the monitor renews the leases. Messages are
    acknowledged by delivery tag over whatever connection there is then, not over the channel they came by.
    """

    def __init__(self, on_task_request: Callable[[Any], Any], *args: Any, **kwargs: Any) -> None:
        def take(request: Any) -> Any:
            tag = request.message.delivery_tag
            request._on_ack = lambda *_: self._settle(tag, lambda channel: channel.basic_ack(tag))
            request._on_reject = lambda _log, _errors, requeue=False: self._settle(
                tag, lambda channel: channel.basic_reject(tag, requeue=requeue)
            )
            if not isinstance(request.id, str):  # no result could be stored under it, so it would come again for ever
                log.error("message.refused", reason="its task id is no text", kind=type(request.id).__name__)
                state.task_ready(request)
                return request.reject(requeue=False)
            if request.type in (TASK_NAME, GROUP_TASK_NAME):
                # `inspect active` would show them to whoever asks; the pool reads the request from its headers.
                request._args, request._kwargs = ("<redacted>",), {}
            return on_task_request(request)

        self._unsettled: dict[str, Callable[[Any], None]] = {}
        super().__init__(take, *args, **kwargs)

    def on_ready(self) -> None:
        """Called by Celery whenever it begins to consume, at the start and after each reconnect."""
        super().on_ready()
        if hasattr(self.pool, "has_room"):
            self._count_jobs()
        self._settle_all()

    def _count_jobs(self) -> None:
        """Take messages by the jobs that the pool holds. Celery counts messages, of which each may hold many."""
        qos = self.task_consumer.channel.qos  # this connection's; `worker_disable_prefetch` of Celery does it so too
        has_credit = qos.can_consume
        qos.can_consume = lambda: self.pool.has_room() and has_credit()

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        """Called by Celery before it reconnects."""
        for channel in self._channels():
            qos = getattr(channel, "_qos", None)
            if qos is not None:
                qos.restore_at_shutdown = False
        super().on_connection_error_after_connected(exc)

    def _channels(self) -> set[Any]:
        connection = self.connection
        transport = getattr(connection, "transport", None)
        channels = {getattr(connection, "_default_channel", None), *(getattr(transport, "channels", None) or ())}
        return channels - {None}

    def _settle(self, tag: str, action: Callable[[Any], None]) -> None:
        """Acknowledge or return a message; while there is no connection it waits for the next one."""
        self._unsettled[tag] = action
        self._settle_all()

    def _settle_all(self) -> None:
        for tag, action in list(self._unsettled.items()):
            try:
                action(self.task_consumer.channel)
            except Exception as error:
                log.info("ack.waiting", error=type(error).__name__, messages=len(self._unsettled))
                self.timer.call_after(ACK_RETRY_S, self._settle_all)
                return
            self._unsettled.pop(tag, None)

"""What Celery 5.7.0 needs to live through the loss of Redis, and through messages that nobody can read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import redis
import structlog
from celery.exceptions import InvalidTaskError
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.request import Request

from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import is_job_id
from headrace.worker.jobs.service import BAD_SIGNATURE, read_group
from headrace.worker.queue.permissions import is_forbidden
from headrace.worker.queue.transport import CONNECTION_ERRORS, dead_letter, plain_client, transport_that_takes
from headrace.worker.queue.validation import MAX_MESSAGE_BYTES, forbid_compression, reason_to_refuse, take_out_unsigned
from headrace.worker.tasks import argument, model_of

log = structlog.get_logger("headrace.worker")

#: Pause before acknowledgements are sent again that Redis did not take.
ACK_RETRY_S = 1.0
#: Pause before it connects again to a Redis that answers and refuses.
REFUSED_PAUSE_S = 1.0


class JobRequest(Request):
    """A message of ours. Where it is revoked or expired, stock Celery stores and acknowledges that at once, in the main
    thread, which waits there if Redis is away; and the jobs of a message would end after it. The pool ends them."""

    own: Callable[[Any], None]
    pool: Any
    _already_revoked: bool

    def terminate(self, pool: Any, signal: Any = None) -> None:  # noqa: ARG002
        """Called by Celery's remote control, whether the task runs or not."""
        self._announce_revoked("terminated", True, None, False)

    def _announce_revoked(self, reason: str, terminated: bool, signum: int | None, expired: bool) -> None:
        """Called by Celery when it has found that the task is revoked."""
        if not self._already_revoked:
            self._already_revoked = True
            self.own(self)
            self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)
            self.pool.revoke(self, reason)


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
            self._own(request)
            if request.type in (TASK_NAME, GROUP_TASK_NAME):
                # `inspect active` would show them to whoever asks; the pool reads the request from its headers.
                request._args, request._kwargs = ("<redacted>",), {}
            return on_task_request(request)

        self._unsettled: dict[str, Callable[[Any], None]] = {}
        forbid_compression()
        # Else every worker is told of every heartbeat of every other one, and does nothing with it.
        super().__init__(take, *args, **{**kwargs, "without_gossip": True})
        self._signing_keys = self.app.headrace_settings.signing_keys

    def _own(self, request: Any) -> None:
        """Let a message be acknowledged or returned over the connection there is then."""
        tag = request.message.delivery_tag
        request._on_ack = lambda *_: self._settle(tag, lambda channel: channel.basic_ack(tag))
        request._on_reject = lambda _log, _errors, requeue=False: self._settle(
            tag, lambda channel: channel.basic_reject(tag, requeue=requeue)
        )

    def update_strategies(self) -> None:
        """Called by Celery before it consumes, to know how each task is received."""
        if hasattr(self.pool, "revoke"):
            request = type("JobRequest", (JobRequest,), {"own": staticmethod(self._own), "pool": self.pool})
            for name in (TASK_NAME, GROUP_TASK_NAME):
                self.app.tasks[name].Request = request
        super().update_strategies()

    def cancel_active_requests(self) -> None:
        """Called by Celery in a cold shutdown, before it stops the pool: that hands back what is not done in time."""
        if not hasattr(self.pool, "finish_within"):
            super().cancel_active_requests()
        else:
            self.pool.finish_within(self.app.headrace_settings.soft_shutdown_s)

    def connection_for_read(self, *args: Any, **kwargs: Any) -> Any:
        """Called by Celery for the connection that messages come by."""
        connection = self.app.connection_for_read(*args, **kwargs)
        own = transport_that_takes(connection.get_transport_cls(), self._refuse, self._has_room)
        connection.get_transport_cls = lambda: own  # `transport_cls` itself is shown by remote control, as JSON
        return self.ensure_connected(connection)

    def _has_room(self, queue: str) -> bool:
        return not hasattr(self.pool, "has_room") or self.pool.has_room(keys.model_of(queue))

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Called by Celery for the function that every message is given to."""
        handle = super().create_task_handler(*args, **kwargs)

        def receive(message: Any) -> None:
            try:
                if reason := reason_to_refuse(message, signed_only=bool(self._signing_keys)):
                    self._refuse_read(message, reason)
                elif not self._signing_keys or self._turn_away_unsigned(message):
                    handle(message)
            except CONNECTION_ERRORS:
                raise
            except Exception as error:  # stock Celery would end the worker, and the next one, and the one after it
                self._refuse_read(message, f"it is no task that can be read ({type(error).__name__})")

        return receive

    def _turn_away_unsigned(self, message: Any) -> bool:
        """Take the jobs that are not signed out of a message, and keep what it was. Says whether others stay in it."""
        model = model_of(message.delivery_info) or self.app.headrace_settings.model_name
        strangers, stay = take_out_unsigned(message, self._signing_keys, model)
        reason = f"{len(strangers)} of its {len(strangers) + stay} jobs have no signature that holds"
        if strangers and hasattr(self.pool, "refuse"):
            self.pool.refuse(strangers, JobFailed("bad_signature", BAD_SIGNATURE))
        if not stay:
            self._refuse(message.delivery_tag, *_as_it_came(message), reason)
        elif strangers:
            self._bury(message.delivery_tag, *_as_it_came(message), reason)
        return bool(stay)

    # What Celery calls for messages that it cannot make a task of. Stock, it drops them.

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Its body cannot be read."""
        self._refuse_read(message, f"it cannot be read ({type(exc).__name__})")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002
        """It names a task that this worker does not have."""
        self._refuse_read(message, f"it is for the task {str(message.headers.get('task'))[:80]!r}, which is not here")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002
        """It is no message of Celery's protocol."""
        reason = str(exc) if isinstance(exc, InvalidTaskError) else type(exc).__name__
        self._refuse_read(message, f"it is no task that can be read ({reason[:200]})")

    def _refuse_read(self, message: Any, reason: str) -> None:
        """Refuse a message that kombu could read; jobs that it names fail, for somebody may wait for them."""
        for request in [request for request in state.requests.values() if request.message is message]:
            state.task_ready(request)
        if hasattr(self.pool, "refuse"):
            error = JobFailed("unreadable_message", f"the message was refused: {reason}")
            self.pool.refuse(_named_jobs(message), error)
        self._refuse(message.delivery_tag, *_as_it_came(message), reason)

    def _refuse(self, tag: str, queue: str, message: bytes, reason: str) -> None:
        self._bury(tag, queue, message, reason)
        self._settle(tag, lambda channel: channel.basic_ack(tag))

    def _bury(self, tag: str, queue: str, message: bytes, reason: str) -> None:
        """Keep a message, or what was taken out of it, in the list of those refused; it is not acknowledged by this."""
        log.error("message.refused", reason=reason, queue=queue, bytes=len(message))
        # First in line: if it cannot be kept now, it is not acknowledged before it is.
        self._settle(f"{tag} kept", lambda channel: dead_letter(plain_client(channel), queue, message, reason))

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
        self.hub.on_tick.add(self._catch_up)  # a set

    def _catch_up(self) -> None:
        channel = getattr(self.task_consumer, "channel", None)
        if channel is not None and not channel.closed:
            channel.catch_up()

    def on_connection_error_before_connected(self, exc: BaseException) -> None:
        """Called by Celery before it tries to connect again."""
        self._face_refusal(exc)
        super().on_connection_error_before_connected(exc)

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        """Called by Celery before it reconnects."""
        for channel in self._channels():
            qos = getattr(channel, "_qos", None)
            if qos is not None:
                qos.restore_at_shutdown = False
        self._face_refusal(exc)
        super().on_connection_error_after_connected(exc)

    def _face_refusal(self, error: BaseException) -> None:
        """Celery waits for a Redis that is away, and not for one that answers and refuses."""
        if is_forbidden(error) and hasattr(self.pool, "end_process"):
            self.pool.end_process(error)
        elif isinstance(error, redis.ResponseError):
            log.warning("redis.refused", error=str(error))
            time.sleep(REFUSED_PAUSE_S)

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
                if is_forbidden(error) and hasattr(self.pool, "end_process"):
                    self.pool.end_process(error)
                log.info("ack.waiting", error=type(error).__name__, messages=len(self._unsettled))
                self.timer.call_after(ACK_RETRY_S, self._settle_all)
                return
            self._unsettled.pop(tag, None)


def _as_it_came(message: Any) -> tuple[str, bytes]:
    """The queue of a message that kombu could read, and its text."""
    return (message.delivery_info or {}).get("routing_key", ""), json.dumps(message._raw).encode()


def _named_jobs(message: Any) -> list[str]:
    """The ids of the jobs in a message that may be of any shape."""
    headers = message.headers
    try:
        if headers.get("task") == GROUP_TASK_NAME and len(message.body) <= MAX_MESSAGE_BYTES:
            args, kwargs, _ = message.payload
            return list(read_group(argument(GROUP_TASK_NAME, args, kwargs)))
    except Exception:  # whatever it was, it has been refused for it
        return []
    return [headers["id"]] if is_job_id(headers.get("id")) else []

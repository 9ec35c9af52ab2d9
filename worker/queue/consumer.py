"""Celery 5.7's consumer, changed so that it survives the loss of Redis and messages that cannot be read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
import structlog
from celery.app.task import Context
from celery.exceptions import InvalidTaskError
from celery.platforms import EX_FAILURE
from celery.worker import state
from celery.worker.consumer import Consumer

from headrace.client.wire import keys
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.errors import JobFailed, RedisUnsuitable
from headrace.worker.queue.dead_letters import dead_letter, jobs_in_text, named_jobs, original
from headrace.worker.queue.held import HeldMessages
from headrace.worker.queue.message_options import compression_of, reason_to_refuse_options
from headrace.worker.queue.messages import BAD_SIGNATURE, model_of
from headrace.worker.queue.misplaced import LOOK_S, MisplacedMessages
from headrace.worker.queue.permissions import is_forbidden
from headrace.worker.queue.redaction import RedactedRequest, redact_error_logs
from headrace.worker.queue.server_check import check_server
from headrace.worker.queue.transport import CONNECTION_ERRORS, plain_client, transport_that_takes
from headrace.worker.queue.validation import forbid_compression, reason_to_refuse, take_out_unsigned

log = structlog.get_logger("headrace.worker")

#: Seconds before acknowledgements are sent again that Redis did not accept.
ACK_RETRY_S = 1.0
#: Seconds before connecting again to a Redis that answers with an error.
REFUSED_PAUSE_S = 1.0


class SafeConsumer(Consumer):
    """Validates messages, and keeps held messages when the connection to Redis is lost.

    On a lost connection stock Celery returns every held message to the queue, so each running job would run twice.
    If Redis itself has ended (kill -9, a restart), kombu reads the host name of a connection that it has discarded, and
    the AttributeError ends the worker (Consumer.on_connection_error_after_connected,
    kombu.transport.redis._connparams). This consumer tells the channels not to return messages; the engine continues
    and the heartbeat thread renews the leases. A message is acknowledged by its delivery tag over whatever connection
    exists at that time, not over the channel that delivered it.

    This class works with Celery's `solo` and `threads` pools; `EngineConsumer` adds what the engine's pool needs.
    """

    #: Whether the pool ends jobs when their time limit has passed.
    keeps_time_limits = False

    def __init__(self, on_task_request: Callable[[Any], Any], *args: Any, **kwargs: Any) -> None:
        def take(request: Any) -> Any:
            self._settle_by_tag(request)
            self._held.take(request.message.delivery_tag)
            try:
                return on_task_request(request)
            except CONNECTION_ERRORS:
                raise
            except Exception as error:  # Celery's timer, which may have called this, would lose the message
                return self.on_invalid_task(None, request.message, error)

        self._unsettled: dict[str, Callable[[Any], None]] = {}
        self._misplaced = MisplacedMessages(kwargs["app"].headrace_settings.models)
        self._look_timer: Any = None
        #: The messages whose leases this process renews.
        self._held: HeldMessages = getattr(kwargs.get("pool"), "held", None) or HeldMessages()
        forbid_compression()
        redact_error_logs()
        # With gossip every worker receives every heartbeat of every other worker, and does nothing with it.
        super().__init__(take, *args, **{**kwargs, "without_gossip": True})
        self._renews, self._clock = False, RedisClock()
        self._signing_keys = self.app.headrace_settings.signing_keys

    # --- what depends on the pool ----------------------------------------------------------------------------------

    def _has_room(self, queue: str) -> bool:  # noqa: ARG002
        """Whether a message may be taken from the queue. Celery's own pools limit messages by prefetching only."""
        return True

    def _fail_jobs(self, job_ids: Sequence[str], error: JobFailed) -> None:
        """Fail the jobs of a refused message. Celery's own pools cannot tell whether they are running elsewhere."""

    def _permission_denied(self, error: BaseException) -> None:
        """Redis denied a command because the user lacks a permission."""
        log.warning("redis.refused", error=str(error))
        time.sleep(REFUSED_PAUSE_S)

    def _park(self, message: Any) -> bool:  # noqa: ARG002
        """Whether the message has been put aside until its ETA. Celery's own pools keep it in Celery's timer."""
        return False

    def _redis_unsuitable(self, error: RedisUnsuitable) -> None:
        """The Redis that answers now loses jobs: Celery is told to end this process."""
        log.error("redis.unsuitable", error=str(error))
        state.should_stop = EX_FAILURE

    # --- messages come in ------------------------------------------------------------------------------------------

    def connection_for_read(self, *args: Any, **kwargs: Any) -> Any:
        """Called by Celery for the connection that delivers messages."""
        connection = self.app.connection_for_read(*args, **kwargs)
        transport = transport_that_takes(connection.get_transport_cls(), self._refuse_unread, self._has_room)
        connection.get_transport_cls = lambda: transport  # remote control shows `transport_cls` itself, as JSON
        connected = self.ensure_connected(connection)
        try:
            check_server(self.app.headrace_settings)  # at each connection: another server may be the primary now
        except RedisUnsuitable as error:
            self._redis_unsuitable(error)
            state.maybe_shutdown()
        return connected

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Called by Celery for the function that handles each message."""
        handle = super().create_task_handler(*args, **kwargs)

        def receive(message: Any) -> None:
            self._held.add(message.delivery_tag)
            try:
                reason = reason_to_refuse(message, signed_only=bool(self._signing_keys))
                if reason := reason or reason_to_refuse_options(message, limits=self.keeps_time_limits):
                    self._refuse_read(message, reason)
                elif (not self._signing_keys or self._remove_unsigned_jobs(message)) and not self._park(message):
                    handle(message)
            except CONNECTION_ERRORS:
                self._held.remove([message.delivery_tag])  # its lease runs out, and it is delivered again
                raise
            except Exception as error:  # it would end this worker, and each that gets the message afterwards
                self._refuse_read(message, f"it is not a task that can be read ({type(error).__name__})")

        return receive

    def _remove_unsigned_jobs(self, message: Any) -> bool:
        """Remove the jobs without a valid signature, and keep the original message. Returns whether jobs are left."""
        model = model_of(message.delivery_info) or self.app.headrace_settings.model_name
        unsigned, left = take_out_unsigned(message, self._signing_keys, model)
        reason = f"{len(unsigned)} of its {len(unsigned) + left} jobs have no valid signature"
        if unsigned:
            self._fail_jobs(unsigned, JobFailed("bad_signature", BAD_SIGNATURE))
        if not left:
            self._refuse(message.delivery_tag, *original(message), reason)
        elif unsigned:
            self._dead_letter(message.delivery_tag, *original(message), reason)
        return bool(left)

    # --- messages that are refused ---------------------------------------------------------------------------------
    # Celery calls the first three for messages that it cannot turn into a task. Stock Celery drops them.

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """The body cannot be decoded."""
        self._refuse_read(message, compression_of(message) or f"it cannot be read ({type(exc).__name__})")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002
        """The message names a task that this worker does not have."""
        task = str(message.headers.get("task"))[:80]
        self._refuse_read(message, f"it is for the task {task!r}, which this worker does not have")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002
        """The message does not follow Celery's protocol."""
        reason = str(exc) if isinstance(exc, InvalidTaskError) else type(exc).__name__
        self._refuse_read(message, f"it is not a task that can be read ({reason[:200]})")

    def _refuse_read(self, message: Any, reason: str) -> None:
        """Refuse a message that kombu could read. The jobs that it names fail, because callers may wait for them."""
        for request in [request for request in state.requests.values() if request.message is message]:
            state.task_ready(request)
        error = JobFailed("unreadable_message", f"the message was refused: {reason}")
        self._fail_jobs(named_jobs(message), error)
        self._fail_followers(message, error)
        self._refuse(message.delivery_tag, *original(message), reason)

    def _refuse_unread(self, tag: str, queue: str, message: bytes, reason: str) -> None:
        """Refuse a message that kombu could not read. The jobs that its text names fail."""
        self._fail_jobs(jobs_in_text(message), JobFailed("unreadable_message", f"the message was refused: {reason}"))
        self._refuse(tag, queue, message, reason)

    def _fail_followers(self, message: Any, error: JobFailed) -> None:
        """Fail the chord and the chain that a refused message is part of, and call its `link_error`, as Celery does."""
        try:
            followers = message.payload[2]
            if any(followers.values()):
                request = Context({**message.headers, **followers, "chain": None, "delivery_info": {}})
                # Its own result is stored by the pool, which knows whether the job is running.
                self.app.backend.mark_as_failure(request.id, error, request=request, store_result=False)
                self.app.backend._fail_chain(followers.get("chain"), error)
        except CONNECTION_ERRORS:
            log.warning("followers.failed", message_id=str(message.headers.get("id"))[:128], kind="RedisError")
        except Exception as failure:  # the message may have any content
            log.info("followers.failed", message_id=str(message.headers.get("id"))[:128], kind=type(failure).__name__)

    def _refuse(self, tag: str, queue: str, message: bytes, reason: str) -> None:
        self._dead_letter(tag, queue, message, reason)
        self._settle(tag, lambda channel: channel.basic_ack(tag))

    def _dead_letter(self, tag: str, queue: str, message: bytes, reason: str) -> None:
        """Keep a message, or its original, in the dead letter list. This does not acknowledge it."""
        log.error("message.refused", reason=reason, queue=queue, bytes=len(message))
        # Queued before the acknowledgement: a message that cannot be kept yet is not acknowledged yet.
        self._settle(f"{tag} kept", lambda channel: dead_letter(plain_client(channel), queue, message, reason))

    # --- the connection --------------------------------------------------------------------------------------------

    def update_strategies(self) -> None:
        """Called by Celery before it consumes, to learn how each task is received."""
        for task in self.app.tasks.values():
            task.Request = self._request_class(task.name)
        super().update_strategies()

    def _request_class(self, task_name: str) -> type[RedactedRequest]:  # noqa: ARG002
        """The class that represents the messages of a task."""
        return RedactedRequest

    def on_ready(self) -> None:
        """Called by Celery whenever it begins to consume: at the start and after each reconnect."""
        super().on_ready()
        self._settle_all()
        self._keep_leases()
        self._look_for_misplaced()

    def _look_for_misplaced(self) -> None:
        """Look for messages that no worker will take, now and from time to time."""
        if self._look_timer is not None:
            self.timer.cancel(self._look_timer)
        self._look_timer = self.timer.call_after(LOOK_S, self._look_for_misplaced)
        channel = getattr(self.task_consumer, "channel", None)
        if channel is not None and not channel.closed:
            self._misplaced.look(plain_client(channel))

    def on_connection_error_before_connected(self, exc: BaseException) -> None:
        """Called by Celery before it tries to connect again."""
        self._wait_if_refused(exc)
        super().on_connection_error_before_connected(exc)

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        """Called by Celery before it reconnects."""
        for channel in self._channels():
            qos = getattr(channel, "_qos", None)
            if qos is not None:
                qos.restore_at_shutdown = False
        self._wait_if_refused(exc)
        super().on_connection_error_after_connected(exc)

    def on_close(self) -> None:
        """Called by Celery when the connection is lost and when a shutdown begins.

        Celery forgets the messages that wait for an ETA or a rate limit. Return them, as soon as there is a connection:
        nobody would compute them otherwise, and their leases would be renewed for ever.
        """
        entries = [request._eta_timer_entry for request in state.scheduled_requests]
        super().on_close()
        for entry in filter(None, entries):
            entry.args = ()  # the timer keeps a cancelled entry, and with it the message, until its time comes
        forgotten = [tag for tag in self._held.untaken() if tag not in self._unsettled]
        for tag in forgotten:
            self._unsettled[tag] = _requeue(tag)
            self._held.take(tag)
        if forgotten:
            log.info("messages.given_back", messages=len(forgotten))
            self._settle_all()

    def reset_rate_limits(self) -> None:
        """Called by Celery when a rate limit has changed: messages that wait for the old limit wait for the new one."""
        waiting = [item for bucket in filter(None, self.task_buckets.values()) for item in bucket.contents]
        for bucket in filter(None, self.task_buckets.values()):
            bucket.clear_pending()
        super().reset_rate_limits()
        for request, tokens in waiting:
            if bucket := self.task_buckets[request.type]:
                self._limit_task(request, bucket, tokens)
            else:
                self._limit_move_to_pool(request)

    def _keep_leases(self) -> None:
        """Renew the leases of held messages until the process ends. Celery's own pools have no thread for it."""
        if not self._renews:
            self._renews = True
            self._renew_leases()

    def _renew_leases(self) -> None:
        lease_s = self.app.headrace_settings.lease_s
        try:
            if tags := self._held.tags():
                connection = plain_client(self.task_consumer.channel)
                self._clock.update(connection)
                connection.zadd(keys.unacked_index(), dict.fromkeys(tags, self._clock.now()), xx=True)
        except Exception as error:
            log.warning("redis.unanswered", error=str(error))
        self.timer.call_after(lease_s / 4, self._renew_leases)

    def _wait_if_refused(self, error: BaseException) -> None:
        """Pause if Redis answered with an error. Celery itself pauses only if Redis does not answer."""
        if is_forbidden(error):
            self._permission_denied(error)
        elif isinstance(error, redis.ResponseError):
            log.warning("redis.refused", error=str(error))
            time.sleep(REFUSED_PAUSE_S)

    def _channels(self) -> set[Any]:
        connection = self.connection
        transport = getattr(connection, "transport", None)
        channels = {getattr(connection, "_default_channel", None), *(getattr(transport, "channels", None) or ())}
        return channels - {None}

    # --- acknowledging ---------------------------------------------------------------------------------------------

    def _settle_by_tag(self, request: Any) -> None:
        """Let a message be acknowledged or returned over the connection that exists at that time."""
        tag = request.message.delivery_tag
        request._on_ack = lambda *_: self._settle(tag, lambda channel: channel.basic_ack(tag))
        request._on_reject = lambda _log, _errors, requeue=False: self._settle(
            tag, lambda channel: channel.basic_reject(tag, requeue=requeue)
        )

    def _settle(self, tag: str, action: Callable[[Any], None]) -> None:
        """Acknowledge or return a message; without a connection this waits for the next one."""
        self._unsettled[tag] = action
        self._held.take(tag)
        self._settle_all()

    def _settle_all(self) -> None:
        for tag, action in list(self._unsettled.items()):
            try:
                action(self.task_consumer.channel)
            except Exception as error:
                self._not_settled(error)
                log.info("ack.waiting", error=type(error).__name__, messages=len(self._unsettled))
                self.timer.call_after(ACK_RETRY_S, self._settle_all)
                return
            self._unsettled.pop(tag, None)
            self._held.remove([tag])

    def acknowledge_message(self, tag: str) -> None:
        """Acknowledge a message; without a connection this waits for the next one."""
        self._settle(tag, lambda channel: channel.basic_ack(tag))

    def return_message(self, tag: str) -> None:
        """Return a message to its queue; without a connection this waits for the next one."""
        self._settle(tag, _requeue(tag))

    def _not_settled(self, error: Exception) -> None:
        """An acknowledgement failed; it is sent again later."""


def _requeue(tag: str) -> Callable[[Any], None]:
    return lambda channel: channel.basic_reject(tag, requeue=True)

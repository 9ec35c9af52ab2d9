"""kombu's Redis transport, changed so that a worker takes each message in one atomic step.

kombu pops a message with BRPOP and then records it as unacknowledged with two more commands. If the worker is killed
in between, the message, which holds up to 16 jobs, is lost. Here the script take.lua does all of it at once.

A script cannot block, so a worker blocks on another list, the hint of the queue: clients push to it when they have
queued a message. The hint carries no message. If it is lost, or if an old client does not push it, a message waits
`WAIT_S` at most.

The entries in `unacked` have kombu's own format, so its leases, acknowledgements and returns work unchanged. kombu's
sweep for expired leases stops at an entry that is not valid JSON and never reaches those behind it, so such entries are
refused first.
"""

from __future__ import annotations

import importlib.resources
import json
import time
from collections.abc import Callable
from queue import Empty
from typing import Any

import redis
import structlog
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from headrace.client.wire import keys
from headrace.worker.queue.envelope import as_text, check_unacked_entry, read_envelope
from headrace.worker.queue.messages import ADDRESSED_TO
from headrace.worker.queue.permissions import is_forbidden

log = structlog.get_logger("headrace.worker")

#: Seconds that a worker with room for more waits for a hint before it checks its queues anyway.
WAIT_S = 0.5
#: Errors of the connection, not of a message. kombu's own list also contains KeyError.
CONNECTION_ERRORS = (redis.ConnectionError, redis.TimeoutError, OSError)

TAKE_SCRIPT = importlib.resources.files(__package__).joinpath("take.lua").read_text(encoding="utf-8")

#: Refuses a message that cannot be read: called with its delivery tag, its queue, its text and the reason.
Refuse = Callable[[str, str, bytes, str], None]
#: Whether a message may be taken now from the queue with this name.
HasRoom = Callable[[str], bool]


class QoS(kombu_redis.QoS):
    """Keeps leases for messages that `Channel` has already recorded as unacknowledged."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Called by kombu with each message. take.lua has already written the entry in Redis."""
        virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Called by kombu to requeue a message whose lease has expired, or that a worker returns."""
        with self.channel.conn_or_acquire(client) as connection:
            entry = connection.hget(self.unacked_key, tag)
            try:
                if entry is not None:
                    check_unacked_entry(entry)
            except ValueError as error:
                self.channel.refuse(as_text(tag), "", entry, str(error))
            else:
                super().restore_by_tag(tag, connection, leftmost)  # type: ignore[no-untyped-call]


class Channel:
    """A mixin for kombu's channel. All its queues are consumed with acknowledgements."""

    refuse: Refuse
    has_room: HasRoom
    #: Queues that had no room when the wait for a hint began.
    _full_queues: list[str] | tuple[()] = ()
    QoS = QoS
    #: If a worker is killed during its sweep, the sweeps of the others wait this many seconds; kombu's default is 300.
    unacked_mutex_expire = 10

    def _brpop_start(self: Any, timeout: float | None = None) -> None:  # noqa: ARG002
        """Called by kombu when there is room for another message: start to wait for a hint."""
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        ready = self._with_room(self.active_queues)
        self._full_queues = [queue for queue in self.active_queues if queue not in ready]
        hints = [self.global_keyprefix + keys.hint_of(queue) for queue in ready or self.active_queues]
        self.client.connection.send_command("BRPOP", *hints, WAIT_S)

    def _brpop_read(self: Any, **options: Any) -> bool:
        """Called by kombu when the wait is over, whether or not a hint came."""
        try:
            self.client.parse_response(self.client.connection, "BRPOP", **options)
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if self._closing or not self.qos.can_consume() or not self._take():
            raise Empty
        return True

    def _with_room(self: Any, queues: list[str]) -> list[str]:
        """The queues from which a message may be taken. A single queue has been checked before."""
        return queues if len(queues) < 2 else [queue for queue in queues if self.has_room(queue)]

    def catch_up(self: Any) -> None:
        """Take messages from queues that had no room when the wait for a hint began and have room now."""
        for queue in list(self._full_queues):
            if queue not in self.active_queues:  # remote control has cancelled it
                self._full_queues.remove(queue)
            while queue in self._full_queues and not self._closing and self.has_room(queue) and self.qos.can_consume():
                if not self._take(queue):
                    self._full_queues.remove(queue)  # the next wait includes it
                    break

    def _take(self: Any, only: str | None = None) -> bool:
        """Take the most urgent message and pass it to its consumer. Returns whether there was one."""
        queues = [only] if only else self._with_room(self._queue_cycle.consume(len(self.active_queues)))
        if not queues:  # the worker was told to stop
            return False
        try:
            tag, answer = self._run_take_script(queues)
        except redis.ResponseError as error:  # for example Redis is full; the message stays in its queue
            if is_forbidden(error):
                raise
            log.warning("redis.refused", error=str(error))
            return False
        if answer is None:
            return False
        number, message = answer
        queue = queues[number]
        self._queue_cycle.rotate(queue)  # queues of one priority are served in rotation
        self._deliver_message(tag, queue, message)
        return True

    def _run_take_script(self: Any, queues: list[str]) -> tuple[str, Any]:
        lists = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
        names = [self.unacked_key, self.unacked_index_key, *map(keys.hint_of, queues), *lists]
        tag = self._next_delivery_tag()
        script = plain_client(self).register_script(TAKE_SCRIPT)
        answer = script(
            keys=[self.global_keyprefix + name for name in names],
            args=[tag, time.time(), keys.HINT_TTL_S, *map(json.dumps, queues)],
        )
        return tag, answer

    def _deliver_message(self: Any, tag: str, queue: str, message: bytes) -> None:
        try:
            envelope = read_envelope(message)
            envelope["properties"]["delivery_tag"] = tag
            # The queue decides which model computes a job; what the envelope says is compared with it later.
            delivery = envelope["properties"]["delivery_info"]
            delivery[ADDRESSED_TO] = delivery.get("routing_key")
            delivery["routing_key"] = queue
            self.connection._deliver(envelope, queue)
        except CONNECTION_ERRORS:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else f"reading it raised {type(error).__name__}"
            self.refuse(tag, queue, message, reason)


def transport_that_takes(stock: type, refuse: Refuse, has_room: HasRoom) -> type:
    """Subclass kombu's transport for Redis or Sentinel so that its channels take messages in one step."""
    hooks = {"refuse": staticmethod(refuse), "has_room": staticmethod(has_room)}
    channel = type("Channel", (Channel, stock.Channel), hooks)  # type: ignore[attr-defined]
    return type("Transport", (stock,), {"Channel": channel})


def plain_client(channel: Any) -> redis.Redis:
    """A client on a channel's connections that uses keys as they are; kombu's adds a prefix to some commands' keys."""
    return redis.Redis(connection_pool=channel.pool)

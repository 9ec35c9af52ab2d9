"""How a worker takes messages out of Redis: each in one step, and only those that can be read.

kombu pops a message (BRPOP) and notes it as unacknowledged in two commands more. A worker killed in between takes the
message, of up to 16 jobs, with it. Here a script does all of it at once. A script cannot wait, so BRPOP does, for
something that holds no message: a list that clients push to when they have queued one. It is a hint and no more. A
client that does not know of it, or a hint that is lost, costs WAIT_S at most.

The entry in `unacked` is the one kombu writes, so its leases, acknowledgements and returns go on as they are. kombu's
own sweep trips over an entry that is no JSON, and would never come to those behind it: such entries are refused first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from queue import Empty
from typing import Any

import redis
import structlog
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.json import loads

from headrace.client.wire import keys
from headrace.worker.queue.permissions import is_forbidden

log = structlog.get_logger("headrace.worker")

#: How long a worker with room waits for the hint before it looks by itself.
WAIT_S = 0.5
#: Errors that say something about the connection, and nothing about the message in hand. kombu counts KeyError too.
CONNECTION_ERRORS = (redis.ConnectionError, redis.TimeoutError, OSError)

#: KEYS: unacked, unacked_index, the hint of each queue, then for each priority, the most urgent first, the list of each
#: queue. ARGV: the delivery tag, the time, then each queue as JSON. Gives the queue's number from 0 and the message, or
#: nothing. The hint of a queue is there afterwards if, and only if, there is more in it. A script that fails is not
#: undone, so the message leaves its list last.
TAKE = f"""
local queues, taken, more = #ARGV - 2, false, {{}}
for i = 3 + queues, #KEYS do
    local queue = (i - 3) % queues
    if not taken then
        local message = redis.call('LRANGE', KEYS[i], -1, -1)[1]
        if message then
            redis.call('HSET', KEYS[1], ARGV[1], '[' .. message .. ', "", ' .. ARGV[3 + queue] .. ']')
            redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
            redis.call('RPOP', KEYS[i])
            taken = {{queue, message}}
        end
    end
    more[queue] = more[queue] or redis.call('EXISTS', KEYS[i]) == 1
end
for queue = 0, queues - 1 do
    redis.call('DEL', KEYS[3 + queue])
    if more[queue] then
        redis.call('LPUSH', KEYS[3 + queue], '1')
        redis.call('EXPIRE', KEYS[3 + queue], {keys.HINT_TTL_S})
    end
end
return taken
"""

#: What to do with a message that cannot be understood: its delivery tag, queue and text, and why.
Refuse = Callable[[str, str, bytes, str], None]
#: Whether a message of a queue may be taken now.
HasRoom = Callable[[str], bool]


class QoS(kombu_redis.QoS):
    """Leases of messages that `Channel` has noted already."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Called by kombu with each message; what stands in Redis was written when it was taken."""
        virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Called by kombu to return a message whose lease has run out, or that a worker hands back."""
        with self.channel.conn_or_acquire(client) as connection:
            entry = connection.hget(self.unacked_key, tag)
            try:
                if entry is not None:
                    _read_entry(entry)
            except ValueError as error:
                self.channel.refuse(_text(tag), "", entry, str(error))
            else:
                super().restore_by_tag(tag, connection, leftmost)  # type: ignore[no-untyped-call]


class Channel:
    """Mixed into a channel of kombu's. All its queues are consumed with acknowledgements."""

    refuse: Refuse
    has_room: HasRoom
    _left_out: list[str] | tuple[()] = ()
    QoS = QoS
    #: A worker that is killed in its sweep holds up those of the others for so long; kombu would let it be 5 minutes.
    unacked_mutex_expire = 10

    def _brpop_start(self: Any, timeout: float | None = None) -> None:  # noqa: ARG002
        """Called by kombu when there is room for another message: begin to wait for the hint."""
        self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        ready = self._with_room(self.active_queues)
        self._left_out = [queue for queue in self.active_queues if queue not in ready]
        hints = [self.global_keyprefix + keys.hint_of(queue) for queue in ready or self.active_queues]
        self.client.connection.send_command("BRPOP", *hints, WAIT_S)

    def _brpop_read(self: Any, **options: Any) -> bool:
        """Called by kombu when the wait is over, with a hint or without."""
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
        """Those from which a message may be taken; where there is but one, that has been asked."""
        return queues if len(queues) < 2 else [queue for queue in queues if self.has_room(queue)]

    def catch_up(self: Any) -> None:
        """Take from queues for which there was no room when the wait for a hint began, and there is now."""
        for queue in list(self._left_out):
            while not self._closing and self.has_room(queue) and self.qos.can_consume():
                if not self._take(queue):
                    self._left_out.remove(queue)  # the next wait is for it too
                    break

    def _take(self: Any, only: str | None = None) -> bool:
        """Take the most urgent message and give it to its consumer. Says whether there was one."""
        queues = [only] if only else self._with_room(self._queue_cycle.consume(len(self.active_queues)))
        if not queues:  # the worker is told to stop
            return False
        lists = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
        names = [self.unacked_key, self.unacked_index_key, *map(keys.hint_of, queues), *lists]
        tag = self._next_delivery_tag()
        script = plain_client(self).register_script(TAKE)
        try:
            answer = script(
                keys=[self.global_keyprefix + name for name in names],
                args=[tag, time.time(), *map(json.dumps, queues)],
            )
        except redis.ResponseError as error:  # Redis is full, say; the message stays where it is
            if is_forbidden(error):
                raise
            log.warning("redis.refused", error=str(error))
            return False
        if answer is None:
            return False
        number, message = answer
        queue = queues[number]
        self._queue_cycle.rotate(queue)  # among those of one priority each has its turn
        self._hand_over(tag, queue, message)
        return True

    def _hand_over(self: Any, tag: str, queue: str, message: bytes) -> None:
        try:
            envelope = read_envelope(message)
            envelope["properties"]["delivery_tag"] = tag
            # Where it waited says which model it is for, whatever it says itself.
            envelope["properties"]["delivery_info"]["routing_key"] = queue
            self.connection._deliver(envelope, queue)
        except CONNECTION_ERRORS:
            raise
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__} while it was read"
            self.refuse(tag, queue, message, reason)


def transport_that_takes(stock: type, refuse: Refuse, has_room: HasRoom) -> type:
    """kombu's transport class for Redis or Sentinel, with channels that take messages in one step."""
    own = {"refuse": staticmethod(refuse), "has_room": staticmethod(has_room)}
    channel = type("Channel", (Channel, stock.Channel), own)  # type: ignore[attr-defined]
    return type("Transport", (stock,), {"Channel": channel})


def plain_client(channel: Any) -> redis.Redis:
    """A client on a channel's connections that takes keys as they are; kombu's puts its prefix before some of them."""
    return redis.Redis(connection_pool=channel.pool)


def read_envelope(message: bytes | str) -> dict[str, Any]:
    """A message as kombu writes it, around the task that Celery reads. Raises ValueError with what is wrong."""
    try:
        envelope = loads(_text(message))  # type: ignore[no-untyped-call]
    except Exception as error:  # JSON, but also whatever kombu makes of marked objects in it
        raise ValueError(f"it is no JSON that can be read ({type(error).__name__})") from error
    return _checked(envelope)


def _read_entry(entry: bytes | str) -> None:
    """Check an entry of `unacked`: the message, its exchange and its routing key."""
    try:
        envelope, _, _ = loads(_text(entry))  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ValueError(f"it is no JSON that can be read ({type(error).__name__})") from error
    _checked(envelope)


def _checked(envelope: Any) -> dict[str, Any]:
    properties = envelope.get("properties") if isinstance(envelope, dict) else None
    if not isinstance(properties, dict):
        raise ValueError("it is no message: its properties are missing")
    for name, value, kind in (
        ("body", envelope.get("body"), str),
        ("headers", envelope.get("headers"), dict),
        ("delivery_info", properties.get("delivery_info"), dict),
        ("priority", properties.get("priority", 0), int),
        ("body_encoding", properties.get("body_encoding") or "", str),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"its {name} is of the kind {type(value).__name__}")
    return envelope  # type: ignore[no-any-return]


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()


def dead_letter(connection: Any, queue: str, message: bytes, reason: str) -> None:
    """Keep a message that cannot be understood, for whoever wants to know what it was. Raises redis.RedisError."""
    text = message[: keys.DEAD_TEXT_BYTES].decode(errors="replace")
    entry = {"reason": reason, "at": time.time(), "queue": queue, "bytes": len(message), "message": text}
    pipe = connection.pipeline()
    pipe.lpush(keys.dead(), json.dumps(entry))
    pipe.ltrim(keys.dead(), 0, keys.DEAD_ENTRIES - 1)
    pipe.expire(keys.dead(), keys.DEAD_TTL_S)
    pipe.execute()

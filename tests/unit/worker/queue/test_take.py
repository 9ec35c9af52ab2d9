"""The script that takes a message, on fakeredis: order, the unacknowledged entry, and the hints."""

from __future__ import annotations

import json
from typing import Any

import fakeredis
import pytest

from headrace.worker.queue.transport import TAKE_SCRIPT

UNACKED, INDEX, TTL_S = "unacked", "unacked_index", 60


@pytest.fixture
def connection() -> fakeredis.FakeStrictRedis:
    return fakeredis.FakeStrictRedis(decode_responses=True)


def take(connection: fakeredis.FakeStrictRedis, *queues: str, tag: str = "tag") -> Any:
    """Take from two priorities of each queue, the lists `QUEUE` and `QUEUE:9`."""
    lists = [queue + step for step in ("", ":9") for queue in queues]
    keys = [UNACKED, INDEX, *[f"hint:{queue}" for queue in queues], *lists]
    return connection.register_script(TAKE_SCRIPT)(keys=keys, args=[tag, 7.5, TTL_S, *map(json.dumps, queues)])


def test_an_empty_queue_gives_nothing_and_loses_its_hint(connection: fakeredis.FakeStrictRedis) -> None:
    connection.lpush("hint:a", "1")
    assert take(connection, "a") is None
    assert connection.keys() == []


def test_a_message_leaves_its_list_and_is_recorded_as_unacknowledged(connection: fakeredis.FakeStrictRedis) -> None:
    connection.lpush("a", '{"body": 1}', '{"body": 2}')
    assert take(connection, "a") == [0, '{"body": 1}']
    assert connection.lrange("a", 0, -1) == ['{"body": 2}']
    assert json.loads(connection.hget(UNACKED, "tag") or "") == [{"body": 1}, "", "a"]
    assert connection.zrange(INDEX, 0, -1, withscores=True) == [("tag", 7.5)]


def test_the_most_urgent_message_of_all_queues_comes_first(connection: fakeredis.FakeStrictRedis) -> None:
    connection.lpush("a:9", "1")
    connection.lpush("b", "2")
    assert take(connection, "a", "b") == [1, "2"]
    assert take(connection, "a", "b", tag="next") == [0, "1"]
    assert take(connection, "a", "b") is None


def test_a_hint_is_left_for_each_queue_that_holds_more(connection: fakeredis.FakeStrictRedis) -> None:
    connection.lpush("a", "1")
    connection.lpush("b:9", "2", "3")
    connection.lpush("hint:a", "1", "1")
    assert take(connection, "a", "b") == [0, "1"]
    assert connection.exists("hint:a") == 0
    assert connection.lrange("hint:b", 0, -1) == ["1"]
    assert 0 < connection.ttl("hint:b") <= TTL_S
    take(connection, "a", "b")
    take(connection, "a", "b")
    assert connection.exists("hint:b") == 0

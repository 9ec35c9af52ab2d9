"""Messages for headrace in lists that no worker reads are found, counted and reported once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
import redis
from structlog.testing import capture_logs

from headrace.client.jobs.status import read_status
from headrace.client.wire import keys
from headrace.client.wire.misplaced import SAMPLE, find_misplaced
from headrace.worker.queue.misplaced import MisplacedMessages

OURS = json.dumps({"headers": {"task": "headrace.generate", "id": "x"}, "body": "e30="})
GROUP = json.dumps({"headers": {"task": "headrace.generate_many", "id": "x"}, "body": "e30="})
THEIRS = json.dumps({"headers": {"task": "shop.mail", "id": "x"}, "body": "aGVhZHJhY2UuZ2VuZXJhdGU="})


@pytest.fixture
def connection() -> Iterator[redis.Redis]:
    made: Any = fakeredis.FakeStrictRedis(decode_responses=True, encoding_errors="surrogateescape")
    yield made
    made.close()


def found(connection: redis.Redis) -> dict[str, int]:
    return {place.key: place.messages for place in find_misplaced(connection, ["demo", "other"])}


def test_messages_in_the_right_lists_and_those_of_others_are_not_misplaced(connection: redis.Redis) -> None:
    for name in (*keys.queue_lists("demo"), *keys.queue_lists("third"), "headrace.third"):
        connection.lpush(name, OURS)
    connection.lpush("celery", THEIRS, THEIRS)
    connection.lpush("demo", THEIRS)
    connection.lpush("celery\x06\x163", b"\xff not a message")
    assert found(connection) == {}


def test_each_likely_list_is_counted_over_all_priorities(connection: redis.Redis) -> None:
    for name in keys.queue_lists("demo"):
        connection.lpush(name.removeprefix(keys.PREFIX), OURS, OURS)
    connection.lpush("headrace.other\x06\x169", "anything")
    connection.lpush("celery", OURS, THEIRS, GROUP)
    connection.lpush("headrace:celery\x06\x163", *[GROUP] * (SAMPLE + 4))
    counts = {"headrace.demo": 8, "headrace.other": 1, "celery": 2, "headrace:celery": SAMPLE}
    connection.lpush("headraceheadrace.demo", OURS)
    connection.lpush("demo", OURS, THEIRS)
    connection.lpush("headrace:demo\x06\x163", OURS, OURS)
    counts |= {"headraceheadrace.demo": 1, "demo": 1, "headrace:demo": 2}
    assert found(connection) == counts
    connection.hset(keys.unacked(), "tag", "a message")  # fakeredis does not answer HRANDFIELD as Redis does
    assert {place.key for place in read_status(connection, "demo").misplaced} == counts.keys() - {"headrace.other"}


def test_a_list_of_another_type_or_without_permission_is_passed_over(connection: redis.Redis) -> None:
    connection.hset("celery", "a", "b")
    connection.set("headrace.demo", OURS)
    connection.lpush("headrace.other", OURS)
    assert found(connection) == {"headrace.other": 1}


def test_a_list_is_reported_once_until_it_is_empty_again(connection: redis.Redis) -> None:
    messages = MisplacedMessages(["demo"])
    with capture_logs() as lines:
        for _ in range(2):
            connection.lpush("headrace.demo", OURS)
            messages.look(connection)
        connection.delete("headrace.demo")
        messages.look(connection)
        connection.lpush("headrace.demo", OURS, OURS, OURS)
        messages.look(connection)
    assert [(line["event"], line["log_level"], line["key"], line["messages"]) for line in lines] == [
        ("messages.misplaced", "warning", "headrace.demo", 1),
        ("messages.misplaced", "warning", "headrace.demo", 3),
    ]
    assert "global_keyprefix" in lines[0]["hint"]


@pytest.mark.parametrize("error", [redis.ConnectionError("no route"), redis.exceptions.NoPermissionError("no right")])
def test_a_redis_that_is_away_is_asked_again_and_one_that_denies_it_is_not(error: Exception) -> None:
    class Refusing:
        asked = 0

        def exists(self, _: str) -> int:
            self.asked += 1
            raise error

    connection, messages = Refusing(), MisplacedMessages(["demo"])
    with capture_logs() as lines:
        for _ in range(2):
            messages.look(connection)  # type: ignore[arg-type]
    assert not lines
    assert connection.asked == (2 if isinstance(error, redis.ConnectionError) else 1)

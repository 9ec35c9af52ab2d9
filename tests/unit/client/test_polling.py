"""The requests of a waiting client, and how it handles the answers, without Redis."""

from __future__ import annotations

import math
from typing import Any

import pytest
import redis

from headrace.client.jobs import polling
from headrace.client.jobs.polling import MGET_KEYS, NEW_JOBS, Command, PollState
from headrace.client.wire import keys
from headrace.client.wire.errors import JobCancelled

REVOKED = '{"status": "REVOKED", "result": null}'


class FakeServer:
    """Answers the commands of a PollState with data of the test."""

    def __init__(self) -> None:
        self.results: dict[str, str] = {}
        self.events: dict[str, list[str]] = {}
        self.unknown: set[str] = set()

    def answer(self, commands: list[Command]) -> list[Any]:
        return [getattr(self, f"_{str(command[0]).lower()}")(*command[1:]) for command in commands]

    def _mget(self, *names: str) -> list[str | None]:
        return [self.results.get(name.removeprefix(keys.result(""))) for name in names]

    def _strlen(self, name: str) -> int:
        return len(self.results.get(name.removeprefix(keys.result("")), ""))

    def _exists(self, *names: str) -> int:
        jobs = [name.removeprefix(keys.job("")) for name in names if name.startswith(keys.job(""))]
        return sum(job not in self.unknown for job in jobs)

    def _xread(self, *words: str) -> list[Any]:
        count, words = int(words[words.index("COUNT") + 1]), words[words.index("STREAMS") + 1 :]
        reply = []
        for name, since in zip(words[: len(words) // 2], words[len(words) // 2 :], strict=True):
            entries = self.events.get(name.removeprefix(keys.events("")), [])
            if new := [(f"{i + 1}-0", {"event": e}) for i, e in enumerate(entries) if i + 1 > int(since[:-2])]:
                reply.append([name, new[:count]])
        return reply


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


def asked(commands: list[Command], name: str) -> list[str | int]:
    return [word for command in commands if command[0] == name for word in command[1:]]


def test_a_job_is_waited_for_until_its_outcome_is_there(server: FakeServer) -> None:
    under_test = PollState()
    under_test.add("a")
    commands = under_test.request(1)
    assert commands == [("MGET", keys.result("a")), ("EXISTS", keys.job("a"), keys.result("a"))]
    assert not under_test.answer(server.answer(commands))
    server.results["a"] = REVOKED
    commands = under_test.request(1)
    assert commands == [("MGET", keys.result("a"))]
    updates = under_test.answer(server.answer(commands))
    assert isinstance(updates.outcomes["a"], JobCancelled)
    assert len(under_test) == 0


def test_a_job_that_does_not_exist_is_reported_once(server: FakeServer) -> None:
    under_test = PollState()
    server.unknown = {"b"}
    under_test.add("a")
    under_test.add("b")
    assert under_test.answer(server.answer(under_test.request(1))).unknown == ["b"]
    assert list(under_test) == ["a"]


def test_events_are_returned_once_and_the_last_one_with_the_result(server: FakeServer) -> None:
    under_test = PollState()
    under_test.add("a", events=True)
    server.events["a"] = ["one", "two"]
    assert under_test.answer(server.answer(under_test.request(1))).events == {"a": ["one", "two"]}
    commands = under_test.request(1)
    assert ("XREAD", "COUNT", 64, "BLOCK", 10, "STREAMS", keys.events("a"), "2-0") in commands
    server.events["a"].append('{"end":true}')
    server.results["a"] = REVOKED
    del server.results["a"]
    under_test.answer(server.answer(commands))
    assert under_test.rest_s == 0
    assert asked(under_test.request(1), "XREAD")[2] == "STREAMS", "Redis is not to hold back what is there"


@pytest.mark.parametrize("streams", [1, 24, 256])
def test_streams_that_wait_are_read_in_parts_and_without_a_pause(server: FakeServer, streams: int) -> None:
    """The entries of the largest job have 200 KB: all of 256 such streams at once would take gigabytes."""
    under_test = PollState()
    names = [f"job-{number}" for number in range(streams)]
    for name in names:
        under_test.add(name, events=True)
        server.events[name] = [str(number) for number in range(100)]
    read: dict[str, list[str]] = {name: [] for name in names}
    while any(len(entries) < 100 for entries in read.values()):
        updates = under_test.answer(server.answer(under_test.request(1)))
        assert 0 < sum(map(len, updates.events.values())) <= max(256, 4 * streams)
        for name, entries in updates.events.items():
            read[name] += entries
        assert under_test.rest_s == 0 or all(len(entries) == 100 for entries in read.values())
    assert all(entries == [str(number) for number in range(100)] for entries in read.values())
    assert not under_test.answer(server.answer(under_test.request(1)))


def test_a_later_reader_gets_all_events(server: FakeServer) -> None:
    under_test = PollState()
    under_test.add("a", events=True)
    server.events["a"] = ["one"]
    under_test.answer(server.answer(under_test.request(1)))
    server.events["a"].append("two")
    commands = under_test.request(1)
    under_test.add("a", events=True)  # while the answer is on its way
    assert under_test.answer(server.answer(commands)).events == {}
    assert under_test.answer(server.answer(under_test.request(1))).events == {"a": ["one", "two"]}


def test_of_many_jobs_the_oldest_are_polled_first_and_the_others_in_rotation(server: FakeServer) -> None:
    under_test = PollState()
    names = [f"{i:05}" for i in range(10 * MGET_KEYS)]
    for name in names:
        under_test.add(name)
    while under_test.rest_s == 0:
        under_test.answer(server.answer(under_test.request(1)))
    seen: set[str | int] = set()
    for _ in range(9):
        commands = under_test.request(1)
        assert len(asked(commands, "STRLEN")) <= 2 * MGET_KEYS
        assert keys.result("00000") in asked(commands, "STRLEN")
        seen |= set(asked(commands, "STRLEN"))
        under_test.answer(server.answer(commands))
    assert len(seen) == len(names)
    server.results = dict.fromkeys(names[: 3 * MGET_KEYS], REVOKED)
    turns = 0
    while len(under_test) > 7 * MGET_KEYS:
        under_test.answer(server.answer(under_test.request(1)))
        turns += 1
    assert turns <= 8


def test_many_new_jobs_are_asked_about_in_several_requests(server: FakeServer) -> None:
    under_test, seen = PollState(), list[str]()
    for number in range(16_384):
        under_test.add(f"{number}")
    while len(seen) < 16_384:
        assert under_test.rest_s == 0
        commands = under_test.request(1)
        assert len(commands) <= 2 * (NEW_JOBS + 2 * MGET_KEYS)
        seen += under_test.answer(server.answer(commands)).known
    assert sorted(seen) == sorted(map(str, range(16_384)))
    assert under_test.rest_s > 0


def test_polling_slows_down_without_updates_and_is_fast_again_after_one(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling, "POLL_SHARE", math.inf)  # else the pauses grow with the time that a slow machine takes
    under_test = PollState()
    under_test.add("a")
    under_test.add("b")
    rests = []
    for _ in range(20):
        under_test.answer(server.answer(under_test.request(1)))
        rests.append(under_test.rest_s)
    assert rests == sorted(rests)
    assert rests[-1] == polling.LAST_POLL_S
    server.results["a"] = REVOKED
    for _ in range(2):  # the size of the result, and then the result
        under_test.answer(server.answer(under_test.request(1)))
    assert under_test.rest_s < 0.2
    assert list(under_test) == ["b"]


def test_an_outage_is_waited_for_only_after_a_first_answer(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    under_test = PollState()
    under_test.add("old")
    under_test.answer(server.answer(under_test.request(1)))
    under_test.add("new")
    under_test.request(1)
    assert under_test.failed() == ["new"]
    under_test.request(1)
    assert under_test.failed() == []
    monkeypatch.setattr(polling, "PATIENCE_S", -1.0)
    assert under_test.failed() == ["old"]
    assert len(under_test) == 0


def test_results_are_read_by_their_size_and_not_by_their_number(server: FakeServer) -> None:
    under_test, seen = PollState(), []
    names = [f"{i:02}" for i in range(24)]
    for name in names:
        under_test.add(name)
    padding = " " * (polling.READ_BYTES // 3 - len(REVOKED))
    server.results = dict.fromkeys(names[:20], REVOKED + padding) | {"20": REVOKED + padding * 4, "21": REVOKED}
    while len(under_test) > 2:
        commands = under_test.request(1)
        replies = server.answer(commands)
        read = [len(record or "") for reply in replies if isinstance(reply, list) for record in reply]
        assert sum(read) <= polling.READ_BYTES or len(read) == 1
        seen += under_test.answer(replies).outcomes
        assert under_test.rest_s == 0 or len(under_test) == 2, "what is ready is read without a pause"
    assert sorted(seen) == names[:22]
    assert list(under_test) == names[22:]


def test_sizes_that_redis_does_not_tell(server: FakeServer) -> None:
    """A user without the right, as an older file of users has it; and a key of another type."""
    under_test = PollState()
    for name in "abc":
        under_test.add(name)
    replies = [redis.ResponseError("WRONGTYPE Operation"), 0, 0, 1, 1, 1]
    assert not under_test.answer(replies if under_test.request(1) else [])
    replies = [0, redis.exceptions.NoPermissionError("strlen"), redis.exceptions.NoPermissionError("strlen")]
    assert not under_test.answer(replies if under_test.request(1) else [])
    server.results["b"] = REVOKED
    commands = under_test.request(1)
    assert commands == [("MGET", *map(keys.result, commands and ["b", "c", "a"]))]
    assert list(under_test.answer(server.answer(commands)).outcomes) == ["b"]
    under_test.request(1)
    with pytest.raises(redis.ResponseError, match="OOM"):
        under_test.answer([redis.ResponseError("OOM")])


def test_results_that_were_to_be_read_when_redis_failed_are_read_later(server: FakeServer) -> None:
    under_test = PollState()
    for name in "ab":
        under_test.add(name)
    server.results = dict.fromkeys("ab", REVOKED)
    under_test.answer(server.answer(under_test.request(1)))
    under_test.request(1)
    assert under_test.failed() == []
    while under_test:
        under_test.answer(server.answer(under_test.request(1)))

"""Streaming with Client and AsyncClient: text arrives complete, once and in order, despite failures."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from headrace.client import AsyncClient, Client, Event, JobCancelled, JobExpired, JobFailed, ResultTimeout, UnknownJob
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.client.wire.results import Choice
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, paced, wait_until, worker_on
from tests.patience import PATIENCE_S

#: Makes jobs long enough to be observed while they run, on fast machines too.
SLOWLY = {"patch": paced(0.015), "HEADRACE_DRAFT_TOKENS": "0"}
LONG = {"max_tokens": 120, "temperature": 0, "ignore_eos": True, "stream": True}

Stream = Callable[..., list[Event]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streaming")


@pytest.fixture(scope="module")
def worker(server: EmbeddedRedis, directory: Path) -> Iterator[WorkerProcess]:
    with worker_on(server, directory / "worker.log", **SLOWLY) as process:
        process.wait_ready()
        yield process


@pytest.fixture
def client(server: EmbeddedRedis, worker: WorkerProcess) -> Iterator[Client]:
    with Client(redis_url=server.url) as made:
        yield made


@pytest.fixture(params=["plain", "asyncio"])
def stream(request: pytest.FixtureRequest, server: EmbeddedRedis) -> Stream:
    """Reads a job's stream to the end by its id, in a new client; `seen` gets the events."""
    plain, with_asyncio = both_faces(server)
    return plain if request.param == "plain" else with_asyncio


def both_faces(server: EmbeddedRedis) -> tuple[Stream, Stream]:
    """The two variants of `stream`: Client and AsyncClient."""

    def plain(job_id: str, seen: list[Event] | None = None, timeout: float = PATIENCE_S) -> list[Event]:
        seen = [] if seen is None else seen
        with Client(redis_url=server.url) as own:
            for event in own.job(job_id).stream(timeout):
                seen.append(event)
        return seen

    async def awaited(job_id: str, seen: list[Event], timeout: float) -> list[Event]:
        async with AsyncClient(redis_url=server.url) as own:
            async for event in own.job(job_id).stream(timeout):
                seen.append(event)
        return seen

    def with_asyncio(job_id: str, seen: list[Event] | None = None, timeout: float = PATIENCE_S) -> list[Event]:
        return asyncio.run(awaited(job_id, [] if seen is None else seen, timeout))

    return plain, with_asyncio


def assembled(events: list[Event]) -> dict[int, tuple[str, list[int], Any, str | None]]:
    """The pieces of each sample, joined, in the form of `of_result`."""
    made: dict[int, tuple[str, list[int], Any, str | None]] = {}
    for event in events:
        if event.result is not None:
            continue
        text, tokens, logprobs, reason = made.get(event.index, ("", [], [], None))
        assert reason is None, "nothing comes after the last piece"
        made[event.index] = (
            text + event.text,
            tokens + event.token_ids,
            None if event.logprobs is None else logprobs + event.logprobs,
            event.finish_reason,
        )
    return made


def of_result(choices: list[Choice]) -> dict[int, tuple[str, list[int], Any, str | None]]:
    return {c.index: (c.text, c.token_ids, c.logprobs, c.finish_reason) for c in choices}


def check(events: list[Event]) -> None:
    """The last event is the result, and the pieces are its samples."""
    assert [event.result is not None for event in events[:-1]] == [False] * (len(events) - 1)
    assert events[-1].result is not None
    assert assembled(events) == of_result(events[-1].result.choices)
    ends = {event.index: (event.stop_reason, event.complete) for event in events if event.finish_reason}
    assert ends == {choice.index: (choice.stop_reason, choice.complete) for choice in events[-1].result.choices}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"max_tokens": 120, "ignore_eos": True}, id="plain"),
        pytest.param({"n": 3, "max_tokens": 60}, id="samples"),
        pytest.param({"logprobs": 2, "max_tokens": 60}, id="log probabilities"),
        pytest.param({"echo": True, "logprobs": 1, "n": 2, "max_tokens": 40}, id="echo"),
        pytest.param({"echo": True, "logprobs": 0, "max_tokens": 0}, id="scored only"),
        pytest.param({"structured_outputs": {"regex": "( [a-z]{2,9}){4}"}, "n": 2}, id="structured output"),
        pytest.param({"stop": ["e", " the"], "temperature": 0.5, "max_tokens": 60}, id="stop strings"),
        pytest.param({"logit_bias": {8582: 90, 236: 90, 121: 90}, "max_tokens": 40}, id="characters of many tokens"),
    ],
)
def test_the_pieces_are_the_result_and_streaming_changes_nothing(
    client: Client, stream: Stream, fields: dict[str, Any]
) -> None:
    job = client.submit("Hello.", stream=True, seed=3, **fields)
    events = stream(job.id)
    check(events)
    plain = client.submit("Hello.", seed=3, **fields).result(PATIENCE_S)
    assert of_result(plain.choices) == assembled(events)


def test_text_is_streamed_while_it_is_computed(client: Client, stream: Stream) -> None:
    job = client.submit("Hello.", **LONG)
    seen: list[Event] = []
    reading = threading.Thread(target=stream, args=(job.id, seen))
    reading.start()
    wait_until(lambda: len(seen) >= 3)
    assert job.status() != "succeeded"
    reading.join()
    check(seen)


def test_a_late_reader_gets_the_whole_text(client: Client, server: EmbeddedRedis, stream: Stream) -> None:
    job = client.submit("Hello.", **LONG)
    wait_until(lambda: connect(server.url).xlen(keys.events(job.id)) >= 3)
    check(stream(job.id))
    check(stream(job.id))
    connect(server.url).delete(keys.events(job.id))
    check(stream(job.id))


def test_a_job_that_does_not_stream_gives_one_result(client: Client, server: EmbeddedRedis, stream: Stream) -> None:
    job = client.submit("Hello.", max_tokens=5, n=2)
    events = stream(job.id)
    check(events)
    assert len(events) == 3
    assert not connect(server.url).exists(keys.events(job.id))


def test_cut_connections_leave_no_gap_and_no_repeat(client: Client, server: EmbeddedRedis, stream: Stream) -> None:
    job = client.submit("Hello.", **LONG)
    seen: list[Event] = []
    reading = threading.Thread(target=stream, args=(job.id, seen))
    reading.start()
    connection, cut = connect(server.url), 0
    while reading.is_alive():
        for entry in connection.client_list():
            if entry["cmd"] in ("xread", "mget", "exists"):
                cut += bool(connection.client_kill_filter(_id=entry["id"]))
        time.sleep(0.1)
    reading.join()
    check(seen)
    assert cut >= 2


@pytest.mark.parametrize("end", ["failed", "cancelled", "expired"])
def test_a_stream_that_ends_early_raises_the_error_of_result(client: Client, stream: Stream, end: str) -> None:
    fields = (
        {"timeout_s": 3, "max_tokens": 900} if end == "expired" else {"max_tokens": 2000} if end == "failed" else {}
    )
    job = client.submit("Hello.", **{**LONG, **fields})
    seen: list[Event] = []
    if end == "cancelled":
        threading.Thread(target=lambda: (wait_until(lambda: seen), job.cancel())).start()
    kind = {"failed": JobFailed, "cancelled": JobCancelled, "expired": JobExpired}[end]
    with pytest.raises(kind) as caught:
        stream(job.id, seen)
    assert caught.value.job.id == job.id
    assert bool(seen) == (end != "failed")
    if seen:
        assert caught.value.partial[0].startswith("".join(event.text for event in seen))


def test_an_unknown_job_and_a_timeout_are_errors(client: Client, stream: Stream) -> None:
    with pytest.raises(UnknownJob) as unknown:
        stream("nobody")
    assert unknown.value.job.id == "nobody"
    job = client.submit("Hello.", **LONG)
    with pytest.raises(ResultTimeout) as late:
        stream(job.id, timeout=0.1)
    assert late.value.job == job


def test_a_full_redis_delays_pieces_and_does_not_break_the_stream(
    client: Client, server: EmbeddedRedis, stream: Stream
) -> None:
    job = client.submit("Hello.", **LONG)
    connection = connect(server.url)
    wait_until(lambda: connection.xlen(keys.events(job.id)) >= 2)
    connection.config_set("maxmemory", "1")
    time.sleep(0.5)
    connection.config_set("maxmemory", "0")
    check(stream(job.id))


def test_a_redis_that_is_killed_and_comes_back(client: Client, server: EmbeddedRedis, stream: Stream) -> None:
    job = client.submit("Hello.", **{**LONG, "max_tokens": 300})
    seen: list[Event] = []
    reading = threading.Thread(target=stream, args=(job.id, seen), kwargs={"timeout": PATIENCE_S})
    reading.start()
    wait_until(lambda: len(seen) >= 2)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.alive)
    server.start()
    reading.join()
    check(seen)


def test_a_worker_that_is_killed_in_the_middle(server: EmbeddedRedis, directory: Path) -> None:
    """Another worker starts again and splits the text elsewhere; neither current nor later readers notice."""
    own = {"HEADRACE_SERVED_NAME": "killed", **SLOWLY}
    with (
        Client(redis_url=server.url, model="killed") as client,
        worker_on(server, directory / "first.log", **own) as first,
        worker_on(server, directory / "second.log", **own) as second,
    ):
        first.wait_ready()
        second.wait_ready()
        job = client.submit("Hello.", **{**LONG, "max_tokens": 100})
        seen: dict[Stream, list[Event]] = {face: [] for face in both_faces(server)}
        reading = [threading.Thread(target=face, args=(job.id, events)) for face, events in seen.items()]
        for thread in reading:
            thread.start()
        wait_until(lambda: client._redis.hget(keys.job(job.id), "worker") and min(map(len, seen.values())) >= 3)
        holder = str(client._redis.hget(keys.job(job.id), "worker"))
        (first if holder.endswith(f"-{first.process.pid}") else second).kill()  # type: ignore[union-attr]
        for thread in reading:
            thread.join()
        assert client._redis.hget(keys.job(job.id), "attempts") == "2"
        for face, events in seen.items():
            check(events)
            check(face(job.id))


def test_events_have_a_lifetime(client: Client, server: EmbeddedRedis) -> None:
    job = client.submit("Hello.", max_tokens=3, stream=True)
    job.result(PATIENCE_S)
    connection: redis.Redis = connect(server.url)
    wait_until(lambda: connection.exists(keys.events(job.id)))
    assert 0 < connection.ttl(keys.events(job.id)) <= 3600  # type: ignore[operator]

"""The writer of streaming jobs' text."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
import redis

from headrace.client.jobs.stream import StreamReader
from headrace.client.wire.results import StreamEvent
from headrace.worker.engine.sequence_text import TextDelta
from headrace.worker.jobs import retry
from headrace.worker.jobs import stream_writer as events
from headrace.worker.jobs.stream_writer import StreamWriter
from tests.integration.processes import wait_until
from tests.unit.worker.jobs.memory_store import MemoryStore


def delta(at: int, text: str, index: int = 0, reason: str | None = None) -> TextDelta:
    return TextDelta(index, text, list(range(at, at + len(text))), reason, at, at)  # type: ignore[arg-type]


def written(store: MemoryStore, job_id: str) -> list[StreamEvent]:
    return [StreamEvent.model_validate_json(text) for text in store.events.get(job_id, [])]


def text_of(store: MemoryStore, job_id: str) -> str:
    reader = StreamReader(job_id)
    return "".join(event.text for entry in store.events[job_id] for event in reader.take(entry))


class Refusing(MemoryStore):
    """Refuses the events of the jobs in `refused`, or all requests while `away` is set."""

    refused: frozenset[str] = frozenset()
    away = False

    def append_events(self, events: Mapping[str, str]) -> list[str]:
        if self.away:
            raise redis.ConnectionError("away")
        super().append_events({job_id: text for job_id, text in events.items() if job_id not in self.refused})
        return [job_id for job_id in events if job_id in self.refused]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_S", 0.01)


def test_text_between_two_requests_is_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    writer = StreamWriter(store)
    blocked = threading.Event()
    monkeypatch.setattr(
        store, "append_events", lambda told: (blocked.wait(5), MemoryStore.append_events(store, told))[1]
    )
    first, second = writer.begin("a"), writer.begin("b")
    first(delta(0, "He"))
    for at, char in enumerate("llo.", start=2):
        first(delta(at, char, reason="length" if char == "." else None))
        second(delta(at - 2, char, 1))
    writer.end(["a", "not streaming"])
    blocked.set()
    writer.stop()
    assert text_of(store, "a") == "Hello."
    assert len(store.events["a"]) <= 2
    assert [event.end for event in written(store, "a")][-1]
    assert next((p.index, p.at) for e in written(store, "b") for p in e.pieces) == (1, 0)
    assert "not streaming" not in store.events


def test_refused_events_are_written_later_and_delay_no_other_job() -> None:
    store = Refusing()
    store.refused = frozenset("a")
    writer = StreamWriter(store)
    tell_a, tell_b = writer.begin("a"), writer.begin("b")
    tell_a(delta(0, "one "))
    tell_b(delta(0, "two "))
    wait_until(lambda: "b" in store.events)
    tell_a(delta(4, "three"))
    store.refused = frozenset()
    wait_until(lambda: "a" in store.events)
    writer.stop()
    assert text_of(store, "a") == "one three"
    assert len(store.events["b"]) == 1


def test_events_of_ended_jobs_are_dropped_during_an_outage() -> None:
    store = Refusing()
    store.away = True
    writer = StreamWriter(store)
    writer.begin("a")(delta(0, "x"))
    writer.begin("b")(delta(0, "y"))
    wait_until(lambda: set(writer._pending) == {"a", "b"})
    writer.end(["a"])
    wait_until(lambda: set(writer._pending) == {"b"})
    store.away = False
    writer.stop()
    assert text_of(store, "b") == "y"
    assert "a" not in store.events


def test_an_event_that_is_too_large_is_written_without_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENT_CHARS", 100)
    store = MemoryStore()
    writer = StreamWriter(store)
    writer.begin("a")(delta(0, "x" * 200))
    writer.end(["a"])
    writer.stop()
    assert text_of(store, "a") == ""
    assert written(store, "a")[-1].end


def test_without_a_job_that_streams_there_is_no_thread() -> None:
    before = threading.active_count()
    writer = StreamWriter(MemoryStore())
    writer.end(["a"])
    writer.stop()
    assert threading.active_count() == before

"""The book of deliveries: the message of each job, and when a message is done."""

from __future__ import annotations

import threading
from typing import Any

from headrace.client.wire.celery import GROUP_TASK_NAME
from headrace.worker.jobs.deliveries import Delivery, DeliveryBook


def message(*job_ids: str, model: str = "demo") -> Delivery:
    def target(*_: Any) -> None:
        raise AssertionError("the book runs nothing")

    return Delivery(
        task=GROUP_TASK_NAME,
        target=target,
        args=(GROUP_TASK_NAME, f"message of {job_ids}", {}),
        kwargs={},
        on_done=lambda _: None,
        on_accepted=None,
        time_limit_s=None,
        received_at=0.0,
        model=model,
        jobs=dict.fromkeys(job_ids),
    )


def taken_in(book: DeliveryBook, *job_ids: str, model: str = "demo") -> Delivery:
    delivery = message(*job_ids, model=model)
    book.add(delivery)
    book.adopt(delivery)
    return delivery


def test_jobs_are_held_from_the_delivery_on_and_open_once_adopted() -> None:
    book = DeliveryBook()
    first, second = message("a", "b"), message("c", model="other")
    book.add(first)
    book.add(second)
    assert (book.held_jobs("demo"), book.held_jobs("other")) == (2, 1)
    assert (book.held_messages("demo"), book.held_messages("nobody's")) == (1, 0)
    assert book.deliveries() == [first, second]
    assert book.open_jobs() == []
    assert book.adopt(first) == (["a", "b"], [])
    assert book.open_jobs() == ["a", "b"]
    assert book.of_job("a") is first
    assert book.of_job("c") is None
    assert book.without_open(["a", "c"]) == ["c"]
    assert book.open_items() == [("a", first), ("b", first)]


def test_a_message_is_done_with_its_last_job() -> None:
    book = DeliveryBook()
    first, second = taken_in(book, "a", "b"), taken_in(book, "c")
    assert book.close_jobs(["a"]) == []
    assert first.open == {"b"}
    assert book.close_jobs(["a", "b", "unknown"]) == [first]
    assert book.close_jobs(["b"]) == [], "only once"
    assert book.deliveries() == [second]
    assert book.held_jobs("demo") == 1


def test_a_newer_message_adopts_jobs_and_keeps_their_start_times() -> None:
    book = DeliveryBook()
    older = taken_in(book, "a", "b")
    older.started_at = 7.0
    newer = message("b", "c")
    book.add(newer)
    assert book.adopt(newer) == (["c"], []), "the older one still stands for a"
    assert newer.started_at == 7.0
    assert (older.open, newer.open) == ({"a"}, {"b", "c"})
    assert book.close_jobs(["b"]) == []
    assert book.close_jobs(["a"]) == [older]
    assert book.close_jobs(["c"]) == [newer]
    assert book.deliveries() == []


def test_a_message_whose_jobs_are_all_adopted_is_superseded() -> None:
    book = DeliveryBook()
    older = taken_in(book, "a", "b")
    newer = message("a", "b")
    book.add(newer)
    assert book.adopt(newer) == ([], [older])
    assert book.deliveries() == [newer]
    assert book.held_jobs("demo") == 2


def test_dropping_a_job_removes_the_message_that_it_belongs_to() -> None:
    book = DeliveryBook()
    older = taken_in(book, "a")
    newer = taken_in(book, "a")
    assert book.drop("a", older) is newer
    assert book.deliveries() == book.open_jobs() == []
    assert book.drop("a", older) is older, "and itself if none does"


def test_handles_are_unique() -> None:
    book = DeliveryBook()
    assert len({taken_in(book, str(number)).handle for number in range(5)}) == 5


def test_each_message_is_done_once_whichever_thread_closes_its_jobs() -> None:
    book, done = DeliveryBook(), []
    names = [f"{message}-{job}" for message in range(50) for job in range(4)]
    for number in range(50):
        taken_in(book, *[name for name in names if name.startswith(f"{number}-")])

    def close(part: list[str]) -> None:
        for name in part:
            done.extend(book.close_jobs([name]))

    threads = [threading.Thread(target=close, args=(names[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == len({delivery.handle for delivery in done}) == 50
    assert book.deliveries() == book.open_jobs() == []

"""Celery's remote control: a command has an effect, or is answered with an error."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.config import load_settings
from headrace.worker.celery import make_app
from headrace.worker.queue.remote_control import COMMANDS


class Consumer:
    """Records what the commands do to Celery's consumer."""

    def __init__(self, *, keeps_time_limits: bool) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.keeps_time_limits = keeps_time_limits
        self.event_dispatcher = SimpleNamespace(groups=set())
        self.strategies = 0

    def call_soon(self, function: Any, *args: str, **_: Any) -> None:
        self.calls.append((function.__name__, args[0]))

    def add_task_queue(self, *_: Any, **__: Any) -> None: ...

    def cancel_task_queue(self, *_: Any, **__: Any) -> None: ...

    def reset_rate_limits(self) -> None: ...

    def update_strategies(self) -> None:
        self.strategies += 1


@pytest.fixture
def app() -> Iterator[Celery]:
    made = make_app(load_settings(redis_url="redis://localhost:1/0", model="demo,other=demo"))
    yield made
    made.close()


@pytest.fixture
def consumer() -> Consumer:
    return Consumer(keeps_time_limits=True)


@pytest.fixture
def node(app: Celery, consumer: Consumer) -> Any:
    """The worker's mailbox, as Celery creates it, with a stock command beside."""
    state = SimpleNamespace(app=app, consumer=consumer)
    return app.control.mailbox.Node("worker@here", state=state, handlers={"ping": lambda _: "pong"})


def test_the_queues_of_the_models_can_be_added_and_cancelled(node: Any, consumer: Consumer) -> None:
    assert node.handle("ping") == "pong"
    plain = {"exchange": None, "exchange_type": "direct", "routing_key": None}  # what app.control sends
    assert node.handle("add_consumer", {"queue": "headrace.other", **plain}) == {"ok": "add consumer headrace.other"}
    assert "ok" in node.handle("cancel_consumer", {"queue": "headrace.demo"})
    assert consumer.calls == [("add_task_queue", "headrace.other"), ("cancel_task_queue", "headrace.demo")]


@pytest.mark.parametrize("command", ["add_consumer", "cancel_consumer"])
@pytest.mark.parametrize("queue", ["headrace.third", "celery", "demo", "headrace:headrace.demo", ""])
def test_any_other_queue_is_an_error_that_names_those_of_the_worker(
    node: Any, consumer: Consumer, command: str, queue: str
) -> None:
    answer = node.handle(command, {"queue": queue})
    assert f"{queue!r} is not a queue of this worker, which serves headrace.demo, headrace.other" in answer["error"]
    assert not consumer.calls


@pytest.mark.parametrize("command", ["add_consumer", "cancel_consumer"])
@pytest.mark.parametrize("queue", [None, 5, ["headrace.demo"]], ids=str)
def test_what_is_no_name_of_a_queue_is_an_error(node: Any, command: str, queue: Any) -> None:
    assert (
        "is not the name of a queue; this worker serves headrace.demo"
        in node.handle(command, {"queue": queue})["error"]
    )


@pytest.mark.parametrize("limit", ["10/m", "10/s", "2.5", 10, "1/h"])
def test_a_rate_limit_takes_effect_and_0_removes_it(app: Celery, node: Any, limit: Any) -> None:
    for given in (limit, 0):
        assert "ok" in node.handle("rate_limit", {"task_name": TASK_NAME, "rate_limit": given})
        assert app.tasks[TASK_NAME].rate_limit == given


@pytest.mark.parametrize("limit", ["-5/s", -1, "nan", "1e400/s", "x/y", "abc", "5/day", [1], True])
def test_a_rate_limit_that_would_stop_all_jobs_or_is_no_number_is_an_error(app: Celery, node: Any, limit: Any) -> None:
    answer = node.handle("rate_limit", {"task_name": TASK_NAME, "rate_limit": limit})
    assert f"the rate limit is {str(limit)!r}; it must be a number of messages" in answer["error"]
    assert app.tasks[TASK_NAME].rate_limit is None
    assert "unknown task" in node.handle("rate_limit", {"task_name": "nothing", "rate_limit": 1})["error"]


@pytest.mark.parametrize("more", [{"exchange": "x"}, {"exchange_type": "topic"}, {"routing_key": "a.b"}], ids=str)
def test_what_a_queue_cannot_have_is_an_error(node: Any, consumer: Consumer, more: dict[str, str]) -> None:
    answer = node.handle("add_consumer", {"queue": "headrace.demo", **more})
    assert next(iter(more)) in answer["error"]
    assert not consumer.calls


def test_a_time_limit_takes_effect_at_once_and_0_removes_it(app: Celery, node: Any, consumer: Consumer) -> None:
    assert "ok" in node.handle("time_limit", {"task_name": TASK_NAME, "hard": 7, "soft": 0})
    assert (app.tasks[TASK_NAME].time_limit, consumer.strategies) == (7, 1)
    assert "ok" in node.handle("time_limit", {"task_name": TASK_NAME, "hard": None, "soft": None})
    assert (app.tasks[TASK_NAME].time_limit, consumer.strategies) == (None, 2)


@pytest.mark.parametrize(
    ("task", "limits", "words"),
    [
        (TASK_NAME, {"soft": 5, "hard": 9}, "no soft time limit"),
        (TASK_NAME, {"soft": 5}, "no soft time limit"),
        (TASK_NAME, {"hard": -1}, "the time limit is -1; it must be a number of seconds above 0"),
        (TASK_NAME, {"hard": "soon"}, "the time limit is soon"),
        (TASK_NAME, {"hard": float("inf")}, "the time limit is inf"),
        (TASK_NAME, {"hard": True}, "the time limit is True"),
        (GROUP_TASK_NAME, {"hard": 9}, "timeout_s"),
        ("celery.chord_unlock", {"hard": 9}, TASK_NAME),
        ("nothing", {"hard": 9}, "unknown task"),
    ],
    ids=str,
)
def test_a_time_limit_without_effect_is_an_error(
    app: Celery, node: Any, consumer: Consumer, task: str, limits: dict[str, Any], words: str
) -> None:
    assert words in node.handle("time_limit", {"task_name": task, **limits})["error"]
    assert (app.tasks[TASK_NAME].time_limit, consumer.strategies) == (None, 0)


def test_celerys_own_pools_keep_no_time_limit(node: Any, consumer: Consumer) -> None:
    consumer.keeps_time_limits = False
    assert "headrace's own pool" in node.handle("time_limit", {"task_name": TASK_NAME, "hard": 9})["error"]


def test_events_are_turned_off_and_on_also_if_all_groups_are_sent(node: Any, consumer: Consumer) -> None:
    """Celery keeps an empty set for all groups, and its own command would change nothing."""
    groups = consumer.event_dispatcher.groups
    assert node.handle("disable_events") == {"ok": "task events disabled"}
    assert groups == {"worker"}
    assert node.handle("disable_events") == {"ok": "task events already disabled"}
    assert node.handle("enable_events") == {"ok": "task events enabled"}
    assert groups == {"worker", "task"}
    assert node.handle("enable_events") == {"ok": "task events already enabled"}
    assert node.handle("disable_events") == {"ok": "task events disabled"}
    assert groups == {"worker"}


def test_an_election_is_refused(node: Any) -> None:
    assert "do not gossip" in node.handle("election", {"id": "x", "topic": "y"})["error"]


def test_the_commands_replace_those_of_celery_in_this_app_only(node: Any) -> None:
    from celery.worker.control import Panel

    assert set(COMMANDS) <= set(Panel.data)
    assert not set(COMMANDS.values()) & set(Panel.data.values())

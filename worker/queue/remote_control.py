"""Remote control of a worker: commands of Celery that would answer "ok" without an effect, or with a wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from celery.app.control import Control as CeleryControl
from celery.utils.time import rate
from celery.worker import control as stock
from kombu.pidbox import Mailbox as KombuMailbox

from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.worker.queue.served import why_not_served

Reply = dict[str, Any]


def add_consumer(
    state: Any, queue: str, exchange: str | None = None, exchange_type: str | None = None, **options: Any
) -> Reply:
    """Consume a queue of one of the worker's models, for example after `cancel_consumer`."""
    if reason := why_not_served(queue, state.app.headrace_settings.models):
        return _error(reason)
    others = [name for name, value in {"exchange": exchange, **options}.items() if value not in (None, "", queue)]
    if exchange_type not in (None, "", "direct"):
        others.append("exchange_type")
    if others:
        return _error(f"the queues of models have no {' and no '.join(others)} of their own; name the queue alone")
    return dict(stock.add_consumer(state, queue))


def cancel_consumer(state: Any, queue: str, **_: Any) -> Reply:
    """Stop consuming a queue of one of the worker's models."""
    if reason := why_not_served(queue, state.app.headrace_settings.models):
        return _error(reason)
    return dict(stock.cancel_consumer(state, queue))


def time_limit(state: Any, task_name: str | None = None, hard: Any = None, soft: Any = None, **_: Any) -> Reply:
    """Set the time limit of messages with one job, in seconds from the job's start; 0 removes it."""
    if not isinstance(task_name, str) or task_name not in state.app.tasks:
        return _error("unknown task")
    if soft:
        return _error("there is no soft time limit, because a job cannot clean up; set the hard one alone (soft 0)")
    if hard and (isinstance(hard, bool) or not isinstance(hard, int | float) or not 0 < hard < math.inf):
        return _error(f"the time limit is {str(hard)[:40]}; it must be a number of seconds above 0")
    if task_name == GROUP_TASK_NAME:
        return _error("a message of several jobs has no time limit; submit its jobs with timeout_s")
    if task_name != TASK_NAME or not state.consumer.keeps_time_limits:
        return _error(f"this worker keeps time limits only of {TASK_NAME}, in headrace's own pool")
    state.app.tasks[task_name].time_limit = hard or None
    state.consumer.update_strategies()  # they read the limit when they are made
    return dict(stock.ok("time limit of messages with one job set; jobs that were submitted together have timeout_s"))


def rate_limit(state: Any, task_name: Any = None, rate_limit: Any = None, **_: Any) -> Reply:
    """Limit how many messages of a task are begun; 0 and None remove the limit. Of a limit below 0, or one that is no
    number, Celery's own command says "ok", and no message is begun any more.
    """
    try:
        per_s = float(rate(rate_limit) or 0)
    except (LookupError, TypeError, ValueError, AttributeError):
        per_s = math.nan
    if isinstance(rate_limit, bool) or not 0 <= per_s < math.inf:
        return _error(
            f"the rate limit is {str(rate_limit)[:40]!r}; it must be a number of messages a second, or a text such "
            "as '10/s', '10/m' or '10/h'; 0 removes it"
        )
    if not isinstance(task_name, str):
        return _error("unknown task")
    return dict(stock.rate_limit(state, task_name, rate_limit))


def enable_events(state: Any) -> Reply:
    """Send task events again."""
    dispatcher = state.consumer.event_dispatcher
    if dispatcher is None:
        return _error("event dispatcher unavailable")
    if dispatcher.groups and "task" not in dispatcher.groups:
        dispatcher.groups.add("task")
        return dict(stock.ok("task events enabled"))
    return dict(stock.ok("task events already enabled"))


def disable_events(state: Any) -> Reply:
    """Send no task events. Celery's own command changes nothing in a worker that was started with events."""
    dispatcher = state.consumer.event_dispatcher
    if dispatcher is None:
        return _error("event dispatcher unavailable")
    if dispatcher.groups and "task" not in dispatcher.groups:
        return dict(stock.ok("task events already disabled"))
    if dispatcher.groups:
        dispatcher.groups.discard("task")
    else:  # empty: all groups of events are sent
        dispatcher.groups.add("worker")
    return dict(stock.ok("task events disabled"))


def election(state: Any, **_: Any) -> Reply:  # noqa: ARG001
    """Not possible: workers do not gossip."""
    return _error("workers hold no elections, because they do not gossip")


def _error(text: str) -> Reply:
    return dict(stock.nok(text))


COMMANDS: Mapping[str, Callable[..., Reply]] = {
    command.__name__: command
    for command in (add_consumer, cancel_consumer, time_limit, rate_limit, enable_events, disable_events, election)
}


class Mailbox(KombuMailbox):
    """Gives the worker's node these commands in place of Celery's; a user's own commands remain."""

    def Node(  # noqa: N802 (kombu's name)
        self, hostname: str | None = None, state: Any = None, channel: Any = None, handlers: Any = None
    ) -> Any:
        """Called by the worker."""
        return super().Node(hostname, state, channel, {**(handlers or {}), **COMMANDS})  # type: ignore[no-untyped-call]


class Control(CeleryControl):
    """Celery's remote control with the mailbox of this module."""

    Mailbox = Mailbox

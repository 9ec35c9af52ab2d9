"""The queues that a worker may consume: those of its models. From any other it would compute with the wrong weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from celery.app import amqp
from celery.exceptions import ImproperlyConfigured

from headrace.client.wire import keys
from headrace.worker.queue.redaction import REDACTED


def why_not_served(queue: Any, models: Iterable[str]) -> str | None:
    """Return a sentence that says why a worker of these models does not consume a queue, or None if it does."""
    names = [keys.queue(model) for model in models]
    if queue in names:
        return None
    if not isinstance(queue, str):  # remote control passes on whatever it is sent
        return f"{str(queue)[:200]} is not the name of a queue; this worker serves {', '.join(names)}"
    start = f"{queue[:200]!r} is not a queue of this worker, which serves {', '.join(names)}"
    if queue.removeprefix(keys.PREFIX) in names:
        return f"{start}; write it without {keys.PREFIX!r}, the prefix of its keys in Redis"
    if near := difflib.get_close_matches(queue, names, n=1, cutoff=0.75) or [
        name for name in names if keys.model_of(name) == queue
    ]:
        start = f"{start}; did you mean {near[0]!r}?"
        return f"{start} For another model, add it to HEADRACE_MODEL, which takes several separated by commas"
    if keys.names_model(queue):
        return (
            f"{start}; add the model to HEADRACE_MODEL, which takes several separated by commas, or start another "
            "worker for it"
        )
    return f"{start}; tasks of your own need a worker of your own app"


class ServedQueues(amqp.Queues):
    """Queues of which only those of the worker's models can be consumed. Messages may be sent to any.

    Celery calls these methods for `-Q`, for remote control, and for its setting `worker_direct`.
    """

    models: tuple[str, ...] = ()

    def select(self, include: Any) -> None:
        """Consume these queues only."""
        self._check([include] if isinstance(include, str) else include or ())
        super().select(include)

    def select_add(self, queue: Any, **options: Any) -> Any:
        """Consume this queue too."""
        self._check([getattr(queue, "name", queue)])
        return super().select_add(queue, **options)

    def _check(self, names: Iterable[str]) -> None:
        for name in names:
            if reason := why_not_served(name, self.models):
                raise ImproperlyConfigured(reason)


class AMQP(amqp.AMQP):
    """The worker's way to queues. What it sends for canvases shows neither prompts nor texts in headers and events."""

    queues_cls = ServedQueues

    def Queues(self, queues: Any, *args: Any, **options: Any) -> ServedQueues:  # noqa: N802 (Celery's name)
        """Called by Celery with its setting `task_queues`."""
        made: ServedQueues = super().Queues(queues, *args, **options)
        made.models = tuple(self.app.headrace_settings.models)
        made._check(made)
        return made

    def as_task_v2(self, *args: Any, **options: Any) -> Any:
        """Called by Celery to write a message."""
        return super().as_task_v2(*args, **{**options, "argsrepr": REDACTED, "kwargsrepr": REDACTED})


def selected_queues(options: Mapping[str, Any], models: Iterable[str]) -> list[str]:
    """The queues that a worker consumes with the options `-Q` and `-X` of its command line.

    Raises:
        ValueError: a queue is not one of the models', or none is left. The message says what to change.
    """
    served = [keys.queue(model) for model in models]
    chosen, excluded = (_as_list(options.get(name)) for name in ("queues", "exclude_queues"))
    for flag, names in (("-Q", chosen), ("-X", excluded)):
        for name in names or ():
            if reason := why_not_served(name, models):
                raise ValueError(f"{flag}: {reason}")
    if left := [name for name in chosen or served if name not in (excluded or ())]:
        return left
    raise ValueError(f"-X: no queue is left of {', '.join(chosen or served)}; exclude fewer")


def _as_list(value: Any) -> list[str] | None:
    """Celery takes names as a list, or separated by commas."""
    if value is None or value == "":
        return None
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else [str(name) for name in value]

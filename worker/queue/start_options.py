"""The options of `celery worker`: each has an effect, asks for nothing, or is refused with a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import click
from celery.utils.sysinfo import is_auto_concurrency
from click.core import ParameterSource

from headrace.worker.queue.served import selected_queues

ENGINE_POOL = "headrace.worker.jobs.pool:EnginePool"
#: Celery's pools under which the tasks run too, by module.
OTHER_POOLS = {"celery.concurrency.solo": "solo", "celery.concurrency.thread": "threads"}

_ONE_PROCESS = "one process is one engine for each model; set HEADRACE_SLOTS, or start more workers"
_NO_CHILDREN = "the worker computes in its own process and has no child processes"
_NO_SCHEDULE = "the worker has no schedule of tasks; start `celery beat` with the app that has one"

#: Options that a worker cannot honour, and what to do instead. They are refused unless they ask for nothing.
REFUSED = {
    "autoscale": ("--autoscale", _ONE_PROCESS),
    "max_tasks_per_child": ("--max-tasks-per-child", _NO_CHILDREN),
    "max_memory_per_child": ("--max-memory-per-child", f"{_NO_CHILDREN}; limit the cache with HEADRACE_KV_CACHE_BYTES"),
    "pool_start_method": ("--pool-start-method", _NO_CHILDREN),
    "time_limit": ("--time-limit", "give jobs a timeout_s, or messages of one job a time_limit"),
    "soft_time_limit": ("--soft-time-limit", "a job cannot clean up before it ends; give jobs a timeout_s"),
    "beat": ("-B", _NO_SCHEDULE),
    "scheduler": ("--scheduler", _NO_SCHEDULE),
    "purge": (
        "--purge",
        "it would delete the messages of jobs whose callers then wait for ever; cancel the jobs instead "
        "(`client.cancel`)",
    ),
}


def check_options(options: Mapping[str, Any], app: Any) -> None:
    """Check the options with which a worker is started, before Redis is looked for and a model is loaded.

    Args:
        options: as Celery passes them to the worker.
        app: the worker's app, with `headrace_settings`.

    Raises:
        ValueError: an option cannot be honoured; the message names it and says what to do.
    """
    pool = _check_pool(options.get("pool_cls") or options.get("pool"))
    for name, (flag, advice) in REFUSED.items():
        if options.get(name):
            raise ValueError(f"{flag} has no effect here: {advice}")
    if options.get("schedule_filename") not in (None, app.conf.beat_schedule_filename):
        raise ValueError(f"--schedule has no effect here: {_NO_SCHEDULE}")
    if not pool:
        for flag, advice in _without_effect(options, app.conf):
            raise ValueError(f"{flag} has no effect in headrace's pool: {advice}")
    selected_queues(options, app.headrace_settings.models)


def _check_pool(pool: Any) -> str:
    """Return the name of Celery's pool that was chosen, or "" for headrace's own. `pool` is a class or a name."""
    if pool is None or (_path_of(pool) == ENGINE_POOL and not _is_explicit_prefork(pool)) or _is_engine_pool(pool):
        return ""
    module = _path_of(pool).partition(":")[0]
    name = "prefork" if _path_of(pool) == ENGINE_POOL else module.removeprefix("celery.concurrency.")
    if module in OTHER_POOLS or name in OTHER_POOLS.values():
        return OTHER_POOLS.get(module, name)
    raise ValueError(
        f"the pool {name!r} cannot run these tasks; start the worker without -P, to use headrace's own pool, or with "
        "-P solo or -P threads"
    )


def _path_of(pool: Any) -> str:
    return pool if isinstance(pool, str) else f"{getattr(pool, '__module__', '')}:{getattr(pool, '__qualname__', '')}"


def _is_engine_pool(pool: Any) -> bool:
    """Whether this is a subclass of headrace's pool."""
    return isinstance(pool, type) and any(_path_of(base) == ENGINE_POOL for base in pool.__mro__[1:])


def _is_explicit_prefork(pool: Any) -> bool:
    """Whether the user chose `-P prefork`, which Celery's command line replaces by the setting `worker_pool`.

    `prefork` is also the default of the command line, so what remains is whether it was given.
    """
    return is_explicit("pool") and not isinstance(pool, str) and not os.environ.get("CELERY_CUSTOM_WORKER_POOL")


def is_explicit(parameter: str) -> bool:
    """Whether a parameter of the Celery command that is running was given, in its arguments or the environment."""
    context = click.get_current_context(silent=True)
    source = context.get_parameter_source(parameter) if context is not None else None
    return source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


def _without_effect(options: Mapping[str, Any], conf: Any) -> Iterator[tuple[str, str]]:
    """The options that have no effect in headrace's own pool, each with what to do instead."""
    concurrency, multiplier = options.get("concurrency"), options.get("prefetch_multiplier")
    if is_auto_concurrency(concurrency):
        yield "-c auto", "it takes as many jobs as its slots need; leave -c out, or set HEADRACE_SLOTS"
    if multiplier not in (None, conf.worker_prefetch_multiplier):
        yield "--prefetch-multiplier", "it takes messages by the number of jobs that it holds, which -c sets"

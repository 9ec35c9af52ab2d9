"""Which models and adapters jobs may name: those that workers report in Redis."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import redis
from pydantic import TypeAdapter, ValidationError

from headrace.client.wire import keys
from headrace.client.wire.adapters import AdapterStatus, are_complete, is_adapter_name, unknown_adapter
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.queue_depth import execute_typed
from headrace.client.wire.redis import redis_errors
from headrace.client.wire.start_advice import start_worker_here
from headrace.client.wire.unicode import parse_json
from headrace.client.wire.values import show
from headrace.config.model_names import is_served_name

#: For how many seconds a client caches the lists of served models and of adapters.
SERVED_S = 1.0
#: The age of the list by which an adapter is refused: one that `headrace status` shows can be named.
UNKNOWN_S = 0.1

_ADAPTERS = TypeAdapter(list[AdapterStatus])


class Served(NamedTuple):
    """Names of models: those that live workers serve, and those that a worker served within `keys.KNOWN_MODEL_S`.

    Attributes:
        adapters: the names of the adapters that a worker had within that time, by model.
    """

    now: set[str]
    recent: set[str]
    adapters: dict[str, set[str]]


class ServedAdapters(NamedTuple):
    """The names of the adapters that the live workers of a model have.

    Attributes:
        names: of at least one worker.
        complete: whether these are all: each worker has listed its adapters, and the list was not too long.
    """

    names: set[str]
    complete: bool


def read_served(connection: redis.Redis) -> Served | None:
    """The models that workers serve; None if the Redis user may not read them. Raises redis.RedisError."""
    try:
        pipe = connection.pipeline(transaction=False)
        pipe.zrange(keys.workers(), 0, -1)
        pipe.zrange(keys.models(), 0, -1)
        names, recent = execute_typed(pipe, [[], []])
        for name in names:
            pipe.hget(keys.worker(name), "model")
        found = pipe.execute(raise_on_error=False)
    except redis.exceptions.NoPermissionError:
        return None
    adapters: dict[str, set[str]] = {}
    for model, _, name in (member.partition("/") for member in recent if isinstance(member, str)):
        if is_adapter_name(name) and is_served_name(model):
            adapters.setdefault(model, set()).add(name)
    return Served(_valid_names(found), _valid_names(recent), adapters)


def read_adapters(connection: redis.Redis) -> dict[str, ServedAdapters]:
    """The adapters of each model that live workers have; {} if the Redis user may not read them.

    Raises redis.RedisError.
    """
    try:
        pipe = connection.pipeline(transaction=False)
        pipe.zrange(keys.workers(), 0, -1)
        (names,) = execute_typed(pipe, [[]])
        for name in names:
            pipe.hmget(keys.worker(name), "model", "adapters")
        records = pipe.execute(raise_on_error=False)
    except redis.exceptions.NoPermissionError:
        return {}
    found: dict[str, ServedAdapters] = {}
    for record in records:
        if not isinstance(record, list) or not _valid_names(record[:1]):
            continue
        model, adapters = record[0], _parsed(record[1])
        before = found.get(model, ServedAdapters(set(), True))
        names = before.names | {each.name for each in adapters or ()}
        found[model] = ServedAdapters(names, before.complete and adapters is not None and are_complete(adapters))
    return found


def _parsed(text: Any) -> list[AdapterStatus] | None:
    """The adapters in a worker's record; None if it does not say, or the text is not valid."""
    try:
        return None if text is None else _ADAPTERS.validate_python(parse_json(text))
    except (ValidationError, InvalidRequest, ValueError):
        return None


def _valid_names(models: list[Any]) -> set[str]:
    """The values that are names of models; anyone who can write to Redis may have added others."""
    return {model for model in models if isinstance(model, str) and is_served_name(model)}


class ServedModels:
    """The models and adapters that jobs may name. The lists in Redis are cached for SERVED_S.

    Args:
        configured: the models of the settings. Jobs may always name them, because their worker may be started later.
    """

    def __init__(self, connection: redis.Redis, url: str, configured: set[str]) -> None:
        self._redis, self._url, self._configured = connection, url, configured
        self._served: Served | None = None
        self._live: dict[str, ServedAdapters] = {}
        self._read_at = self._live_at = -SERVED_S

    def served(self) -> Served | None:
        """The served models; None if the Redis user may not read them. Raises RedisUnreachable, RedisRefused."""
        if time.monotonic() - self._read_at >= SERVED_S:
            with redis_errors(self._url):
                self._served = read_served(self._redis)
            self._read_at = time.monotonic()
        return self._served

    def _live_adapters(self, max_age_s: float) -> dict[str, ServedAdapters]:
        if time.monotonic() - self._live_at >= max_age_s:
            with redis_errors(self._url):
                self._live = read_adapters(self._redis)
            self._live_at = time.monotonic()
        return self._live

    def names(self) -> set[str]:
        """The configured models, and those served now or within the last day. Raises RedisUnreachable, RedisRefused."""
        served = self.served()
        return self._configured if served is None else self._configured | served.now | served.recent

    def adapters(self) -> dict[str, set[str]]:
        """The adapters of each model that workers have now, or had within the last day.

        A model is missing if no worker says what it has. Raises RedisUnreachable, RedisRefused.
        """
        served = self.served()
        found = {model: set(live.names) for model, live in self._live_adapters(SERVED_S).items() if live.complete}
        for model, names in ({} if served is None else served.adapters).items():
            found.setdefault(model, set()).update(names)
        return found

    def check(self, models: Mapping[str, str]) -> None:
        """Refuse models that no worker serves, which are probably misspelt. Without any live worker, all are accepted.

        Args:
            models: their served names, each with what the caller called it.

        Raises:
            InvalidRequest: no worker serves a model, and none did within the last day.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        others = models.keys() - self._configured
        served = self.served() if others else None
        if served and served.now and (unknown := sorted(others - served.now - served.recent)):
            start = start_worker_here(self._url, [unknown[0]])  # it may be shown to users of the HTTP API
            expected = f"one that is served: {', '.join(sorted(served.now))}; or start a worker for it, {start}"
            raise InvalidRequest("model", show(models[unknown[0]]), expected)

    def check_adapters(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Refuse adapters that no worker has. The worker of a model decides where none of them has told all.

        Args:
            wanted: models, each with the name of an adapter.

        Raises:
            InvalidRequest: live workers serve a model, and none of them has the adapter.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error.
        """
        for model, adapter in sorted(set(wanted)):
            if self._lacks(model, adapter, SERVED_S) and self._lacks(model, adapter, UNKNOWN_S):
                raise unknown_adapter(adapter, model, self._live[model].names)

    def _lacks(self, model: str, adapter: str, max_age_s: float) -> bool:
        """Whether live workers serve the model and none has the adapter, by lists that are not older than this."""
        known = self._live_adapters(max_age_s).get(model)
        return known is not None and known.complete and adapter not in known.names

"""LoRA adapters: their names, and what workers report about them in their heartbeats."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from pydantic import BaseModel, ConfigDict, Field

from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import show
from headrace.config import adapter_names

#: `config.adapter_names.is_adapter_name` for schemas.
ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
#: The most adapters of one model that a heartbeat lists. A list of that length may lack some.
MAX_ADAPTERS = 1_000
#: Names in an error message, and characters of a digest for people.
SHOWN_NAMES, SHOWN_DIGEST = 20, 12


def is_adapter_name(value: Any) -> TypeGuard[str]:
    """Whether this is a valid name of an adapter: it can name an entry of a directory, and nothing outside of it."""
    return isinstance(value, str) and adapter_names.is_adapter_name(value)


class AdapterStatus(BaseModel):
    """An adapter that a worker has, and what it has computed since the worker started."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    name: str = Field(pattern=ADAPTER_NAME)
    #: Whether it is in memory; others are loaded when a job names them.
    loaded: bool = False
    #: The largest rank of its matrices and its memory in bytes; 0 if it has not been loaded.
    rank: int = 0
    nbytes: int = 0
    #: SHA-256 of its files; "" if it has not been loaded.
    digest: str = ""
    #: Jobs that hold it: they wait or run.
    running: int = 0
    #: Jobs that succeeded, and their new tokens.
    jobs: int = 0
    tokens: int = 0


def unknown_adapter(adapter: str, model: str, names: Collection[str]) -> InvalidRequest:
    """The error for an adapter that no worker of the model has."""
    expected = (
        f"an adapter of {model}: {listed(names)}; to add one, put it into the directory HEADRACE_ADAPTERS_DIR of its "
        "workers, or name it in their HEADRACE_ADAPTERS"
    )
    return InvalidRequest("adapter", show(adapter), expected)


class AdapterTotal(NamedTuple):
    """An adapter of all workers of a model together.

    Attributes:
        workers: how many workers have it, and `loaded` how many of them in memory.
        rank: its largest rank; 0 if no worker has loaded it.
        nbytes: its memory in one worker.
    """

    name: str
    workers: int
    loaded: int
    rank: int
    nbytes: int
    running: int
    jobs: int
    tokens: int


def totals(workers: Iterable[Sequence[AdapterStatus]]) -> list[AdapterTotal]:
    """The adapters that workers of one model have, sorted by name, those in memory first."""
    found: dict[str, list[AdapterStatus]] = {}
    for adapters in workers:
        for each in adapters:
            found.setdefault(each.name, []).append(each)
    summed = [
        AdapterTotal(
            name,
            len(all_of),
            sum(each.loaded for each in all_of),
            max(each.rank for each in all_of),
            max(each.nbytes for each in all_of),
            sum(each.running for each in all_of),
            sum(each.jobs for each in all_of),
            sum(each.tokens for each in all_of),
        )
        for name, all_of in found.items()
    ]
    return sorted(summed, key=lambda each: (not each.loaded, each.name))


def are_complete(adapters: Sequence[AdapterStatus]) -> bool:
    """Whether a list in a heartbeat has all adapters of the worker."""
    return len(adapters) < MAX_ADAPTERS


def listed(names: Collection[str]) -> str:
    """Names for an error message: the first SHOWN_NAMES of them."""
    if not names:
        return "none"
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(sorted(names)[:SHOWN_NAMES]) + more


def differences(workers: Mapping[str, Sequence[AdapterStatus]]) -> list[str]:
    """On which adapters the workers of one model disagree, a phrase for each adapter.

    Args:
        workers: the adapters of each worker, by its name.
    """
    found: list[str] = []
    complete = {worker: {each.name for each in adapters} for worker, adapters in workers.items()}
    for name in sorted(set().union(*complete.values())):
        having = [worker for worker, names in complete.items() if name in names]
        if len(having) < len(complete):
            found.append(f"{name} only on {', '.join(having)}")
        digests: dict[str, list[str]] = {}
        for worker, adapters in workers.items():
            for each in adapters:
                if each.name == name and each.digest:
                    digests.setdefault(each.digest[:SHOWN_DIGEST], []).append(worker)
        if len(digests) > 1:
            different = "; ".join(f"{digest} on {', '.join(names)}" for digest, names in digests.items())
            found.append(f"{name} with different files, {different}")
    return found

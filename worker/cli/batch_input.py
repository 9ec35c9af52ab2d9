"""The input of `headrace batch`: a file that is checked before anything is queued, and parameters for its rows."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from headrace.client import Client
from headrace.client.batch.errors import Fault, InvalidBatch
from headrace.client.batch.run import Batch
from headrace.client.wire.errors import HeadraceError, InvalidRequest
from headrace.config import Settings
from headrace.worker.cli.backends import Backends
from headrace.worker.cli.batch_progress import ProgressDisplay
from headrace.worker.cli.options import given_params


@dataclass(frozen=True)
class BatchInput:
    """The options of the command that say what to compute."""

    source: str
    model: str | None
    params: tuple[str, ...]
    text: bool
    limit: int | None
    options: dict[str, Any] = field(default_factory=dict)  # format, columns, shard of `Batch`
    sampling: dict[str, Any] = field(default_factory=dict)  # options such as --max-tokens

    def check(self, backends: Backends, settings: Settings, display: ProgressDisplay) -> Batch:
        """Read and check all of it. Raises InvalidBatch, InvalidRequest."""
        given: Any = sys.stdin.buffer if self.source == "-" else self.source
        with Client(settings=settings) as client, display.shown(), self._blaming_options():
            return backends.open_batch(
                client,
                given,
                {**read_params(self.params), **given_params(self.sampling)},
                text=self.text,
                limit=self.limit,
                models=_known_models(client),
                adapters=_known_adapters(client),
                on_line=display.checked,
                **self.options,
            )

    @contextlib.contextmanager
    def _blaming_options(self) -> Iterator[None]:
        """Name the option that set a wrong parameter."""
        try:
            yield
        except InvalidBatch as error:
            faults = [fault._replace(message=self._blaming(fault)) for fault in error.faults]
            raise InvalidBatch(faults, error.count) from None

    def _blaming(self, fault: Fault) -> str:
        _, found, name = fault.field.partition("params.")
        if not found:
            return fault.message
        is_option = name in given_params(self.sampling)
        return fault.message.replace(fault.field, f"--{name.replace('_', '-')}" if is_option else f"-p {name}", 1)


def read_params(pairs: tuple[str, ...]) -> dict[str, Any]:
    """The parameters of `-p NAME=VALUE`, for example `max_tokens=20`. A value is JSON, else text.

    Raises:
        InvalidRequest: a pair has no name or no `=`.
    """
    params: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise InvalidRequest("params", repr(pair)[:80], "NAME=VALUE, for example max_tokens=20")
        try:
            params[name] = json.loads(value)
        except ValueError:
            params[name] = value
    return params


def _known_models(client: Client) -> set[str]:
    """The models that rows may name: those of the settings, and those that workers serve."""
    with contextlib.suppress(HeadraceError):
        return client.models()
    return set(client.settings.models)


def _known_adapters(client: Client) -> dict[str, set[str]]:
    """The LoRA adapters that rows may name in place of a model."""
    with contextlib.suppress(HeadraceError):
        return client.adapters()
    return {}

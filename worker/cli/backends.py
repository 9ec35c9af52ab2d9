"""What the commands call to do their work. A test passes other backends, as click's `obj`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from headrace.client.batch.run import Batch
from headrace.config import Settings
from headrace.extras import how_to_install
from headrace.worker.cli.local_stack import NothingRuns, ServingStack, find_or_start_stack, start_local_stack

if TYPE_CHECKING:
    from headrace.worker.fidelity.validate import Validation


def _serve_http(settings: Settings, **options: Any) -> None:
    """`client.http.serve.serve`. Raises NothingRuns if the extra `http` is not installed."""
    try:
        from headrace.client.http.serve import serve
    except ModuleNotFoundError as error:
        advice = f"headrace serve needs {error.name}, which the extra [http] installs: {how_to_install('http')}"
        raise NothingRuns(advice) from None
    serve(settings, **options)


def _validation(
    settings: Settings, references: Sequence[str], prompts: Sequence[str], adapter: Path | None
) -> Validation:
    from headrace.worker.fidelity.validate import Validation

    return Validation(settings, references, prompts, adapter)


@dataclass(frozen=True)
class Backends:
    """The functions behind the commands. The defaults are the real ones, and import what is heavy when called."""

    find_or_start_stack: Callable[[Settings], AbstractContextManager[ServingStack]] = find_or_start_stack
    start_local_stack: Callable[[Settings], AbstractContextManager[ServingStack]] = start_local_stack
    open_batch: Callable[..., Batch] = Batch
    serve_http: Callable[..., None] = _serve_http
    validation: Callable[[Settings, Sequence[str], Sequence[str], Path | None], Validation] = _validation


#: Gives a command click's `obj` as its first argument if that is `Backends`, else the real ones.
pass_backends = click.make_pass_decorator(Backends, ensure=True)

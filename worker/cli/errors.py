"""Exit codes, and how a command reports an error."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import IO, Any

import click

from headrace.client import NoWorker, RedisUnreachable, ResultTimeout
from headrace.client.batch.errors import InvalidBatch, OutputRefused
from headrace.client.wire.errors import HeadraceError, InvalidRequest
from headrace.config import SettingsError
from headrace.worker.cli.local_stack import NothingRuns
from headrace.worker.redis_server import EmbeddedRedisError

#: Exit codes: 1 the job ended without a result, 2 wrong input, 3 no worker or no Redis, 4 no result in time,
#: 130 interrupted by the user. 0 is success.
FAILED, WRONG_INPUT, NOT_RUNNING, TIMED_OUT, INTERRUPTED = 1, 2, 3, 4, 130


class CommandFailed(click.ClickException):
    """Ends a command with a code, and a message on standard error or, with --json, an object on standard output."""

    def __init__(self, error: Exception, as_json: bool) -> None:
        super().__init__(str(error))
        self.error, self.as_json = error, as_json
        self.exit_code = _exit_code(error)  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:  # noqa: ARG002
        """Called by click."""
        if self.as_json:
            code = getattr(self.error, "code", None) or type(self.error).__name__
            click.echo(json.dumps({"error": {"code": code, "message": str(self.error)}}))
        else:
            click.echo(f"headrace: {self.error}", err=True)


def _exit_code(error: Exception) -> int:
    if isinstance(error, (InvalidRequest, InvalidBatch, OutputRefused, SettingsError)):
        return WRONG_INPUT
    if isinstance(error, (RedisUnreachable, NoWorker, EmbeddedRedisError, NothingRuns)):
        return NOT_RUNNING
    return TIMED_OUT if isinstance(error, ResultTimeout) else FAILED


@contextlib.contextmanager
def command_errors(as_json: bool) -> Iterator[None]:
    """Turn the errors that users can cause into CommandFailed; every other error keeps its traceback."""
    try:
        yield
    except (HeadraceError, SettingsError, EmbeddedRedisError) as error:
        raise CommandFailed(error, as_json) from error

"""`Client.map`: prompts in, results out, in the same order."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from headrace.client.batch.frames import column_names
from headrace.client.batch.items import is_column
from headrace.client.batch.window import MAX_INFLIGHT, JobService, Window
from headrace.client.jobs.prepared import PreparedJob
from headrace.client.wire.errors import InvalidRequest, RedisRefused, RedisUnreachable
from headrace.client.wire.values import to_python, without_gaps


def map_prompts(
    client: JobService,
    prompts: Iterable[Any],
    params: Mapping[str, Any],
    *,
    max_inflight: int = MAX_INFLIGHT,
    return_exceptions: bool = False,
) -> Iterator[Any]:
    """See `Client.map`."""
    if not is_column(prompts):
        raise InvalidRequest("prompts", f"a {type(prompts).__name__}", "an iterable of prompts; use submit for one")
    check_no_table(prompts)
    window: Window[int] = Window(client, size=max_inflight, ordered=True)
    return _mapped(window, _prepared(client, prompts, params), return_exceptions)


def check_no_table(prompts: Any) -> None:
    """Refuse a whole table, which iterates over the names or the arrays of its columns. Raises InvalidRequest."""
    if (names := column_names(prompts)) is not None:
        expected = (
            f"one of its columns ({', '.join(names[:10])}), for example frame[{names[0]!r}]" if names else "a column"
        )
        raise InvalidRequest("prompts", f"a {type(prompts).__name__}", expected)


def _mapped(
    window: Window[int], jobs: Iterator[tuple[int, PreparedJob | Exception]], return_exceptions: bool
) -> Iterator[Any]:
    try:
        for pairs in window.run(jobs):
            for _, outcome in pairs:
                if isinstance(outcome, Exception) and not return_exceptions:
                    raise outcome
                yield outcome
    finally:
        window.drop()


def _prepared(
    client: JobService, prompts: Iterable[Any], params: Mapping[str, Any]
) -> Iterator[tuple[int, PreparedJob | Exception]]:
    run = secrets.token_hex(6)
    for index, item in enumerate(prompts):
        item = to_python(item)
        fields = item if isinstance(item, Mapping) else {"prompt": item}
        try:
            given = {**params, **without_gaps(fields), "id": f"{run}.{index}"}
            job = client.submitter.prepare(given)
            with contextlib.suppress(RedisUnreachable, RedisRefused):  # the window waits for Redis
                client.submitter.check_models([job])
            yield index, job
        except InvalidRequest as error:
            yield index, InvalidRequest(f"prompts[{index}].{error.field}", error.value, error.expected)

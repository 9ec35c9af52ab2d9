"""Which messages a worker refuses before Celery looks at them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from headrace.client.wire.celery import TASK_NAME
from headrace.worker.queue.validation import reason_to_refuse


def message(**headers: Any) -> Any:
    return SimpleNamespace(
        content_type="application/json",
        content_encoding="utf-8",
        body="[]",
        payload=[[{"prompt": "a"}], {}, {}],
        headers={"task": TASK_NAME, "id": "a", **headers},
    )


def test_a_message_of_the_client_is_not_refused() -> None:
    assert reason_to_refuse(message(argsrepr="\U0001f600\0\u2028"), signed_only=False) is None


@pytest.mark.parametrize(
    ("headers", "place"),
    [
        ({"id": "\ud83d"}, "headers.id"),
        ({"task": "\udcff"}, "headers.task"),
        ({"group": "\ud83d"}, "headers.group"),
        ({"stamps": {"a": ["\ud83d"]}}, "headers.stamps.a[0]"),
    ],
)
def test_headers_that_are_no_unicode_are_refused(headers: dict[str, Any], place: str) -> None:
    """As the name of a key in Redis they would end every worker that takes the message, one after the other."""
    assert reason_to_refuse(message(**headers), signed_only=False) == f"{place} is not valid Unicode"

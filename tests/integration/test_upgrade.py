"""A worker reads messages of an earlier client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headrace.client import Client
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from tests.patience import PATIENCE_S

GOLDEN = Path(__file__).parents[1] / "golden" / "queue-v1.json"


@pytest.mark.usefixtures("worker")
def test_a_message_that_an_earlier_client_left_in_the_queue_is_computed(redis_url: str, client: Client) -> None:
    """The file is what the first client put into Redis; it is not updated when the format changes."""
    stored: dict[str, Any] = json.loads(GOLDEN.read_text())
    with connect(redis_url) as connection:
        connection.delete(*(key(job_id) for job_id in stored["records"] for key in (keys.job, keys.result)))
        for job_id, record in stored["records"].items():
            connection.hset(keys.job(job_id), mapping={**record, "colour": "a field that nobody knows"})
        for entry in stored["queue"]:
            entry["message"]["headers"]["colour"] = "red"
            connection.lpush(entry["list"], json.dumps(entry["message"]))
    single, first, second = (client.job(f"v1:{name}").result(PATIENCE_S) for name in ("single", "first", "second"))
    assert single.text == client.submit("Hello.", max_tokens=5, temperature=0).result(PATIENCE_S).text
    assert first.text == client.submit("The river", max_tokens=4, seed=7).result(PATIENCE_S).text
    assert [len(choice.token_ids) for choice in second.choices] == [3, 3]
    assert [event.text for event in client.job("v1:single").stream(timeout=PATIENCE_S)]

"""Fuzz targets: what a message asks for beside its jobs, and the names of queues."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st
from kombu.message import Message

from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.worker.queue.message_options import reason_to_refuse_options
from headrace.worker.queue.messages import ADDRESSED_TO
from headrace.worker.queue.served import why_not_served
from headrace.worker.queue.validation import reason_to_refuse
from tests.fuzz.harness import LONGEST_MESSAGE, Target
from tests.fuzz.values import ANY_TEXT, NUMBERS, objects

MODELS = ("demo", "other")
QUEUES = st.sampled_from([*map(keys.queue, MODELS), "headrace.third", "headrace:headrace.demo", "headrace.", "demo"])
#: Values of a wrong type or size; `JSON` has more, and a strategy with many copies of it is slow.
ODD = st.sampled_from([None, True, 0, -1, 1e999, 10**400, "", "x" * 70_000, "\ud800", [], [[]], {}, {"a": 1}, ["demo"]])
LIMITS = st.lists(NUMBERS | st.none() | st.booleans(), max_size=3) | ODD
HEADERS = objects(
    {
        "id": st.just("x") | ODD,
        "task": st.sampled_from(["headrace.generate", "headrace.generate_many", "celery.map"]) | ODD,
        "timelimit": LIMITS,
        "model": st.sampled_from(MODELS) | ODD,
        "compression": st.sampled_from(["zlib", "", None]) | ODD,
    }
)
MESSAGES = st.fixed_dictionaries(
    {
        "headers": HEADERS,
        "queue": st.sampled_from(MODELS).map(keys.queue),
        "address": QUEUES | ANY_TEXT | ODD,
        "encoding": st.sampled_from(["utf-8", "zlib_codec", "rot13", None]) | ODD,
        "followers": objects({"callbacks": ODD, "chord": ODD}),
    }
)


def check_options(case: dict[str, Any]) -> None:
    """A message passes or is refused with a short reason, and passes only if it names no other model."""
    headers = case["headers"] if isinstance(case["headers"], dict) else {}
    message = Message(
        body=json.dumps([[{"prompt": "x"}], {}, case["followers"]]).encode(),
        content_type="application/json",
        content_encoding=case["encoding"],
        delivery_info={"routing_key": case["queue"], ADDRESSED_TO: case["address"]},
        headers={"id": "x", "task": "headrace.generate", **headers},
        accept={"application/json"},
    )
    reason = reason_to_refuse(message, signed_only=False) or reason_to_refuse_options(message, limits=True)
    if reason is not None:
        assert isinstance(reason, str)
        assert 0 < len(reason) <= LONGEST_MESSAGE
    elif message.headers["task"] in (TASK_NAME, GROUP_TASK_NAME):
        model = keys.model_of(case["queue"])
        assert case["address"] not in [keys.queue(name) for name in MODELS if name != model]
        assert message.headers.get("model") in (None, model)


def check_queue(name: str) -> None:
    """A worker consumes exactly the queues of its models, and says in a short sentence why not another."""
    reason = why_not_served(name, MODELS)
    assert (reason is None) == (name in map(keys.queue, MODELS))
    assert reason is None or len(reason) <= LONGEST_MESSAGE


TARGETS = [
    Target("options", MESSAGES, check_options, 4_000),
    Target("queue", QUEUES | ANY_TEXT, check_queue, 1_000),
]

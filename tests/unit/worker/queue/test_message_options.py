"""What a message asks of Celery beside its jobs is honoured, or refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.message import Message

from headrace.client.wire.celery import GROUP_TASK_NAME, TASK_NAME
from headrace.client.wire.errors import JobFailed
from headrace.worker.queue.message_options import reason_to_refuse_options
from headrace.worker.queue.messages import ADDRESSED_TO, read_wire
from headrace.worker.queue.validation import forbid_compression, reason_to_refuse

NOTHING: dict[str, Any] = {"callbacks": None, "errbacks": [], "chain": None, "chord": None}


def message(
    task: str = TASK_NAME,
    embedded: Any = None,
    address: Any = "headrace.demo",
    encoding: Any = "utf-8",
    queue: str = "headrace.demo",
    **headers: Any,
) -> Message:
    """A message as the transport delivers it."""
    return Message(
        body=json.dumps([[{"prompt": "x"}], {}, NOTHING if embedded is None else embedded]).encode(),
        content_type="application/json",
        content_encoding=encoding,
        delivery_info={"routing_key": queue, ADDRESSED_TO: address},
        headers={"id": "x", "task": task, **headers},
        accept={"application/json"},
    )


def reason(found: Message, *, limits: bool = True) -> str | None:
    """Why a worker refuses the message."""
    return reason_to_refuse(found, signed_only=False) or reason_to_refuse_options(found, limits=limits)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"timelimit": [None, None]},
        {"timelimit": [0, 0]},
        {"timelimit": None},
        {"timelimit": [3.5, None]},
        {"embedded": {"callbacks": [{"task": "mine"}], "chain": [{"task": "mine"}]}},
        {"task": GROUP_TASK_NAME, "timelimit": [0, None]},
        {"task": GROUP_TASK_NAME, "embedded": {}},
        {"address": None},
        {"address": ["headrace.other"]},
        {"address": "jobs.fast"},
        {"address": "headrace:headrace.demo"},
        {"address": "headrace.demo\x06\x163"},
        {"model": "demo"},
        {"model": None},
        {"encoding": None},
        {"encoding": "UTF-8"},
        {"encoding": "us-ascii"},
        {"encoding": "binary"},
        {"compression": None},
        {"shadow": "a name", "retries": 3, "group": "g", "reply_to": "somebody"},
        {"task": "mine.task", "timelimit": [1, 1], "model": "other", "address": "headrace.other"},
    ],
    ids=str,
)
def test_what_asks_for_nothing_or_is_honoured_passes(asked: dict[str, Any]) -> None:
    assert reason(message(**asked)) is None


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"timelimit": [None, 2]}, "it has a soft_time_limit"),
        ({"timelimit": [9, 2]}, "it has a soft_time_limit"),
        ({"timelimit": [9, None], "task": GROUP_TASK_NAME}, "use expires_at"),
        ({"expires": 4_000_000_000}, "its expires is '4000000000'; expected a time in ISO 8601"),
        ({"expires": "soon"}, "its expires is 'soon'; expected a time in ISO 8601"),
        ({"timelimit": 7}, "its time limit is 7; expected"),
        ({"timelimit": ["x", "y", "z"]}, "its time limit is"),
        ({"timelimit": [True, None]}, "its time limit is"),
        ({"timelimit": [-1, None]}, "its time limit is"),
        ({"timelimit": [float("nan"), None]}, "its time limit is"),
        ({"timelimit": {"hard": 7}}, "its time limit is"),
        ({"task": GROUP_TASK_NAME, "embedded": {"callbacks": [{}]}}, "has link; only messages of one job"),
        ({"task": GROUP_TASK_NAME, "embedded": {"errbacks": [{}], "chain": [{}], "chord": {"a": 1}}}, "link_error, ch"),
        ({"address": "headrace.other"}, "addressed to the queue 'headrace.other' and was in 'headrace.demo'"),
        ({"address": "headrace:headrace.other"}, "addressed to the queue 'headrace.other'"),
        ({"address": "headrace.other\x06\x169"}, "addressed to the queue 'headrace.other'"),
        ({"model": "other"}, "its header 'model' names 'other'"),
        ({"model": ""}, "its header 'model' names ''"),
        ({"encoding": "zlib_codec"}, "content encoding is 'zlib_codec'; only utf-8"),
        ({"encoding": "utf-16"}, "content encoding is 'utf-16'"),
        ({"encoding": 7}, "content encoding is '7'"),
        ({"compression": "zlib"}, "its body is compressed (zlib); send it without `compression`"),
        ({"compression": "application/x-bz2"}, "its body is compressed"),
        ({"compression": "snappy"}, "its body is compressed (snappy)"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(asked: dict[str, Any], words: str) -> None:
    forbid_compression()
    assert words in str(reason(message(**asked)))


def test_time_limits_are_refused_where_the_pool_does_not_keep_them() -> None:
    assert "only for single jobs in headrace's own pool" in str(reason(message(timelimit=[9, None]), limits=False))


NAMES = st.sampled_from(["headrace.demo", "headrace.other", "headrace.a.b", "headrace.", "celery", "", "mine"])


@given(queue=st.sampled_from(["headrace.demo", "headrace.other"]), address=NAMES, model=NAMES | st.none())
def test_a_message_passes_only_if_nothing_in_it_names_another_model(queue: str, address: str, model: Any) -> None:
    named = {address} & {"headrace.demo", "headrace.other", "headrace.a.b"}
    passes = named <= {queue} and model in (None, queue.removeprefix("headrace."))
    assert (reason(message(queue=queue, address=address, model=model)) is None) == passes


def test_a_request_may_name_the_model_of_its_queue_and_no_other() -> None:
    for named in ("demo", None):
        assert read_wire({"prompt": "x", "model": named}, "demo").prompt == "x"
    with pytest.raises(JobFailed, match=r"model: got 'other' in the queue 'headrace\.demo'; the queue names"):
        read_wire({"prompt": "x", "model": "other"}, "demo")
    with pytest.raises(JobFailed, match=r"model: got .*demo.* in the queue"):
        read_wire({"prompt": "x", "model": ["demo"]}, "demo")

"""Whatever a caller passes, submitting returns a job or raises one of headrace's errors, with the name of the field."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import fractions
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.client import AsyncClient, Client, InvalidBatch, InvalidRequest
from headrace.client.batch.check import check
from headrace.client.batch.map import map_prompts
from headrace.client.batch.openai import completion_fields
from headrace.client.batch.rows import ItemReader
from headrace.client.batch.sources import open_source
from headrace.client.wire.foreign import FOREIGN
from headrace.client.wire.requests import PUBLIC_NAMES, GenerateRequest
from headrace.config import Settings
from tests.fuzz.values import JSON

NAMES = sorted(
    PUBLIC_NAMES | set(GenerateRequest.model_fields) | FOREIGN.keys() | {"max_completion_tokens", "maxtokens"}
)


class Broken:
    """Every conversion of it raises."""

    def _fail(self, *_: Any) -> Any:
        raise RuntimeError("broken")

    __index__ = __float__ = __int__ = __repr__ = __str__ = __eq__ = __bool__ = __iter__ = __len__ = _fail
    __hash__ = object.__hash__
    tolist = as_py = _fail


class Unhelpful:
    """It answers every attribute, and names no value."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(name)


class Strange(float):
    """A number with a repr that no terminal can print."""

    def __repr__(self) -> str:
        return "\ud83d" * 500


OBJECTS: list[Any] = [
    "~\0", "\0", "\ud83d", "a" * 70_000, "./demo", "/etc/passwd", "~root", "..", "", "-1", "NaN", "\u2028\u202e",
    b"bytes", bytearray(b"x"), memoryview(b"x"), 10**5000, -(10**5000), [10**5000], {5: 10**5000}, {10**5000: 1},
    math.nan, math.inf, -math.inf, -0.0, 1e308, True, [True], complex(1, 2), decimal.Decimal("64"),
    decimal.Decimal("NaN"), decimal.Decimal("sNaN"), fractions.Fraction(1, 3), datetime.datetime(2020, 1, 1), object(),
    object, len, Broken(), Unhelpful(), Strange(5), [Broken()], {"a": Broken()}, {Broken(): 1}, (Broken(),), {1, 2},
    frozenset({1}), range(3), iter([1]), pd.NA, pd.NaT, [pd.NA], pd.Series([1, 2]), pd.Series(["a"]), pd.Timestamp(0),
    pd.DataFrame({"a": [1]}), np.int64(5), np.float32("nan"), np.float64(64), np.uint8(3), np.str_("a"),
    np.bytes_(b"a"),
    np.bool_(True), np.datetime64("2020"), np.array([]), np.array([[1]]), np.array(5), np.ma.masked, [[1]], [[[]]],
    np.array(["a", None], dtype=object), [1.5], ["a", 1], {"a": {"b": []}}, {}, [], (), Ellipsis, NotImplemented,
]  # fmt: skip
VALUES = st.sampled_from(OBJECTS) | JSON | st.lists(st.sampled_from(OBJECTS), max_size=2)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client without a Redis: preparing a job sends nothing."""
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as made:
        yield made


def check_error(error: InvalidRequest, *names: str) -> None:
    text = str(error)
    text.encode()
    assert len(text) < 1_500
    field = re.sub(
        r"^(messages|chat_template_kwargs|structured_outputs)[\[.].*", r"\1", error.field
    )  # names the place in them
    assert any(field.endswith(name) for name in names), (error.field, names)
    assert error.expected


RUN = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=120)


@RUN
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3), VALUES | st.just("Hello."))
def test_a_request_of_hostile_values_is_a_job_or_an_error_with_the_field(
    client: Client, fields: dict[str, Any], prompt: Any
) -> None:
    given_fields = {"prompt": prompt, **fields}
    try:
        job = client.submitter.prepare(given_fields)
    except InvalidRequest as error:
        check_error(error, *given_fields, "min_tokens", "max_tokens", "prompt")
    else:
        json.dumps(job.wire).encode()
        assert job.model
    for wrapped in (lambda: client.submit_many([given_fields]), lambda: completion_fields(given_fields)):
        try:
            wrapped()
        except (InvalidRequest, OSError):  # no Redis answers
            continue


@pytest.mark.parametrize("value", OBJECTS, ids=lambda value: type(value).__name__)
def test_every_field_with_every_hostile_value(client: Client, value: Any) -> None:
    for name in NAMES:
        try:
            client.submitter.prepare({"prompt": "Hello.", name: value})
        except InvalidRequest as error:
            check_error(error, name, "min_tokens")


@pytest.mark.parametrize(
    "value", [10**5000, Broken(), "\ud83d", math.nan, np.array([1])], ids=lambda v: type(v).__name__
)
def test_other_arguments_of_hostile_values_are_refused_by_name(client: Client, value: Any) -> None:
    for call in (
        lambda: client.cancel([value]),
        lambda: client.job("a").result(timeout=value if not isinstance(value, int) else -value),
        lambda: next(client.map(["a"], max_inflight=value if not isinstance(value, int) else -value)),
    ):
        with pytest.raises(InvalidRequest, match=r"^(job|timeout|max_inflight): got") as caught:
            call()
        str(caught.value).encode()


@RUN
@given(st.lists(st.dictionaries(st.sampled_from([*NAMES, "custom_id", "body", "url", "method"]), VALUES, max_size=3)))
def test_rows_of_hostile_values_are_faults_of_their_lines(client: Client, rows: list[dict[str, Any]]) -> None:
    try:
        check(open_source(rows), ItemReader("demo", {}), client.submitter.prepare_together)
    except (InvalidBatch, InvalidRequest) as error:
        str(error).encode()
    for outcome in map_prompts(NoRedis(client), rows, {}, return_exceptions=True):
        assert isinstance(outcome, InvalidRequest)
        str(outcome).encode()


class NoRedis:
    """A client for `map` whose jobs are all refused at last, so that nothing is sent."""

    def __init__(self, client: Client) -> None:
        self.model_name, self.reader, self.submitter = client.model_name, client.reader, self
        self._prepare = client.submitter.prepare

    def prepare(self, fields: dict[str, Any]) -> Any:
        self._prepare(fields)
        raise InvalidRequest("prompt", "a job", "nothing")


@pytest.mark.parametrize("value", [5, None, 1.5, True])
def test_what_is_no_job_cannot_be_cancelled(value: Any) -> None:
    with Client(redis_url="redis://localhost:1/0") as client:
        for given in (value, [value]):
            with pytest.raises(InvalidRequest, match=rf"^job: got {value}; expected a job, or its id"):
                client.cancel(given)


@pytest.mark.parametrize("jobs", [None, 5, ["an-id"], "an-id", [None]], ids=str)
def test_only_jobs_can_be_waited_for_together(jobs: Any) -> None:
    async def each(call: str) -> None:
        async with AsyncClient(redis_url="redis://localhost:1/0") as client:
            async for _ in getattr(client, call)(jobs):
                pass

    with Client(redis_url="redis://localhost:1/0") as client, pytest.raises(InvalidRequest, match=r"^jobs: got "):
        list(client.as_completed(jobs))
    for call in ("as_completed", "streams"):
        with pytest.raises(InvalidRequest, match=r"^jobs: got "):
            asyncio.run(each(call))

"""Signatures: what they cover, and that malformed input is invalid and never an error."""

from __future__ import annotations

import datetime
import hmac
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client import Client, InvalidRequest
from headrace.client.wire.requests import parse_request
from headrace.client.wire.signing import sign, unsigned, verified
from headrace.config import load_settings

KEY, OLD = b"a key of this many characters or more", b"the key that was used until last week"
WIRE = {"schema_version": 1, "prompt": "Hello.", "max_tokens": 5}


def test_the_signature_is_the_hmac_of_a_text_written_out_by_hand() -> None:
    text = '["headrace job 1","job-1","demo",{"max_tokens":5,"prompt":"Gr\\u00fc\\u00dfe","schema_version":1}]'
    wire = {"schema_version": 1, "prompt": "Grüße", "max_tokens": 5}
    assert sign(KEY, "job-1", "demo", wire)["signature"] == hmac.digest(KEY, text.encode(), "sha256").hex()


def test_a_signature_covers_request_job_and_queue() -> None:
    signed = sign(KEY, "job-1", "demo", WIRE)
    assert unsigned(signed) == WIRE
    assert verified([KEY], "job-1", "demo", signed)
    assert verified([KEY], "job-1", "demo", dict(reversed(signed.items()))), "the order of names is no difference"
    assert not verified([KEY], "job-2", "demo", signed)
    assert not verified([KEY], "job-1", "gpt2", signed)
    assert not verified([OLD], "job-1", "demo", signed)
    assert not verified([], "job-1", "demo", signed)
    for change in ({"max_tokens": 6}, {"max_tokens": 5.0}, {"prompt": "hello."}, {"schema_version": 2}, {"n": 1}):
        assert not verified([KEY], "job-1", "demo", {**signed, **change}), change
    assert not verified([KEY], "job-1", "demo", {n: v for n, v in signed.items() if n != "max_tokens"})


def test_text_cannot_be_moved_from_one_signed_field_to_another() -> None:
    assert not verified([KEY], "a", '","b', sign(KEY, 'a","', "b", WIRE))
    assert not verified([KEY], "ab", "c", sign(KEY, "a", "bc", WIRE))


def test_old_and_new_keys_are_accepted_during_rotation() -> None:
    assert verified([KEY, OLD], "job-1", "demo", sign(OLD, "job-1", "demo", WIRE))
    assert verified([KEY, OLD], "job-1", "demo", sign(KEY, "job-1", "demo", WIRE))
    assert not verified([KEY, OLD], "job-1", "demo", sign(KEY[1:], "job-1", "demo", WIRE))


def nest(depth: int) -> list[Any]:
    deep: list[Any] = []
    for _ in range(depth):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    "wire",
    [
        None,
        [],
        "text",
        {},
        WIRE,
        {**WIRE, "signature": None},
        {**WIRE, "signature": ""},
        {**WIRE, "signature": "ä" * 64},
        {**WIRE, "signature": b"0" * 64},
        {**WIRE, "signature": ["0" * 64]},
        {"prompt": float("nan"), "signature": "0" * 64},
        {"prompt": datetime.datetime(2026, 1, 1), "signature": "0" * 64},
        {1: "x", "prompt": "mixed names", "signature": "0" * 64},
        {"prompt": nest(100_000), "signature": "0" * 64},
        {"prompt": "\ud800", "signature": "0" * 64},
    ],
)
def test_malformed_signatures_are_invalid_without_an_exception(wire: Any) -> None:
    assert verified([KEY], "job-1", "demo", wire) is False


REQUESTS = st.fixed_dictionaries(
    {"prompt": st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.integers(0, 50256), min_size=1)},
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "logit_bias": st.dictionaries(st.integers(0, 50256), st.floats(-100, 100), max_size=5),
        "stop": st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), max_size=3),
        "expires_at": st.floats(0, 1e11),
    },
)


@given(REQUESTS)
def test_the_signature_survives_json_encoding(fields: dict[str, Any]) -> None:
    wire = sign(KEY, "job-1", "demo", parse_request(fields).to_wire())
    assert verified([KEY], "job-1", "demo", json.loads(json.dumps(wire)))


def test_only_a_signature_is_added_and_only_with_a_key() -> None:
    plain = load_settings(redis_url="redis://localhost:1/0")
    with Client(settings=plain) as without, Client(settings=plain.model_copy(update={"signing_key": None})) as none:
        wires = [c.submitter.prepare({"prompt": "Hello.", "seed": 1}).wire for c in (without, none)]
    assert wires == [{"schema_version": 1, "prompt": "Hello.", "seed": 1}] * 2
    with Client(settings=load_settings(redis_url="redis://localhost:1/0", signing_key="k" * 32)) as signing:
        prepared = signing.submitter.prepare({"prompt": "Hello.", "seed": 1, "id": "mine"})
    assert unsigned(prepared.wire) == wires[0]
    assert verified([b"k" * 32], "mine", "demo", prepared.wire)


def test_a_signature_is_not_a_parameter() -> None:
    with (
        Client(redis_url="redis://localhost:1/0") as client,
        pytest.raises(InvalidRequest, match="signature: got 'x'; expected"),
    ):
        client.submitter.prepare({"prompt": "Hello.", "signature": "x"})

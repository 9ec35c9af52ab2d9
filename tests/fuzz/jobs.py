"""Fuzz targets: messages on the queue, requests, and result records from untrusted writers."""

from __future__ import annotations

import functools
import json
import time
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from headrace.client.wire.errors import InvalidRequest, JobError, JobFailed
from headrace.client.wire.foreign import FOREIGN
from headrace.client.wire.requests import GenerateRequest, is_job_id, parse_request
from headrace.client.wire.results import Result, outcome_state, parse_outcome
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.grammars import Grammars
from headrace.worker.queue.messages import read_group, read_wire
from tests.checkpoints.test_properties import VOCABULARY
from tests.checkpoints.test_properties import engine as small_engine
from tests.fuzz.forms import FORMS, byte_tokenizer
from tests.fuzz.harness import Target, check_message
from tests.fuzz.values import ANY_TEXT, GIANT, JSON, NUMBERS, nested, objects
from tests.patience import PATIENCE_S

FIELDS = tuple(GenerateRequest.model_fields)
IDS = st.integers(0, VOCABULARY - 1)
#: Field -> valid values, including the limits of its range; small where large values would take long.
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "schema_version": st.just(1),
    "prompt": st.lists(IDS, min_size=1, max_size=9) | st.text(max_size=9) | GIANT.filter(lambda v: isinstance(v, str)),
    "max_tokens": st.integers(0, 4),
    "temperature": st.sampled_from([0, 1e-7, 1e-6, 0.5, 1, 2.0]),
    "top_p": st.sampled_from([1e-300, 0.5, 1]),
    "top_k": st.sampled_from([-1, 0, 1, 511, 512, 513, 2**31, 2**63, 10**30]),
    "min_p": st.sampled_from([0, 1e-300, 1.0]),
    "n": st.sampled_from([1, 2, 3]),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3) | st.text(min_size=1, max_size=3),
    "seed": st.sampled_from([0, 5, -1, -(2**63), 2**63 - 1]),
    "logprobs": st.sampled_from([None, 0, 1, 20]),
    "logit_bias": st.dictionaries(IDS | IDS.map(str), st.sampled_from([-100, 0.5, 100]), max_size=3)
    | st.sampled_from([{str(10**k): 1} for k in (3, 12, 400, 4_000)]),
    "presence_penalty": st.sampled_from([-2, 0, 2.0]),
    "frequency_penalty": st.sampled_from([-2, 0, 2.0]),
    "repetition_penalty": st.sampled_from([0.01, 1, 100]),
    "echo": st.booleans(),
    "min_tokens": st.integers(0, 2),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(IDS | st.sampled_from([2**31 - 1, 2**63, 10**400]), max_size=2),
    "priority": st.sampled_from(["interactive", "normal", "bulk"]),
    "adapter": st.sampled_from([None, "pirate", "poet", "a" * 128, "", "..", "../pirate", "pirate\n", "a/b", "\0"]),
    "expires_at": st.sampled_from([None, 0, 1e9, 9e10]),
    "structured_outputs": FORMS,
    "allowed_token_ids": st.lists(IDS | st.sampled_from([2**31 - 1, 2**31, 10**400]), min_size=1, max_size=3),
    "bad_words": st.lists(st.sampled_from(["a", " b", "ab", "é", "\0", " "]) | ANY_TEXT, max_size=3),
    "prompt_logprobs": st.sampled_from([None, 0, 1, 20]),
    "checkpoints": st.just("all") | st.lists(st.integers(0, 12), max_size=3),
}
WIRES = objects(GOOD, needed=("prompt",)) | JSON

#: The error codes that an untrusted message may cause; `internal_error` would be a bug.
CODES = {
    *("invalid_request", "unsupported_version", "context_length_exceeded", "invalid_token_id", "nan_logits"),
    *("adapter_not_found", "grammar_too_complex", "no_token_allowed", "empty_prompt"),
}


@functools.cache
def _engine() -> Engine:
    """A small random model with a token for each byte."""
    engine = small_engine(slots=4)
    engine.tokenizer = byte_tokenizer()
    engine.grammars = Grammars(engine.tokenizer, VOCABULARY)
    return engine


def check_wire(wire: Any) -> None:
    """A message, computed by a real engine, becomes a result that the client can read, or a failure with a code."""
    try:
        request = read_wire(wire)
    except JobFailed as error:
        assert error.code in CODES
        check_message(str(error), *FIELDS, "message", *_names(wire))
        return
    engine = _engine()
    future = engine.submit(request, job_id="a")
    deadline = time.monotonic() + PATIENCE_S
    while engine.step() or not future.done():  # a grammar or an adapter is prepared in a thread
        wait([future], 0.0 if engine.running_sequences() else 0.01)
        assert time.monotonic() < deadline
    error = future.exception(timeout=0)
    if error is None:
        record = json.dumps({"status": "SUCCESS", "result": future.result().model_dump(mode="json")})
        assert isinstance(parse_outcome(record), Result)
    elif isinstance(error, JobFailed):
        assert error.code in CODES, repr(error)
        check_message(str(error), *FIELDS)
    else:
        assert isinstance(error, JobError), repr(error)


def _names(value: Any) -> list[str]:
    """Words that an error about an unknown key of an object contains."""
    return ["parameter", "one of"] if isinstance(value, dict) else []


def check_group(group: Any) -> None:
    """From a message with several jobs, exactly the jobs with a valid id are read, each once."""
    jobs = read_group(group)
    members = group if isinstance(group, list) else [group]
    named = {m["id"] for m in members if isinstance(m, dict) and is_job_id(m.get("id"))}
    assert set(jobs) == named
    for wire in jobs.values():
        try:
            read_wire(wire)
        except JobFailed as error:
            check_message(str(error), *FIELDS, "message", "parameter", "one of")


@dataclass(frozen=True)
class Deep:
    """A value nested deeper than JSON allows, as Python callers may pass it. Built late: it has no repr."""

    field: str
    depth: int


def check_request(fields: dict[Any, Any] | Deep) -> None:
    """A refused request is an error with field, value and expected values; an accepted one survives the wire format."""
    if isinstance(fields, Deep):
        fields = {"prompt": "x", fields.field: nested(fields.depth, 1, None)}
    try:
        request = parse_request(fields)
    except InvalidRequest as error:
        check_message(str(error), error.field)
        assert error.expected
        assert len(error.value) <= 120, error.value[:200]
        assert error.field in FIELDS or error.field not in fields or "no such" in str(error) or "one of" in str(error)
        return
    assert parse_request(json.loads(json.dumps(request.to_wire()))) == request


RESULT: dict[str, Any] = {
    "id": "a",
    "model": "demo",
    "seed": 1,
    "schema_version": 1,
    "fingerprint": "x",
    "choices": [{"index": 0, "text": "x", "token_ids": [87], "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    "timings": {"waiting_s": 0, "prefill_s": 0, "decode_s": 0},
}
RESULTS = objects({name: st.just(value) for name, value in RESULT.items()}, needed=tuple(RESULT)) | objects(
    {name: st.just(value) | JSON for name, value in RESULT.items()}
)
FAILURES = objects(
    {
        "exc_type": st.sampled_from(["JobFailed", "JobCancelled", "JobExpired", "TimeLimitExceeded", "ValueError"])
        | JSON,
        "exc_message": st.tuples(JSON, JSON, JSON).map(list) | st.lists(ANY_TEXT, min_size=3, max_size=3) | JSON,
        "exc_module": ANY_TEXT,
    }
)
STATUSES = st.sampled_from(["SUCCESS", "FAILURE", "REVOKED", "PENDING", "STARTED", "RETRY"])
RECORDS = st.one_of(
    objects(
        {"status": STATUSES, "result": RESULTS | FAILURES, "task_id": st.just("a")}, needed=("status", "result")
    ).map(json.dumps),
    JSON.map(json.dumps),
    st.builds(lambda depth: "[" * depth, st.sampled_from([5, 1_000, 100_000])),
    st.builds(
        lambda depth, status: f'{{"status": "{status}", "result": {{"exc_type": {"[" * depth}{"]" * depth}}}}}',
        st.sampled_from([5, 1_000, 100_000]),
        STATUSES,
    ),
    st.just('{"status": "SUCCESS", "result": ' + "9" * 5_000 + "}"),
    ANY_TEXT,
)


def check_record(record: str) -> None:
    """A result record is parsed as unfinished, as a result with readable text, or as an error that can be printed."""
    outcome = parse_outcome(record)
    if outcome is None:
        return
    assert outcome_state(outcome) in ("succeeded", "failed", "cancelled", "expired")
    if isinstance(outcome, Result):
        assert isinstance(outcome.text, str)
        outcome.model_dump_json()
        return
    check_message(str(outcome), outcome.code)
    assert all(isinstance(text, str) for text in outcome.partial)
    repr(outcome)


TARGETS = [
    Target("job", WIRES, check_wire, full_cases=22_000, test_cases=60),
    Target(
        "group",
        st.lists(objects({"id": st.sampled_from(["a", "b", "a b", ""]) | JSON, "request": WIRES}) | JSON, max_size=4)
        | JSON,
        check_group,
        full_cases=10_000,
    ),
    Target(
        "request",
        objects(GOOD, needed=("prompt",))
        | st.dictionaries(ANY_TEXT | NUMBERS | st.sampled_from(FIELDS), JSON, max_size=3)
        | st.dictionaries(st.sampled_from(sorted(FOREIGN)), JSON, max_size=3).map(lambda more: {"prompt": "x", **more})
        | st.builds(Deep, st.sampled_from(FIELDS), st.sampled_from([900, 2_000, 50_000])),
        check_request,
        full_cases=16_000,
        test_cases=50,
    ),
    Target("record", RECORDS, check_record, full_cases=14_000),
]

"""The jobs of `Client.tokenize` and `Client.detokenize`: small ones, which a worker answers without a slot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.client.jobs.prepared import PreparedJob
from headrace.client.jobs.submission import Submitter
from headrace.client.wire.errors import InvalidRequest, JobFailed
from headrace.client.wire.results import Result, Tokenized
from headrace.client.wire.values import is_missing, to_python

#: Seconds to wait for an answer.
TIMEOUT_S = 60.0
#: Their place in the queue: before all jobs for text.
_PRIORITY = "interactive"


def tokenize_job(submitter: Submitter, fields: Mapping[str, Any], timeout: float | None) -> PreparedJob:
    """The job that asks for the token ids of a prompt or of messages. Raises InvalidRequest."""
    return submitter.prepare({**fields, "priority": _PRIORITY, "timeout_s": timeout}, operation="tokenize")


def detokenize_job(
    submitter: Submitter, token_ids: Any, fields: Mapping[str, Any], timeout: float | None
) -> PreparedJob:
    """The job that asks for the text of token ids. Raises InvalidRequest."""
    ids = to_python(token_ids)
    ids = list(ids) if isinstance(ids, tuple) else ids
    if not isinstance(ids, list) or is_missing(ids):
        raise InvalidRequest("token_ids", f"a value of type {type(token_ids).__name__}", "a list of token ids")
    try:
        given = {**fields, "prompt": ids, "priority": _PRIORITY, "timeout_s": timeout}
        return submitter.prepare(given, operation="detokenize")
    except InvalidRequest as error:
        name = "token_ids" if error.field == "prompt" else error.field
        raise InvalidRequest(name, error.value, error.expected) from None


def tokenized(result: Result) -> Tokenized:
    """The tokens in the result of a job that asked for them. Raises JobFailed if a worker sent none."""
    if result.tokenized is None:
        raise JobFailed("unreadable_result", "the worker's answer has no tokens")
    return result.tokenized

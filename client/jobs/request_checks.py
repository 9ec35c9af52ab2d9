"""Checks of a request beyond its fields, before it is submitted: the size of its result, and its grammar."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from headrace.client.wire.constraints import FIELD
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.grammar_text import grammar_text, limits, panics_as_errors, reason_of
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.result_size import check_result_size
from headrace.client.wire.values import show
from headrace.extras import how_to_install

_WHAT = {
    "regex": "a regular expression in the syntax of Rust's crate regex",
    "json": "a JSON schema that llguidance reads",
    "grammar": "a grammar in the syntax of Lark",
}


def check_request(request: GenerateRequest, max_result_bytes: int) -> None:
    """Check what does not need the model.

    Raises:
        InvalidRequest: the result can become too large, or the form of the text cannot be read; or the library that
            reads forms is missing.
    """
    check_result_size(request, max_result_bytes)
    if request.structured_outputs is not None:
        _check_form(request.structured_outputs)


def _check_form(form: Mapping[str, Any]) -> None:
    ((kind, value),) = form.items()
    if kind not in _WHAT:
        return  # choices need no reader
    if reason := _reason(json.dumps(form)):
        raise InvalidRequest(f"{FIELD}.{kind}", show(value), f"{_WHAT[kind]}: {reason}")


@functools.lru_cache(maxsize=128)
def _reason(form: str) -> str:
    """Why a form, in JSON, cannot be read; empty if it can."""
    if find_spec("llguidance") is None:
        return f"it is read by llguidance, which is not installed here; {how_to_install('structured')}"
    from llguidance import LLMatcher

    try:
        with panics_as_errors():
            error = LLMatcher.validate_grammar(grammar_text(json.loads(form)), None, limits=limits())
    except ValueError as wrong:
        error = str(wrong)
    return reason_of(error) if error else ""

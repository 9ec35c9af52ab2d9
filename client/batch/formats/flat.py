"""Flat rows: one for each request, with its text, finish reason and token counts, and the columns of the input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from headrace.client.batch.endpoints import ENDPOINTS
from headrace.client.batch.items import BatchItem
from headrace.client.batch.openai import failure_code, request_error
from headrace.client.wire.results import Outcome, Result

CUSTOM_ID, ERROR, DIGEST = "custom_id", "error", "digest"
#: The columns before those of the input, and their types in Arrow.
FIRST = {
    CUSTOM_ID: "string",
    "text": "string",
    "finish_reason": "string",
    "stop_reason": "string",
    "complete": "bool",
    "prompt_tokens": "int64",
    "completion_tokens": "int64",
    ERROR: "string",
}
#: The columns after those of the input: by its digest, a resumed batch knows a request.
LAST = {DIGEST: "string"}


def flat_names(passed: Iterable[str]) -> dict[str, str]:
    """Columns of the input -> their names in flat rows: `input_text` for a column `text`, which flat rows have."""
    names: dict[str, str] = {}
    given = list(passed)
    taken = {*FIRST, *LAST, *given}
    for name in given:
        new = name
        while new in FIRST or new in LAST or (new != name and new in taken):
            new = f"input_{new}"
        names[name] = new
        taken.add(new)
    return names


def flat_row(row: BatchItem | None, outcome: Outcome | Exception | None, names: Mapping[str, str]) -> dict[str, Any]:
    """The row of a request; without one, a row of nulls.

    Args:
        row: the request.
        outcome: its result, or why it has none.
        names: columns of the input that the row has -> their names in it.
    """
    columns = {} if row is None else row.columns
    return {
        **dict.fromkeys(FIRST),
        **({} if row is None or outcome is None else own_fields(row, outcome)),
        **{new: columns.get(name) for name, new in names.items()},
        DIGEST: None if row is None else row.digest,
    }


def own_fields(row: BatchItem, outcome: Outcome | Exception) -> dict[str, Any]:
    """The fields of a row, without the columns of the input, that are not null."""
    if isinstance(outcome, Result):
        choice = outcome.choices[0]
        return {
            CUSTOM_ID: row.custom_id,
            "text": outcome.text,
            "finish_reason": choice.finish_reason,
            "stop_reason": None if choice.stop_reason is None else str(choice.stop_reason),
            "complete": choice.complete,
            "prompt_tokens": outcome.usage.prompt_tokens,
            "completion_tokens": outcome.usage.completion_tokens,
        }
    mistake = request_error(outcome, ENDPOINTS[row.endpoint].names)
    message = mistake["error"]["message"] if mistake else getattr(outcome, "message", None) or str(outcome)
    return {CUSTOM_ID: row.custom_id, ERROR: f"{failure_code(outcome)}: {message}"}


def why_not_flat(row: BatchItem) -> str | None:
    """The field of a request that asks for more than a flat row has: further texts, or log probabilities."""
    if row.prompts is not None and len(row.prompts) > 1:
        return "prompt"
    fields = row.fields
    if fields.get("n", 1) != 1:
        return "n"
    scored = ("logprobs", "prompt_logprobs", "continuation")
    return next((name for name in scored if fields.get(name) is not None), None)

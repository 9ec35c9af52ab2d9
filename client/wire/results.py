"""Results: the record that a worker stores when a job ends, and the events that it streams before.

Celery's result backend stores one record for each job; `parse_outcome` reads it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Literal, TypeGuard, get_args

from pydantic import BaseModel, ConfigDict, Field

from headrace.client.wire.errors import JobCancelled, JobError, JobExpired, JobFailed, ResultNotKept
from headrace.client.wire.unicode import parse_json
from headrace.client.wire.version import SCHEMA_VERSION

#: The message of a job that was cancelled before it started.
CANCELLED_EARLY = "the job was cancelled before it started"

State = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
STATES: tuple[State, ...] = get_args(State)
#: Characters of a time that anybody may have written.
MAX_TIME = 40


class TopLogprob(BaseModel):
    """One of the most probable tokens at this position."""

    token_id: int
    #: The name of the token: its text, or `bytes:\xe2\x80` if its bytes are not whole characters.
    token: str
    logprob: float


class TokenLogprob(BaseModel):
    """A token with its log probability (base e) under the model: before penalties, temperature, top_k and top_p."""

    token_id: int
    #: The name of the token: its text, or `bytes:\xe2\x80` if its bytes are not whole characters.
    token: str
    #: None for the first token of an echoed prompt, which has no context.
    logprob: float | None
    top: list[TopLogprob] = []
    #: The place of the token among all tokens by probability, from 1; for tokens of a prompt or a continuation.
    rank: int | None = Field(None, exclude_if=lambda value: value is None)
    #: The character of the choice's text where the token begins. A token that begins inside a character begins where
    #: that character does, and one whose text was left out at the end of the text. None in records of older workers.
    text_offset: int | None = None


class Choice(BaseModel):
    """One sample. With `echo`, text, token_ids and logprobs include the prompt. With `continuation`, they are its own.

    Prompt and output are decoded together. A character that begins in a prompt of token ids and ends in the output
    belongs to the output.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    #: The stop string or stop token id that ended the sample; None for the ends that the model's
    #: files name, and for max_tokens.
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    #: With `structured_outputs`: whether the text, as far as it goes, has the form that was asked for. False if
    #: max_tokens or a stop token ended it before that, or a stop string ended it. None without the field.
    complete: bool | None = Field(None, exclude_if=lambda value: value is None)


class PromptTokensDetails(BaseModel):
    """What of the prompt was not computed for this job."""

    #: Tokens whose keys and values were reused from another prompt, which was running or had ended.
    cached_tokens: int


class Usage(BaseModel):
    """Numbers of tokens, of all samples together. A stop token counts as a completion token."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    #: None if nothing was reused. It depends on what else the worker has computed, as times do; results do not.
    prompt_tokens_details: PromptTokensDetails | None = Field(None, exclude_if=lambda value: value is None)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were reused from another prompt."""
        return 0 if self.prompt_tokens_details is None else self.prompt_tokens_details.cached_tokens

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> Usage:
        """The numbers with their total."""
        details = PromptTokensDetails(cached_tokens=cached_tokens) if cached_tokens else None
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=details,
        )

    @classmethod
    def total(cls, usages: Iterable[Usage]) -> Usage:
        """The sums over several jobs."""
        prompt, completion, cached = 0, 0, 0
        for usage in usages:
            prompt += usage.prompt_tokens
            completion += usage.completion_tokens
            cached += usage.cached_tokens
        return cls.of(prompt, completion, cached)

    def as_openai(self) -> dict[str, Any]:
        """OpenAI's usage object, which always says how many tokens were reused."""
        return {**self.model_dump(), "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}


class Timings(BaseModel):
    """Seconds in the worker: waiting for a slot, from the slot to the first token, from the first token to the end."""

    waiting_s: float
    prefill_s: float
    decode_s: float


class Tokenized(BaseModel):
    """The tokens of a text."""

    tokens: list[int]
    #: The name of each token: its text, or `bytes:\xe2\x80` if its bytes are not whole characters.
    token_strs: list[str]
    count: int
    #: How many tokens the model reads and writes together.
    max_model_len: int


class Result(BaseModel):
    """The result of a job that succeeded."""

    model_config = ConfigDict(extra="ignore")  # a newer worker may send more fields

    schema_version: int = SCHEMA_VERSION
    id: str
    model: str
    #: The LoRA adapter that the request named; None for the model as it is.
    adapter: str | None = Field(None, exclude_if=lambda value: value is None)
    choices: list[Choice]
    usage: Usage
    seed: int
    timings: Timings
    #: Identifies software, hardware and weights. Workers with equal fingerprints give equal results.
    fingerprint: str = ""
    #: The parameters that the request did not set and that the model's generation_config.json decided. Empty unless
    #: the worker has HEADRACE_GENERATION_CONFIG=auto.
    defaults: dict[str, int | float] = {}
    #: With `prompt_logprobs`: of each token of the prompt.
    prompt_logprobs: list[TokenLogprob] | None = Field(None, exclude_if=lambda value: value is None)
    #: The answer to `Client.tokenize`.
    tokenized: Tokenized | None = Field(None, exclude_if=lambda value: value is None)

    @property
    def openai_model(self) -> str:
        """What the OpenAI API calls the model: the adapter if there is one."""
        return self.adapter or self.model

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


class StreamPiece(BaseModel):
    """New tokens and text of one sample: tokens from index `at` of the choice, text from character `text_at`.

    A job that is computed again writes the same positions again, perhaps in other pieces. Readers compare positions.
    """

    index: int = Field(0, ge=0)
    at: int = Field(0, ge=0)
    text_at: int = Field(0, ge=0)
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    #: In the last piece of a sample: as in its choice.
    complete: bool | None = None
    #: Number of tokens of the prompt; None from workers of earlier versions.
    prompt_tokens: int | None = None


class StreamEvent(BaseModel):
    """An entry of a job's event stream. `end` means that the result record has been written."""

    pieces: list[StreamPiece] = []
    end: bool = False


_ERRORS: dict[str, type[JobError]] = {cls.__name__: cls for cls in (JobFailed, JobCancelled, JobExpired)}
_STATES: dict[type[JobError], State] = {
    JobFailed: "failed",
    JobCancelled: "cancelled",
    JobExpired: "expired",
    ResultNotKept: "succeeded",
}

#: How a job ended.
Outcome = Result | JobError

#: Maximum length of an error code and of a message. Those of headrace workers are shorter.
MAX_CODE, MAX_MESSAGE = 64, 1_000


def parse_outcome(record: str | None) -> Outcome | None:
    """The outcome of a job from its result record; None if the job has not ended.

    A record that cannot be read becomes a JobFailed with the code `unreadable_result`: the job has ended.
    """
    if record is None:
        return None
    try:
        meta = parse_json(record)
        status, value = meta["status"], meta["result"]
        if status == "SUCCESS" and value is None:
            return ResultNotKept()
        if status == "SUCCESS":
            # Choice by choice: one call for all of a large result would hold up every other thread.
            value["choices"] = [Choice.model_validate(choice) for choice in value["choices"]]
            result = Result.model_validate(value)
            if not result.choices:
                raise ValueError("a result without choices")
            return result
        if status == "REVOKED" and isinstance(value, dict) and value.get("exc_message") in _EXPIRED:
            return JobCancelled(message="the time in `expires` of its Celery message passed before it was computed")
        if status == "REVOKED":
            return JobCancelled(message="the job was revoked through Celery")
        return _failure(value) if status == "FAILURE" else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return JobFailed("unreadable_result", f"the result record cannot be read ({type(error).__name__})")


def has_ended(record: str | None) -> bool:
    """Whether a job with this result record has ended: `parse_outcome` without its objects, which take much memory."""
    if record is None:
        return False
    try:
        meta = parse_json(record)
        return meta["status"] in ("SUCCESS", "REVOKED", "FAILURE") or "result" not in meta
    except (ValueError, KeyError, TypeError, RecursionError):
        return True


def cancelled_record(job_id: str) -> str:
    """The result record of a job that was cancelled before it started, as Celery's backend stores it."""
    error = JobCancelled(message=CANCELLED_EARLY)
    raised = {"exc_type": "JobCancelled", "exc_message": error.args, "exc_module": type(error).__module__}
    ended: dict[str, Any] = {
        "traceback": None,
        "children": None,
        "date_done": datetime.now(UTC).isoformat(),
        "task_id": job_id,
    }
    return json.dumps({"status": "FAILURE", "result": raised, **ended})


def ended_state(state: State, at: float) -> str:
    """The `state` of the record of a job that ended at this Unix time: lists show it, and do not read results."""
    return f"{state} {at:.3f}"


def parse_state(text: str | None) -> tuple[State | None, float | None]:
    """The state in a job's record, and when it ended; None for the record of another program, or if there is none."""
    said, _, at = (text or "").partition(" ")
    state = next((state for state in STATES if state == said), None)
    if not at:
        return (state, None) if state in ("queued", "running") else (None, None)
    with contextlib.suppress(ValueError):
        return state, float(at[:MAX_TIME])
    return None, None


def record_state(record: str) -> State:
    """The state of an ended job from its result record, or from the first RECORD_START characters of a success."""
    if record.startswith(_SUCCESS):
        return "succeeded"
    outcome = parse_outcome(record)
    return "failed" if outcome is None else outcome_state(outcome)


#: How the record of a job that succeeded begins, as Celery writes it.
_SUCCESS = '{"status": "SUCCESS"'
RECORD_START = len(_SUCCESS)
#: What Celery stores with a revoked task whose message has expired.
_EXPIRED = (["expired"], "expired")


def outcome_state(outcome: Outcome) -> State:
    """The state of a job with this outcome."""
    return "succeeded" if isinstance(outcome, Result) else _STATES[type(outcome)]


def _failure(value: dict[str, Any]) -> JobError:
    name, arguments = value["exc_type"], value["exc_message"]
    if name in _ERRORS and isinstance(arguments, list) and len(arguments) == 3:
        code, message, partial = arguments
        if not isinstance(code, str) or not isinstance(message, str) or not _are_texts(partial):
            raise TypeError("not the arguments of a JobError")
        return _ERRORS[name](_shortened(code, MAX_CODE), _shortened(message, MAX_MESSAGE), partial)
    if name == "TimeLimitExceeded":
        return JobExpired(message="Celery's time limit for the task passed")
    # Another exception, as Celery stored it: its arguments can be any JSON.
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return JobFailed("worker_error", f"{_shortened(str(name), MAX_CODE)}: {_shortened(text, MAX_MESSAGE)}")


def _are_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _shortened(text: str, limit: int) -> str:
    """Text from a record, shortened and made safe for terminals and logs."""
    text = text.encode(errors="replace").decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."

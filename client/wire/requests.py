"""Requests: their fields, defaults and limits, and the errors for wrong ones.

On the wire a request is JSON. A request with a field that is not listed here is refused.
"""

from __future__ import annotations

import difflib
import math
import operator
import reprlib
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from headrace.client.wire.activations import CHECKPOINT_TENSORS
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.version import SCHEMA_VERSION, is_readable

MAX_PROMPT_BYTES = 65_536  # GPT-2 reads 1,024 tokens: about 5 kB of English
MAX_PROMPT_TOKENS = 16_384
MAX_STOP_BYTES = 1_024
MAX_LOGPROBS = 20
MAX_BIASES = 1_024
#: Upper bound of token ids, whatever the vocabulary.
TOKEN_IDS = 2**31
#: Longer field names are shortened in error messages.
MAX_NAME = 64
#: Maximum number of log probabilities in one result, n x tokens x (1 + logprobs): without it, one job could take
#: gigabytes.
MAX_SCORES = 2**19

_JOB_ID = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-:")

Priority = Literal["interactive", "normal", "bulk"]

#: Names of parameters in other libraries -> the name in headrace, for advice in error messages.
_ALIASES = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "eos_token_id": "stop_token_ids",
    "inputs": "prompt",
    "text": "prompt",
    "details": "logprobs",
    "timeout": "timeout_s",
}
_ADVICE = {
    "do_sample": "temperature=0 is greedy, anything above samples",
    "best_of": "all n samples are returned; choose among them by their logprobs",
    "suffix": "GPT-2 can only continue the prompt",
}


def _to_python(value: Any) -> Any:
    """Convert numbers and arrays of numpy, torch and pandas to plain Python values."""
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):
        return value.tolist()
    return value


def _to_int(value: Any) -> Any:
    value = _to_python(value)
    if isinstance(value, (bool, float)):
        return value  # the strict int field refuses both
    try:
        return operator.index(value)
    except TypeError:
        return value


def _string_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else _to_python(value)


def _bias_map(value: Any) -> Any:
    """JSON has no integer keys, so '50256' means 50256."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:  # checked here: pydantic would keep a kilobyte for each wrong entry
        raise ValueError("size")
    return {int(k) if isinstance(k, str) and k.isascii() and k.isdecimal() else _to_int(k): v for k, v in value.items()}


def _checkpoint_list(value: Any) -> Any:
    return sorted(CHECKPOINT_TENSORS) if isinstance(value, str) and value == "all" else _to_python(value)


def _prompt(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    value = _to_python(value)
    if isinstance(value, list) and len(value) > MAX_PROMPT_TOKENS:  # see `_bias_map`
        raise InvalidRequest("prompt", f"a list of {len(value)} token ids", _expected("prompt"))
    if isinstance(value, list) and set(map(type, value)) == {
        int
    }:  # as most are; pydantic would call a function for each
        return value
    return check(value)


Int = Annotated[int, BeforeValidator(_to_int)]
Float = Annotated[float, BeforeValidator(_to_python)]


class SamplingParams(BaseModel):
    """Sampling parameters. Names, defaults and ranges are those of the OpenAI completions API and of vLLM."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    max_tokens: Int = Field(16, ge=0, le=1_000_000, description="a whole number of at least 1 (0 only with echo)")
    temperature: Float = Field(1.0, ge=0, le=2, description="a number from 0 (always the most probable token) to 2")
    top_p: Float = Field(1.0, gt=0, le=1, description="a number above 0, at most 1 (1 is off)")
    top_k: Int = Field(0, ge=-1, description="a whole number of at least 1, or 0 or -1 for off")
    min_p: Float = Field(0.0, ge=0, le=1, description="a number from 0 (off) to 1")
    n: Int = Field(1, ge=1, le=128, description="a whole number from 1 to 128")
    stop: Annotated[list[str], BeforeValidator(_string_list)] = Field(
        default_factory=list, max_length=16, description="one to 16 strings, none empty, at most 1,024 bytes each"
    )
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63, description="a whole number of 64 bits, or None")
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="a whole number from 0 to 20, or None")
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias_map)] = Field(
        default_factory=dict,
        max_length=MAX_BIASES,
        description="a map of at most 1,024 token ids to numbers from -100 to 100",
    )
    presence_penalty: Float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: Float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    repetition_penalty: Float = Field(1.0, ge=0.01, le=100, description="a number from 0.01 to 100 (1 is off)")
    echo: bool = Field(False, description="True or False")
    min_tokens: Int = Field(0, ge=0, description="a whole number from 0 to max_tokens")
    ignore_eos: bool = Field(False, description="True or False")
    stop_token_ids: Annotated[list[Int], BeforeValidator(_to_python)] = Field(
        default_factory=list, max_length=64, description="at most 64 token ids"
    )

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: list[str]) -> list[str]:
        for text in value:
            if not text or len(_utf8("stop", text)) > MAX_STOP_BYTES:
                raise ValueError("empty or long")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, value: dict[int, float]) -> dict[int, float]:
        if not all(0 <= token < TOKEN_IDS and abs(bias) <= 100 for token, bias in value.items()):
            raise ValueError("range")
        return value

    @field_validator("stop_token_ids")
    @classmethod
    def _check_stop_ids(cls, value: list[int]) -> list[int]:
        if not all(0 <= token < TOKEN_IDS for token in value):
            raise ValueError("range")
        return value

    @model_validator(mode="after")
    def _check_lengths(self) -> SamplingParams:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens", "0", _expected("max_tokens"))
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens", str(self.min_tokens), f"at most max_tokens, which is {self.max_tokens}")
        return self

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature < 1e-6


class GenerateRequest(SamplingParams):
    """A request as the worker receives it: a prompt, sampling parameters, and the time at which it expires."""

    schema_version: Int = Field(SCHEMA_VERSION, description="set by the client")
    prompt: Annotated[str | list[Int], WrapValidator(_prompt)] = Field(
        description=f"text of at most {MAX_PROMPT_BYTES} bytes in UTF-8, or a list of 1 to {MAX_PROMPT_TOKENS} ids"
    )
    priority: Priority = Field("normal", description="'interactive', 'normal' or 'bulk'")
    #: Unix time in seconds at which the job expires; None means never.
    expires_at: float | None = Field(None, ge=0, le=1e11, description="a Unix time in seconds, or None")
    #: Whether the worker streams the text while it generates it, for `Job.stream`.
    stream: bool = Field(False, description="True or False")
    #: Numbers of the checkpoints whose tensors the worker captures from the first sample, for `Job.checkpoints`.
    checkpoints: Annotated[list[Int], BeforeValidator(_checkpoint_list)] = Field(
        default_factory=list, max_length=13, description="'all', or a list of checkpoint numbers from 0 to 12"
    )

    @field_validator("schema_version")
    @classmethod
    def _check_version(cls, value: int) -> int:
        if not is_readable(value):
            raise ValueError("range")
        return value

    @field_validator("checkpoints")
    @classmethod
    def _check_checkpoints(cls, value: list[int]) -> list[int]:
        if not CHECKPOINT_TENSORS.keys() >= set(value):
            raise ValueError("range")
        return sorted(set(value))

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, value: str | list[int]) -> str | list[int]:
        expected = _expected("prompt")
        if isinstance(value, str):
            size = len(_utf8("prompt", value))
            if size > MAX_PROMPT_BYTES:
                raise InvalidRequest("prompt", f"text of {size} bytes", expected)
        elif not value:
            raise InvalidRequest("prompt", "a list of 0 token ids", expected)
        elif min(value) < 0 or max(value) >= TOKEN_IDS:
            wrong = next(i for i, token in enumerate(value) if not 0 <= token < TOKEN_IDS)
            raise InvalidRequest("prompt", f"a list whose item {wrong} is not a token id", expected)
        return value

    def to_wire(self) -> dict[str, Any]:
        """The JSON object of the message: the schema version, and the fields that differ from their defaults."""
        return {"schema_version": self.schema_version, **self.model_dump(mode="json", exclude_defaults=True)}


def parse_request(fields: dict[str, Any]) -> GenerateRequest:
    """Check the fields of a request and return it.

    Raises:
        InvalidRequest: a field is wrong. It names the first such field, its value, and what is expected.
    """
    for name in fields:
        if name not in GenerateRequest.model_fields:
            raise InvalidRequest(_show_name(name), _show(fields[name], name), _advice(name))
    try:
        return GenerateRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InvalidRequest):
            raise cause from None
        name = str(first["loc"][0]) if first["loc"] else "request"
        value = fields.get(name, "nothing") if first["type"] == "missing" else _show(fields.get(name), name)
        raise InvalidRequest(name, str(value), _expected(name)) from None


def is_job_id(value: Any) -> TypeGuard[str]:
    """Whether this is a valid job id: 1 to 128 letters, digits, '.', '_', '-' or ':'."""
    return isinstance(value, str) and 1 <= len(value) <= 128 and _JOB_ID.issuperset(value)


def _expected(name: str) -> str:
    field = GenerateRequest.model_fields.get(name)
    return (field and field.description) or "another value"


def _advice(name: Any) -> str:
    if not isinstance(name, str) or len(name) > MAX_NAME:
        name = ""
    if name in _ADVICE:
        return f"no such parameter; {_ADVICE[name]}"
    public = sorted(set(GenerateRequest.model_fields) - {"schema_version", "expires_at"} | {"timeout_s", "id", "model"})
    near = _ALIASES.get(name) or next(iter(difflib.get_close_matches(name, public, n=1, cutoff=0.6)), None)
    return f"no such parameter; did you mean {near}?" if near else f"one of {', '.join(public)}"


class _ShortRepr(reprlib.Repr):
    """`repr` with bounded work and output, however long or deep the value is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 24
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to convert a number of thousands of digits.
        return super().repr_int(x, level) if x.bit_length() < 1024 else f"a number of {x.bit_length()} bits"


def _show(value: Any, name: Any = "") -> str:
    """A value for an error message, shortened. For a prompt only its type: messages must not quote prompts."""
    if name == "prompt":
        return f"a value of type {type(value).__name__}"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = _ShortRepr().repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def show_value(value: Any) -> str:
    """A value that a caller gave, for an error message: at most 80 characters, whatever it is."""
    return _show(value)


def _show_name(name: Any) -> str:
    """A field name that a user chose, made safe to print."""
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= MAX_NAME else _show(name)


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        at = f"an unpaired surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise InvalidRequest(name, at, "text that is valid Unicode; decode it with the right encoding first") from None

"""Requests: their fields, defaults and limits, and the errors for wrong ones.

On the wire a request is JSON. A request with a field that is not listed here is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from headrace.client.wire.activations import CHECKPOINT_TENSORS
from headrace.client.wire.adapters import ADAPTER_NAME
from headrace.client.wire.constraints import Constraints
from headrace.client.wire.continuation import CONTINUATION_FORM, check_continuation
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.field_values import MAX_BIASES, bias_map, checkpoint_list, string_list, to_list
from headrace.client.wire.foreign import NO_SEED, advice, drop_neutral
from headrace.client.wire.messages import KWARGS_FORM, MESSAGES_FORM, check_kwargs, check_messages
from headrace.client.wire.values import show, show_name, to_python, to_whole
from headrace.client.wire.version import SCHEMA_VERSION, is_readable

MAX_PROMPT_BYTES = 131_072  # 16 for each of 8,192 positions; a token of English text has about 4
MAX_PROMPT_TOKENS = 16_384
MAX_TOKENS = 1_000_000
MAX_STOP_BYTES = 1_024
MAX_LOGPROBS = 20
#: Upper bound of token ids, whatever the vocabulary.
TOKEN_IDS = 2**31
#: Maximum number of log probabilities in one result, n x tokens x (1 + logprobs): without it, one job could take
#: gigabytes.
MAX_SCORES = 2**19
#: What `adapter` may be.
ADAPTER_FORM = "1 to 128 letters, digits, '.', '_' or '-', the first a letter or a digit, or None"

_JOB_ID = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-:")

#: Parameters for which a worker with HEADRACE_GENERATION_CONFIG=auto takes the model's defaults if they are not set.
DEFAULTED_BY_MODELS = frozenset({"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens"})

#: What `max_tokens` may be. A request for no tokens must ask for something else.
MAX_TOKENS_FORM = "a whole number of at least 1 (0 only with echo, prompt_logprobs or continuation)"

Priority = Literal["interactive", "normal", "bulk"]
#: What a job asks for in place of text: the token ids of a prompt, or the text of token ids.
Operation = Literal["tokenize", "detokenize"]


def _prompt(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    value = to_list(value)
    if isinstance(value, list) and len(value) > MAX_PROMPT_TOKENS:  # see `bias_map`
        raise InvalidRequest("prompt", f"a list of {len(value)} token ids", _expected("prompt"))
    if isinstance(value, list) and set(map(type, value)) == {int}:
        return value  # as most are; pydantic would call a function for each
    return check(value)


Int = Annotated[int, BeforeValidator(to_whole)]
Float = Annotated[float, BeforeValidator(to_python)]
Bool = Annotated[bool, BeforeValidator(to_python)]


class SamplingParams(Constraints):
    """Sampling parameters. Names, defaults and ranges are those of the OpenAI completions API and of vLLM."""

    max_tokens: Int = Field(16, ge=0, le=MAX_TOKENS, description=MAX_TOKENS_FORM)
    temperature: Float = Field(1.0, ge=0, le=2, description="a number from 0 (always the most probable token) to 2")
    top_p: Float = Field(1.0, gt=0, le=1, description="a number above 0, at most 1 (1 is off)")
    top_k: Int = Field(0, ge=-1, lt=2**63, description="a whole number from 1 to 2**63 - 1, or 0 or -1 for off")
    min_p: Float = Field(0.0, ge=0, le=1, description="a number from 0 (off) to 1")
    n: Int = Field(1, ge=1, le=128, description="a whole number from 1 to 128")
    stop: Annotated[list[str], BeforeValidator(string_list)] = Field(
        default_factory=list, max_length=16, description="one to 16 strings, none empty, at most 1,024 bytes each"
    )
    seed: Int | None = Field(None, ge=-(2**63), lt=2**63, description="a whole number of 64 bits (-1 is none), or None")
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="a whole number from 0 to 20, or None")
    #: Log probabilities of the prompt's tokens, and of so many of the likeliest tokens at their places.
    prompt_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="a whole number from 0 to 20, or None")
    logit_bias: Annotated[dict[int, float], BeforeValidator(bias_map)] = Field(
        default_factory=dict,
        max_length=MAX_BIASES,
        description="a map of at most 1,024 token ids to numbers from -100 to 100",
    )
    presence_penalty: Float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    frequency_penalty: Float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    repetition_penalty: Float = Field(1.0, ge=0.01, le=100, description="a number from 0.01 to 100 (1 is off)")
    echo: Bool = Field(False, description="True or False")
    min_tokens: Int = Field(0, ge=0, description="a whole number from 0 to max_tokens")
    ignore_eos: Bool = Field(False, description="True or False")
    stop_token_ids: Annotated[list[Int], BeforeValidator(to_list)] = Field(
        default_factory=list, max_length=64, description="at most 64 token ids"
    )
    skip_special_tokens: Bool = Field(True, description="True or False")

    @field_validator("seed")
    @classmethod
    def _check_seed(cls, value: int | None) -> int | None:
        return None if value == NO_SEED else value

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
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None and not self._scores_continuation:
            raise InvalidRequest("max_tokens", "0", _expected("max_tokens"))
        if self.max_tokens == 0 and self.structured_outputs is not None:
            raise InvalidRequest("max_tokens", "0", "at least 1 beside structured_outputs")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest("min_tokens", show(self.min_tokens), f"at most max_tokens, which is {self.max_tokens}")
        return self

    @property
    def _scores_continuation(self) -> bool:
        return False

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature < 1e-6


class GenerateRequest(SamplingParams):
    """A request as the worker receives it: a prompt or messages, sampling parameters, the time at which it expires."""

    schema_version: Int = Field(SCHEMA_VERSION, description="set by the client")
    #: Empty in a request with `messages`.
    prompt: Annotated[str | list[Int], WrapValidator(_prompt)] = Field(
        "", description=f"text of at most {MAX_PROMPT_BYTES} bytes in UTF-8, or a list of 1 to {MAX_PROMPT_TOKENS} ids"
    )
    #: Instead of a prompt: a chat, which the worker renders with the model's chat template.
    messages: Annotated[list[dict[str, Any]] | None, BeforeValidator(check_messages)] = Field(
        None, description=MESSAGES_FORM
    )
    add_generation_prompt: Bool = Field(True, description="True or False")
    continue_final_message: Bool = Field(False, description="True or False")
    chat_template_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(check_kwargs)] = Field(
        None, description=KWARGS_FORM
    )
    #: Whether the names of special tokens in a text prompt mean these tokens; None: what the worker's setting or the
    #: model's tokenizer says.
    parse_special_tokens: Bool | None = Field(None, description="True, False, or None for the tokenizer's default")
    #: Whether a text prompt gets the tokens that the tokenizer's own rules put around a text.
    add_special_tokens: Bool = Field(True, description="True or False")
    #: A text after the prompt, or its token ids, whose log probabilities are the result; for `Client.score`.
    continuation: Annotated[str | list[Int] | None, BeforeValidator(to_list)] = Field(
        None, max_length=MAX_PROMPT_BYTES, description=CONTINUATION_FORM
    )
    operation: Operation | None = Field(None, description="'tokenize', 'detokenize', or None for text")
    #: The name of a LoRA adapter of the model; None: the model as it is.
    adapter: str | None = Field(None, pattern=ADAPTER_NAME, description=ADAPTER_FORM)
    priority: Priority = Field("normal", description="'interactive', 'normal' or 'bulk'")
    #: Unix time in seconds at which the job expires; None means never.
    expires_at: Float | None = Field(None, ge=0, le=1e11, description="a Unix time in seconds, or None")
    #: Whether the worker streams the text while it generates it, for `Job.stream`.
    stream: Bool = Field(False, description="True or False")
    #: Numbers of the checkpoints whose tensors the worker captures from the first sample, for `Job.checkpoints`.
    checkpoints: Annotated[list[Int], BeforeValidator(checkpoint_list)] = Field(
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

    @model_validator(mode="after")
    def _check_source(self) -> GenerateRequest:
        """Refuse a request without a source of its text, or with two, and options of a chat without messages."""
        given = self.model_fields_set
        if self.messages is None:
            if "prompt" not in given:
                raise InvalidRequest("prompt", "nothing", f"{_expected('prompt')}; or messages, for a chat")
            if self.operation == "detokenize" and isinstance(self.prompt, str):
                raise InvalidRequest("token_ids", "text", f"a list of 1 to {MAX_PROMPT_TOKENS} ids")
            if self.continue_final_message or self.chat_template_kwargs:
                name = "continue_final_message" if self.continue_final_message else "chat_template_kwargs"
                raise InvalidRequest(name, "a value without messages", "messages beside it; it has no meaning without")
        elif "prompt" in given:
            raise InvalidRequest("messages", "messages beside a prompt", "one of the two")
        elif self.parse_special_tokens is False or (self.add_special_tokens and "add_special_tokens" in given):
            name = "parse_special_tokens" if self.parse_special_tokens is False else "add_special_tokens"
            value = show(getattr(self, name))
            raise InvalidRequest(name, value, "no value beside messages: the chat template writes special tokens")
        elif self.continue_final_message and self.messages[-1].get("content") is None:
            raise InvalidRequest("continue_final_message", "True", "False, or a last message with content")
        elif self.continue_final_message and self.add_generation_prompt and "add_generation_prompt" in given:
            raise InvalidRequest("add_generation_prompt", "True beside continue_final_message", "one of the two")
        return self

    @model_validator(mode="after")
    def _check_continuation(self) -> GenerateRequest:
        if self.continuation is not None:
            try:
                GenerateRequest._check_prompt(self.continuation or [0])
            except InvalidRequest as error:
                raise InvalidRequest("continuation", error.value, error.expected) from None
            beside = {"n": self.n > 1, "echo": self.echo, "prompt_logprobs": self.prompt_logprobs is not None}
            beside |= {"stream": self.stream, "checkpoints": bool(self.checkpoints)}
            others = [name for name, asked in beside.items() if asked]
            is_chat = self.messages is not None
            check_continuation(
                self.continuation, self.prompt, is_chat=is_chat, others=others, max_tokens=self.max_tokens
            )
        return self

    @property
    def _scores_continuation(self) -> bool:
        return self.continuation is not None

    @property
    def begins_answer(self) -> bool:
        """Whether the rendered messages end with the beginning of an answer."""
        return self.add_generation_prompt and not self.continue_final_message

    def to_wire(self) -> dict[str, Any]:
        """The JSON object of the message: the schema version, and the fields that differ from their defaults.

        Parameters for which a model may have defaults of its own are in it whenever the caller has set them.
        """
        source = {"prompt": self.prompt} if self.messages is None else {}
        fields = self.model_dump(mode="json", exclude_defaults=True)
        chosen = {name: getattr(self, name) for name in sorted(DEFAULTED_BY_MODELS & self.model_fields_set)}
        return {"schema_version": self.schema_version, **source, **chosen, **fields}


#: Fields that have a meaning only for a chat.
CHAT_NAMES = frozenset({"messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"})
#: Fields that a caller cannot set.
INTERNAL_NAMES = {
    "expires_at": "use timeout_s",
    "schema_version": "it is set for you",
    "operation": "use tokenize or detokenize",
}
#: What callers may name: `Client.submit` takes the last three and sends `expires_at` in place of `timeout_s`.
PUBLIC_NAMES = frozenset(GenerateRequest.model_fields) - INTERNAL_NAMES.keys() | {"timeout_s", "id", "model"}

#: What messages of other producers may name.
WIRE_NAMES = frozenset(GenerateRequest.model_fields)
#: Parameters that are whole numbers, also if a table or another language wrote them as 64.0.
WHOLE_NAMES = frozenset({"max_tokens", "top_k", "n", "seed", "logprobs", "prompt_logprobs", "min_tokens"})


def plain_fields(fields: Mapping[Any, Any]) -> dict[Any, Any]:
    """The fields that ask for something, as plain Python values. Equal requests have equal fields."""
    return {
        name: to_whole(value) if name in WHOLE_NAMES else to_python(value)
        for name, value in drop_neutral(fields).items()
    }


def parse_request(fields: Mapping[Any, Any], *, public: Collection[str] = PUBLIC_NAMES) -> GenerateRequest:
    """Check the fields of a request and return it. Fields that ask for nothing are ignored; see `foreign.FOREIGN`.

    Args:
        fields: of the request.
        public: the names that an error may suggest.

    Raises:
        InvalidRequest: a field is wrong. It names the first such field, its value, and what is expected.
    """
    given = drop_neutral(fields)
    if given.get("continuation") is not None:
        given = {"max_tokens": 0, **given}  # nothing is generated beside it
    for name in given:
        if name not in GenerateRequest.model_fields:
            raise InvalidRequest(show_name(name), show(given[name], name), advice(name, public))
    try:
        return GenerateRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InvalidRequest):
            raise cause from None
        name = str(first["loc"][0]) if first["loc"] else "request"
        value = "nothing" if first["type"] == "missing" else show(given.get(name), name)
        raise InvalidRequest(name, value, _expected(name)) from None


def is_job_id(value: Any) -> TypeGuard[str]:
    """Whether this is a valid job id: 1 to 128 letters, digits, '.', '_', '-' or ':'."""
    return isinstance(value, str) and 1 <= len(value) <= 128 and _JOB_ID.issuperset(value)


def _expected(name: str) -> str:
    field = GenerateRequest.model_fields.get(name)
    return (field and field.description) or "another value"


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        at = f"an unpaired surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise InvalidRequest(name, at, "text that is valid Unicode; decode it with the right encoding first") from None

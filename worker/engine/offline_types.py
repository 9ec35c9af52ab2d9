"""Sampling parameters and outputs of the offline engine, with vLLM's names."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, NotRequired, Self, TypedDict

from headrace.client.wire.requests import MAX_TOKENS, GenerateRequest, parse_request
from headrace.client.wire.results import Choice, Result, TokenLogprob
from headrace.client.wire.values import is_missing
from headrace.worker.engine.offline_adapters import LoRARequest

#: Fields of vLLM's `SamplingParams` that say how outputs are handed over; `generate` returns finished ones.
_FORMAT_FIELDS = frozenset({"output_kind", "output_text_buffer_length"})


@dataclass(kw_only=True)
class StructuredOutputsParams:
    """The form of a text: one of these. See docs/structured-output.md."""

    choice: list[str] | None = None
    regex: str | None = None
    #: A schema, or its text.
    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    #: In the syntax of Lark.
    grammar: str | None = None


@dataclass(kw_only=True)
class SamplingParams:
    """How tokens are sampled, with vLLM's names and defaults.

    The fields after `logit_bias` are vLLM's others: they take the values that ask for nothing, and None.

    Raises:
        InvalidRequest (a ValueError): a value is out of range, or asks for something that is not computed.
        TypeError: there is no such parameter.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    #: None, or -1 as in vLLM: derived from the seed of the LLM and the number of the request.
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    #: The text ends with the model's context in any case. None: only there.
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    prompt_logprobs: int | None = None
    #: The form of the texts, such as `StructuredOutputsParams(regex="[a-z]+")` or the same as a dictionary.
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    output_kind: Any = None
    output_text_buffer_length: int = 0
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool = False
    guided_decoding: Any = None
    logits_processors: list[Any] | None = None
    extra_args: dict[str, Any] | None = None
    flat_logprobs: bool = False
    logprob_token_ids: list[int] | None = None
    prompt_logprob_token_ids: list[int] | None = None
    prompt_logprob_start: int | None = None
    stream_interval: int | None = None
    repetition_detection: Any = None
    thinking_token_budget: int | None = None
    routed_experts_prompt_start: int = 0
    trace_decode_token_ids: list[int] | None = None
    skip_reading_prefix_cache: bool | None = None
    skip_clone: bool = False

    def __new__(cls, **params: Any) -> Self:
        """Refuse unknown parameters before the generated `__init__` does, with the name that was probably meant."""
        refuse_unknown(cls.__name__, params, [item.name for item in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.request("", None)

    @classmethod
    def from_optional(cls, **params: Any) -> Self:
        """As the constructor, but None means the default, also for `max_tokens`."""
        return cls(**{name: value for name, value in params.items() if value is not None})

    def clone(self) -> Self:
        """A copy that shares nothing with this object."""
        return copy.deepcopy(self)

    def request(self, prompt: str | list[int], room: int | None) -> GenerateRequest:
        """The engine's request for a prompt.

        Args:
            prompt: text or token ids.
            room: the largest number of new tokens; None for any.

        Raises:
            InvalidRequest: a value is out of range, or asks for something that is not computed.
        """
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _FORMAT_FIELDS}
        if isinstance(self.structured_outputs, StructuredOutputsParams):
            given["structured_outputs"] = asdict(self.structured_outputs)
        if is_missing(self.max_tokens):
            given["max_tokens"] = MAX_TOKENS
        request = parse_request({"prompt": prompt, **given})
        if room is None or request.max_tokens <= room:
            return request
        return request.model_copy(update={"max_tokens": room, "min_tokens": min(request.min_tokens, room)})


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, and its text if `RequestOutput.prompt` is to have it."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


@dataclass
class Logprob:
    """Log probability of a token, and its rank from 1 if it is among the likeliest."""

    logprob: float
    rank: int | None = None
    #: The token's text, or all of its bytes (`bytes:` and hexadecimal) if it is only part of a character.
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One sample of a prompt. The last two fields are vLLM's; here they have no content."""

    index: int
    text: str
    token_ids: list[int]
    #: Sum of the tokens' log probabilities; None if `logprobs` is None.
    cumulative_logprob: float | None
    #: For each token, log probabilities by token id: its own and those of the likeliest tokens.
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: LoRARequest | None = None
    routed_experts: None = None
    kv_transfer_params: None = None

    def finished(self) -> bool:
        """Always true: `generate` returns finished outputs only."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """The samples of one prompt.

    `num_cached_tokens`: tokens of the prompt that were reused from another prompt. `lora_request`: as it was given. The
    other fields from `metrics` on are vLLM's; here they have no content.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True
    metrics: None = None
    lora_request: LoRARequest | None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    num_cached_tokens: int | None = None
    kv_transfer_params: None = None


def output_of(
    prompt: str | None, tokens: list[int], result: Result, adapter: LoRARequest | None = None
) -> RequestOutput:
    """The output for a prompt.

    Args:
        prompt: its text; None if only its token ids were given.
        tokens: its token ids.
        result: of the engine.
        adapter: with which it was computed.
    """
    outputs, scores = [_completion(choice, adapter) for choice in result.choices], result.prompt_logprobs
    prompts = None if scores is None else [None if each.logprob is None else _logprobs(each) for each in scores]
    cached = result.usage.cached_tokens
    return RequestOutput(result.id, prompt, tokens, outputs, prompts, lora_request=adapter, num_cached_tokens=cached)


def refuse_unknown(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for the first name that is not known, with the nearest known one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"{function} takes no argument {name!r}" + (f"; did you mean {near[0]}?" if near else ""))


def _completion(choice: Choice, adapter: LoRARequest | None) -> CompletionOutput:
    scores = choice.logprobs
    return CompletionOutput(
        index=choice.index,
        text=choice.text,
        token_ids=choice.token_ids,
        cumulative_logprob=None if scores is None else sum(score.logprob or 0.0 for score in scores),
        logprobs=None if scores is None else [_logprobs(score) for score in scores],
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        lora_request=adapter,
    )


def _logprobs(score: TokenLogprob) -> dict[int, Logprob]:
    found = {score.token_id: Logprob(score.logprob or 0.0, score.rank, score.token)}
    for rank, top in enumerate(score.top, 1):
        found[top.token_id] = Logprob(top.logprob, rank, top.token)
    return found

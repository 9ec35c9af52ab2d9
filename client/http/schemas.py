"""The form of answers, for the OpenAPI description; `client.batch` writes them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from headrace.client.wire.results import Usage


class PromptLogprob(BaseModel):
    """A token at a place of the prompt, and its own place by probability."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionLogprobs(BaseModel):
    """Log probabilities of the tokens of a choice."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One generated text."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    logprobs: CompletionLogprobs | None
    #: With `structured_outputs` or `response_format`: whether the text has the form.
    complete: bool | None = None
    #: With the field of this name: for each token of the prompt but the first, the tokens at its place by their ids.
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class Completion(BaseModel):
    """The answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None
    seed: int | None


class ChatTopLogprob(BaseModel):
    """A token at its place in a chat's answer; `bytes` are those of its text."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatTopLogprob):
    """A token of a chat's answer, and the likeliest tokens at its place."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities of the tokens of a choice in a chat."""

    content: list[ChatTokenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    """A generated message."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One generated message, and why it ended."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    #: With `structured_outputs` or `response_format`: whether the text has the form.
    complete: bool | None = None


class ChatCompletion(BaseModel):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None
    seed: int | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class ChatDelta(BaseModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChunkChoice(BaseModel):
    """One choice of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    #: In the last chunk of a choice, with `structured_outputs` or `response_format`: whether the text has the form.
    complete: bool | None = None


class ChatCompletionChunk(BaseModel):
    """An event of a stream of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
    seed: int | None = None


class Tokens(BaseModel):
    """The answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizedText(BaseModel):
    """The answer of `/detokenize`."""

    prompt: str


class Model(BaseModel):
    """A model that a worker serves, or a LoRA adapter of one."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    #: The model whose weights are used, and of an adapter the model that it adapts; null for a model itself.
    root: str
    parent: str | None
    #: Prompt and new tokens together; absent if its workers do not say it.
    max_model_len: int | None = None


class ErrorDetail(BaseModel):
    """What was wrong; `param` is the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """The body of every response with a status of 400 and more."""

    error: ErrorDetail

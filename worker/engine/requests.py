"""A request inside the engine: its validation against the model, and its state until it is answered."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import MAX_SCORES, GenerateRequest
from headrace.client.wire.results import Result, Timings, Usage
from headrace.model.generation_config import Ends
from headrace.model.tokenizer import Tokenizer
from headrace.worker.engine.sequence import Sequence
from headrace.worker.engine.sequence_text import SequenceText, TextDelta


@dataclass(eq=False)
class RequestState:
    """A job in the engine: its request, its samples with their texts, and the future that its caller holds."""

    id: str
    request: GenerateRequest
    sequences: list[Sequence]
    #: By the index of the sequence.
    texts: list[SequenceText]
    seed: int
    future: Future[Result]
    arrived_at: float
    on_start: Callable[[], None] | None = None
    on_text: Callable[[TextDelta], None] | None = None
    text_every_s: float = 0.0
    on_activations: Callable[[dict[str, bytes]], None] | None = None

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sequence.finish_reason for sequence in self.sequences)

    @property
    def started(self) -> bool:
        """Whether any sample has had a slot."""
        return any(sequence.admitted_at is not None for sequence in self.sequences)

    @property
    def partial(self) -> list[str]:
        """The texts so far, for the error of a job that ends early; empty if there are no new tokens."""
        return [text.text for text in self.texts] if any(s.output for s in self.sequences) else []

    def result(self, model: str, fingerprint: str, now: float) -> Result:
        """The result of a finished job; `now` is by the monotonic clock."""
        prompt_tokens = len(self.sequences[0].prompt)
        new_tokens = sum(len(sequence.output) for sequence in self.sequences)
        started = min(s.admitted_at or now for s in self.sequences)
        first = min(s.first_token_at or now for s in self.sequences)
        return Result(
            id=self.id,
            model=model,
            choices=[text.choice() for text in self.texts],
            usage=Usage(
                prompt_tokens=prompt_tokens, completion_tokens=new_tokens, total_tokens=prompt_tokens + new_tokens
            ),
            seed=self.seed,
            timings=Timings(
                waiting_s=round(started - self.arrived_at, 6),
                prefill_s=round(first - started, 6),
                decode_s=round(now - first, 6),
            ),
            fingerprint=fingerprint,
        )


def prepare(
    request: GenerateRequest,
    job_id: str,
    future: Future[Result],
    *,
    tokenizer: Tokenizer,
    ends: Ends,
    vocab_size: int,
    max_context: int,
) -> RequestState:
    """Validate a request against the model, tokenize its prompt, choose its seed, and make its sequences.

    Raises:
        JobFailed: this model cannot compute the request.
    """
    prompt, text, rest = _tokenize(request.prompt, tokenizer, ends)
    _check_token_ids(request, prompt, vocab_size)
    total = len(prompt) + request.max_tokens
    if total > max_context:
        raise JobFailed(
            "context_length_exceeded",
            f"the prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}, together {total}; "
            f"this model reads at most {max_context}. Shorten the prompt or lower max_tokens",
        )
    _check_logprobs(request, len(prompt))
    seed = secrets.randbits(52) if request.seed is None else request.seed
    sequences = [Sequence(request, prompt, i, seed, ends.eos_ids) for i in range(request.n)]
    texts = [SequenceText(sequence, tokenizer, text, rest) for sequence in sequences]
    return RequestState(job_id, request, sequences, texts, seed, future, time.monotonic())


def _tokenize(prompt: str | list[int], tokenizer: Tokenizer, ends: Ends) -> tuple[list[int], str, bytes]:
    """Token ids and text of a prompt, and the bytes at its end that are an incomplete character.

    The empty prompt becomes the token with which texts begin, as in transformers, and its text is that of this token.
    """
    if isinstance(prompt, str):
        if tokens := tokenizer.encode(prompt):
            return tokens, prompt, b""
        if ends.bos_token_id is None:
            raise JobFailed(
                "empty_prompt",
                "the prompt is empty, and the files of this model name no token of its vocabulary with which a text "
                "begins; give a prompt, or set bos_token_id in generation_config.json",
            )
        prompt = [ends.bos_token_id]
    decoder = tokenizer.decoder()
    text = "".join(map(decoder.push, prompt))
    rest = decoder.rest
    return prompt, text + decoder.flush(), rest


def _check_token_ids(request: GenerateRequest, prompt: list[int], vocab_size: int) -> None:
    for name, ids in (
        ("prompt", prompt),
        ("logit_bias", request.logit_bias),
        ("stop_token_ids", request.stop_token_ids),
    ):
        largest = max(ids, default=0)
        if largest >= vocab_size:
            raise JobFailed(
                "invalid_token_id",
                f"{name} names token id {largest}; this model's vocabulary ends at {vocab_size - 1}",
            )


def _check_logprobs(request: GenerateRequest, prompt_tokens: int) -> None:
    if request.logprobs is None:
        return
    tokens = request.n * (request.max_tokens + (prompt_tokens if request.echo else 0))
    if (scores := tokens * (1 + request.logprobs)) > MAX_SCORES:
        raise JobFailed(
            "too_many_logprobs",
            f"n, max_tokens and logprobs ask for {scores} log probabilities, and a result holds at most {MAX_SCORES}; "
            "lower one of them, or submit the samples as several jobs with seeds of their own",
        )

"""A request inside the engine: its validation against the model, and its state until it is answered."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import MAX_SCORES, GenerateRequest
from headrace.client.wire.results import Result, Timings, Usage
from headrace.model.generation_config import Ends
from headrace.model.tokenizer import NoTokenizer, Tokenizer
from headrace.worker.engine import chat
from headrace.worker.engine.adapters import Adapters
from headrace.worker.engine.grammars import Grammars
from headrace.worker.engine.request_defaults import NO_DEFAULTS, Defaults, with_defaults
from headrace.worker.engine.request_rules import request_rules
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
    #: Parameters that the request did not set and that the model's defaults decided.
    defaults: Defaults = field(default_factory=dict)

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
        """The result of a finished job.

        Args:
            model: its name.
            fingerprint: of the engine; that of an adapter is added.
            now: by the monotonic clock.
        """
        digest = self.sequences[0].adapter_digest
        prompt_tokens = len(self.sequences[0].prompt)
        new_tokens = sum(len(sequence.output) for sequence in self.sequences)
        started = min(s.admitted_at or now for s in self.sequences)
        first = min(s.first_token_at or now for s in self.sequences)
        return Result(
            id=self.id,
            model=model,
            adapter=self.request.adapter,
            choices=[text.choice() for text in self.texts],
            prompt_logprobs=self.texts[0].prompt_logprobs(),
            # What one sample reused of another of the same job was computed for this job.
            usage=Usage.of(prompt_tokens, new_tokens, min(sequence.reused for sequence in self.sequences)),
            seed=self.seed,
            timings=Timings(
                waiting_s=round(started - self.arrived_at, 6),
                prefill_s=round(first - started, 6),
                decode_s=round(now - first, 6),
            ),
            fingerprint=fingerprint + (f"/adapter-{digest[:12]}" if digest else ""),
            defaults=dict(self.defaults),
        )


@dataclass(frozen=True)
class Hooks:
    """What the engine calls for a job; see `Engine.submit`."""

    on_start: Callable[[], None] | None = None
    on_text: Callable[[TextDelta], None] | None = None
    on_activations: Callable[[dict[str, bytes]], None] | None = None
    text_every_s: float = 0.0

    def give(self, state: RequestState) -> None:
        """Give them to a job."""
        state.on_start, state.on_text, state.on_activations = self.on_start, self.on_text, self.on_activations
        state.text_every_s = self.text_every_s


def prepare(
    request: GenerateRequest,
    job_id: str,
    future: Future[Result],
    *,
    tokenizer: Tokenizer,
    ends: Ends,
    vocab_size: int,
    max_context: int,
    defaults: Defaults = NO_DEFAULTS,
    parse_special_tokens: bool | None = None,
    grammars: Grammars | None = None,
    adapters: Adapters | None = None,
) -> RequestState:
    """Validate a request against the model, tokenize its prompt, choose its seed, and make its sequences.

    Messages are rendered, grammars compiled and adapters loaded first, which may take seconds: not in a thread that
    others wait for.

    Raises:
        JobFailed: this model cannot compute the request.
    """
    score_from = None
    if request.continuation is None:
        prompt, text, rest = read_prompt(request, tokenizer, ends, parse_special_tokens)
    else:
        prompt, text, score_from = read_continuation(request, tokenizer, ends, parse_special_tokens)
        rest = b""
    request, chosen = with_defaults(request, defaults, max_context - len(prompt))
    check_token_ids(request, prompt, vocab_size)
    total = len(prompt) + request.max_tokens
    if total > max_context:
        raise JobFailed(
            "context_length_exceeded",
            f"the prompt has {len(prompt)} tokens and max_tokens is {request.max_tokens}, together {total}; "
            f"this model reads at most {max_context}. Shorten the prompt or lower max_tokens",
        )
    _check_logprobs(request, len(prompt))
    seed = secrets.randbits(52) if request.seed is None else request.seed
    grammars = grammars or Grammars(tokenizer, vocab_size)
    rules = request_rules(request, grammars, tokenizer, vocab_size, ends.eos_ids)
    adapter = None if request.adapter is None else (adapters or Adapters()).get(request.adapter, future).packed
    sequences = [
        Sequence(request, prompt, i, seed, ends.eos_ids, score_from, rules() if rules else None, adapter)
        for i in range(request.n)
    ]
    texts = [SequenceText(sequence, tokenizer, text, rest) for sequence in sequences]
    return RequestState(job_id, request, sequences, texts, seed, future, time.monotonic(), defaults=chosen)


def read_prompt(
    request: GenerateRequest, tokenizer: Tokenizer, ends: Ends, parse_special_tokens: bool | None = None
) -> tuple[list[int], str, bytes]:
    """Token ids and text of a prompt, and the bytes at its end that are an incomplete character.

    The empty prompt becomes the token with which texts begin, as in transformers, and its text is that of this token.

    Args:
        request: with a prompt, or messages, which are rendered.
        tokenizer: of the model.
        ends: of the model.
        parse_special_tokens: of requests that do not say it; None for the tokenizer's default.

    Raises:
        JobFailed: `empty_prompt`, `no_tokenizer`, or an error of `chat.render`.
    """
    prompt = request.prompt
    if request.messages is not None or isinstance(prompt, str):
        tokens, text = encode_prompt(request, tokenizer, parse_special_tokens)
        if tokens:
            return tokens, text, b""
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


def read_continuation(
    request: GenerateRequest, tokenizer: Tokenizer, ends: Ends, parse_special_tokens: bool | None = None
) -> tuple[list[int], str, int]:
    """Token ids of a prompt with its continuation, the text of the continuation, and how many tokens precede it.

    As in evaluation harnesses: spaces at the end of the prompt belong to the continuation, since tokens begin with
    their space, and the ids of both together are split where those of the prompt alone end. Token ids are joined.

    Raises:
        JobFailed: as `read_prompt`; `invalid_request` if the continuation has no token of its own.
    """
    given = request.continuation
    if isinstance(given, list):
        ids = [*map(int, request.prompt), *given]
        decoder = tokenizer.decoder()
        return ids, "".join(map(decoder.push, given)) + decoder.flush(), len(request.prompt)
    text, after = str(request.prompt), str(given)
    kept = text.rstrip()
    start = request.model_copy(update={"prompt": kept, "continuation": None})
    first, *_ = read_prompt(start, tokenizer, ends, parse_special_tokens)
    moved = text[len(kept) :] + after
    if kept:
        whole = request.model_copy(update={"prompt": text + after})
        ids, _ = encode_prompt(whole, tokenizer, parse_special_tokens)
    else:
        alone = request.model_copy(update={"prompt": moved, "add_special_tokens": False})
        ids = [*first, *encode_prompt(alone, tokenizer, parse_special_tokens)[0]]
    if len(ids) <= len(first):
        advice = "its text only completes the prompt's last token; begin it with a space, or give more text"
        raise JobFailed("invalid_request", f"continuation: it has no token of its own after this prompt: {advice}")
    return ids, after, len(first)


def encode_prompt(request: GenerateRequest, tokenizer: Tokenizer, parse: bool | None = None) -> tuple[list[int], str]:
    """Token ids and text of a text prompt or of messages; see `read_prompt`. Raises JobFailed."""
    try:
        if request.messages is None:
            text = str(request.prompt)
            if request.parse_special_tokens is not None:
                parse = request.parse_special_tokens
            add = request.add_special_tokens
        else:
            text, parse, add = _rendered(request, tokenizer), True, False  # the template writes special tokens
        return tokenizer.encode(text, parse_special_tokens=parse, add_special_tokens=add), text
    except NoTokenizer as error:
        raise JobFailed("no_tokenizer", str(error)) from None
    except ValueError as error:  # the model's tokenizer has no token for it
        raise JobFailed("invalid_request", f"{'prompt' if request.messages is None else 'messages'}: {error}") from None


def _rendered(request: GenerateRequest, tokenizer: Tokenizer) -> str:
    text = chat.render(
        tokenizer.chat_template,
        request.messages or [],
        tokenizer.special_tokens,
        request.chat_template_kwargs,
        add_generation_prompt=request.begins_answer,
        continue_final_message=request.continue_final_message,
    )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JobFailed("chat_template_failed", "the model's chat template writes text that is not Unicode") from None
    return text


def check_token_ids(request: GenerateRequest, prompt: list[int], vocab_size: int) -> None:
    """Raises JobFailed for an id that is not in the vocabulary."""
    for name, ids in (
        ("token_ids" if request.operation == "detokenize" else "prompt", prompt),
        ("logit_bias", request.logit_bias),
        ("stop_token_ids", request.stop_token_ids),
        ("allowed_token_ids", request.allowed_token_ids or ()),
    ):
        largest = max(ids, default=0)
        if largest >= vocab_size:
            raise JobFailed(
                "invalid_token_id",
                f"{name} names token id {largest}; this model's vocabulary ends at {vocab_size - 1}",
            )


def _check_logprobs(request: GenerateRequest, prompt_tokens: int) -> None:
    scores = 0
    if request.logprobs is not None:
        tokens = request.n * (request.max_tokens + (prompt_tokens if request.echo else 0))
        scores = tokens * (1 + request.logprobs)
    if request.prompt_logprobs is not None:
        scores += prompt_tokens * (1 + request.prompt_logprobs)
    if scores > MAX_SCORES:
        raise JobFailed(
            "too_many_logprobs",
            f"n, max_tokens, logprobs and prompt_logprobs ask for {scores} log probabilities, "
            f"and a result holds at most {MAX_SCORES}; "
            "lower one of them, or submit the samples as several jobs with seeds of their own",
        )

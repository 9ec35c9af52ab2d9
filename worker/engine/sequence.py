"""One prompt in flight: `Sequence` is one sample of it, `Generation` the job with all its samples."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.results import Choice, Result, Timings, TokenLogprob, TopLogprob, Usage
from headrace.model.sampler import Draw, RowParams
from headrace.model.tokenizer import Tokenizer
from headrace.worker.engine.ngram_proposer import Drafter

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, order=True)
class Slot:
    """A place in the cache: which arena, and where in it."""

    length_class: int
    index: int


class TokenScore(NamedTuple):
    """Log probability of one token (None where nothing stands before it) and of the likeliest others."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that one sample gained, in whole characters, and the tokens it came from; a reason when it is the last.

    All are cut out of the choice as it will be in the result, with `echo` from the prompt on: tokens and their log
    probabilities from number `at` on, text from character `text_at` on.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    at: int = 0
    text_at: int = 0
    logprobs: list[TokenLogprob] | None = None


@dataclass(eq=False)
class Sequence:
    """One sample of a job: its tokens, its place in the cache, its text so far, and why it ended."""

    request: GenerateRequest
    prompt: list[int]
    index: int
    seed: int
    tokenizer: Tokenizer
    output: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    text: str = ""
    slot: Slot | None = None
    #: How many tokens of the prompt are in the cache.
    prefilled: int = 0
    #: A running sequence whose prompt begins as this one's does, and of how many tokens the keys and values are to be
    #: taken over from it. It was admitted earlier, so that no two wait for each other.
    leader: Sequence | None = None
    shared: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    #: Collects its tensors where checkpoints are asked for (a model.activations.Trace; the scheduler knows no tensors).
    trace: Any = None
    admitted_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        request = self.request
        self._decoder = self.tokenizer.decoder()
        end = self.tokenizer.end_of_text
        self._ends = frozenset(request.stop_token_ids) | (
            {end} if end is not None and not request.ignore_eos else set()
        )
        params = {name: getattr(request, name) for name in RowParams.__dataclass_fields__ if name != "banned"}
        self._free = RowParams(**params)
        self._bound = RowParams(**params, banned=tuple(sorted(self._ends)))
        self._drafter: Drafter | None = None  # made when there is room for drafts, which in a crowd there is not
        self._scan_from = 0  # stop strings are looked for from here on
        self._told_text = self._told_tokens = 0  # how much has been handed out as deltas
        self.tell_at = 0.0  # when the next delta is due, by the monotonic clock
        self._logprobs: list[TokenLogprob] = []  # of the tokens that have been handed out

    @property
    def longest(self) -> int:
        """Tokens it can come to: what its slot must hold."""
        return len(self.prompt) + self.request.max_tokens

    @property
    def prefilling(self) -> bool:
        """Whether part of its prompt is not in the cache yet."""
        return self.prefilled < len(self.prompt)

    @property
    def scores_prompt(self) -> bool:
        """Whether log probabilities of the prompt are asked for, so that all its positions need the head."""
        return self.request.echo and self.request.logprobs is not None

    @property
    def traced(self) -> bool:
        """Whether its tensors are asked for: those of the first sample are."""
        return bool(self.request.checkpoints) and self.index == 0

    @property
    def waits_for_whole(self) -> bool:
        """Whether it takes over all of its leader's prefill, so that both draw from the same last row."""
        return self.leader is not None and self.shared == len(self.prompt)

    @property
    def share_key(self) -> tuple[object, ...]:
        """Sequences with equal keys compute the same prefill; a traced one shares its own with nobody."""
        return tuple(self.prompt), self.scores_prompt, self if self.traced else None

    def draw(self, drafts: list[int]) -> Draw:
        """How the token after these drafts is drawn if they turn out right; after none its next one is."""
        output = [*self.output, *drafts] if drafts else self.output
        params = self._bound if len(output) < self.request.min_tokens else self._free
        return Draw(params, self.prompt, output, self.seed, self.index)

    def draft_next(self, most: int) -> list[int]:
        """Guesses at its next tokens, at most so many, and one fewer than it may still get. None for a traced one:
        its tensors are those of its own tokens."""
        most = min(most, self.request.max_tokens - len(self.output) - 1)
        if most <= 0 or self.traced:
            return []
        if self._drafter is None:
            self._drafter = Drafter(self.prompt)
        return self._drafter.propose(self.output, most)

    def note_drafts(self, drafted: int, right: int) -> None:
        """How many of its last drafts turned out right."""
        if self._drafter is not None:
            self._drafter.note(drafted, right)

    def append(self, score: TokenScore) -> None:
        """Take the next token, and see whether it is the last. The log probability is kept where it was asked for."""
        token = score.token_id
        self.output.append(token)
        if self.request.logprobs is not None:
            self.scores.append(score)
        if token in self._ends and len(self.output) > self.request.min_tokens:
            self.text += self._decoder.flush()
            self._finish("stop", None if token == self.tokenizer.end_of_text else token)
            return
        before = len(self.text)
        self.text += self._decoder.push(token)
        last = len(self.output) >= self.request.max_tokens
        if last:
            self.text += self._decoder.flush()
        if not self._cut_at_stop_string(before) and last:
            self._finish("length", None)

    def finish_scoring(self) -> None:
        """End a request for no new tokens, when its prompt is through."""
        self._finish("length", None)

    def _finish(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason

    def _cut_at_stop_string(self, before: int) -> bool:
        """Look for the earliest stop string that the newest text completes, wherever the token borders fall."""
        stops = self.request.stop
        if not stops:
            return False
        if len(self.output) < self.request.min_tokens:
            self._scan_from = len(self.text)
            return False
        start = max(self._scan_from, before - max(map(len, stops)) + 1)
        found = [(at, stop) for stop in stops if (at := self.text.find(stop, start)) >= 0]
        if not found:
            return False
        at, stop = min(found, key=lambda hit: hit[0])
        self.text = self.text[:at]
        self._finish("stop", stop)
        return True

    def take_delta(self, prompt_text: str = "") -> TextDelta | None:
        """What is new since the last call; text that may turn out to be the start of a stop string waits."""
        end = len(self.text) if self.finish_reason else len(self.text) - self._held_back()
        if end <= self._told_text and self.finish_reason is None:
            return None
        at, text_at = self._told_tokens, self._told_text
        text, tokens, logprobs = self.text[text_at:end], self.output[at:], self._logprobs_from(at)
        self._told_text, self._told_tokens = max(end, text_at), len(self.output)
        if self.request.echo and at:
            at, text_at = at + len(self.prompt), text_at + len(prompt_text)
        elif self.request.echo:
            text, tokens = prompt_text + text, self.prompt + tokens
            logprobs = None if logprobs is None else [*map(self._logprob, self.prompt_scores), *logprobs]
        return TextDelta(self.index, text, tokens, self.finish_reason, at, text_at, logprobs)

    def _logprobs_from(self, at: int) -> list[TokenLogprob] | None:
        """Log probabilities of the new tokens from number `at` on, each made once; None if they were not asked for."""
        if self.request.logprobs is None:
            return None
        self._logprobs.extend(map(self._logprob, self.scores[len(self._logprobs) :]))
        return self._logprobs[at:]

    def _held_back(self) -> int:
        """Length of the longest end of the text that is a beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self.request.stop), default=0)
        for length in range(min(longest, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(stop.startswith(tail) for stop in self.request.stop):
                return length
        return 0

    def choice(self, prompt_text: str) -> Choice:
        """This sample as it goes into the result."""
        echo, logprobs = self.request.echo, self._logprobs_from(0)
        if echo and logprobs is not None:
            logprobs = [*map(self._logprob, self.prompt_scores), *logprobs]
        return Choice(
            index=self.index,
            text=(prompt_text if echo else "") + self.text,
            token_ids=(self.prompt if echo else []) + self.output,
            finish_reason=self.finish_reason or "length",
            stop_reason=self.stop_reason,
            logprobs=logprobs,
        )

    def _logprob(self, score: TokenScore) -> TokenLogprob:
        text = self.tokenizer.token_text
        top = [TopLogprob(token_id=i, token=text(i), logprob=p) for i, p in score.top[: self.request.logprobs]]
        return TokenLogprob(token_id=score.token_id, token=text(score.token_id), logprob=score.logprob, top=top)


@dataclass(eq=False)
class Generation:
    """A job inside the engine: what was asked, its samples, and the future that its waiter holds."""

    id: str
    request: GenerateRequest
    sequences: list[Sequence]
    prompt_text: str
    seed: int
    future: Future[Result]
    arrived_at: float
    on_start: Callable[[], None] | None = None
    on_text: Callable[[TextDelta], None] | None = None
    text_every_s: float = 0.0
    on_trace: Callable[[dict[str, bytes]], None] | None = None

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(sequence.finish_reason for sequence in self.sequences)

    @property
    def begun(self) -> bool:
        """Whether any sample has had a slot."""
        return any(sequence.admitted_at is not None for sequence in self.sequences)

    @property
    def partial(self) -> list[str]:
        """The texts so far, for a job that ends early."""
        return [sequence.text for sequence in self.sequences] if any(s.output for s in self.sequences) else []

    def result(self, model: str, fingerprint: str, now: float) -> Result:
        """The result of a finished job."""
        read = len(self.sequences[0].prompt)
        written = sum(len(sequence.output) for sequence in self.sequences)
        started = min(s.admitted_at or now for s in self.sequences)
        first = min(s.first_token_at or now for s in self.sequences)
        return Result(
            id=self.id,
            model=model,
            choices=[sequence.choice(self.prompt_text) for sequence in self.sequences],
            usage=Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written),
            seed=self.seed,
            timings=Timings(
                waiting_s=round(started - self.arrived_at, 6),
                prefill_s=round(first - started, 6),
                decode_s=round(now - first, 6),
            ),
            fingerprint=fingerprint,
        )

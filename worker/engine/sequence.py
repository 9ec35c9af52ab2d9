"""The state of one sequence: a sample of a request, from its prompt to its last token. No text and no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Literal, NamedTuple

from headrace.client.wire.requests import GenerateRequest
from headrace.worker.engine.acceptance import Acceptance
from headrace.worker.engine.ngram_proposer import NgramProposer
from headrace.worker.engine.token_rules import TokenRules

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, order=True)
class Slot:
    """A slot of the key-value cache: the length class that names its arena, and its index in the arena."""

    length_class: int
    index: int


@dataclass(eq=False)
class CachedPrefix:
    """The first whole prefill chunks of a finished sequence's prompt, which stay in its slot until that is needed.

    Attributes:
        tokens: the token ids.
        keys: for each chunk the hash of all tokens up to its end.
        slot: the slot that holds them; None once it has been given to a sequence.
        adapter: digest of the adapter with which they were computed; empty for none.
        used_at: when it was last reused, by the clock of the `PrefixCache`.
    """

    tokens: list[int]
    keys: list[bytes]
    slot: Slot | None
    adapter: str = ""
    used_at: int = 0

    @property
    def prefilled(self) -> int:
        """How many tokens are in the cache: all of them."""
        return len(self.tokens)

    @property
    def written(self) -> int:
        """How many positions of its slot hold something that is needed."""
        return len(self.tokens)


class TokenScore(NamedTuple):
    """A token with its log probability (None for the first token of a text), and the likeliest tokens at its place."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]
    #: Its place among all tokens by probability, from 1; for tokens of a prompt.
    rank: int | None = None


class NoToken(Enum):
    """Why a sequence gets no token."""

    #: Its logits hold a NaN.
    NAN = auto()
    #: Its rules leave no token.
    MASKED = auto()


@dataclass(eq=False)
class Sequence:
    """One sample of a request: its tokens, its slot in the cache, and why it ended.

    Args:
        request: the request that the sequence belongs to.
        prompt: the prompt's token ids.
        index: the number of this sample in its request, from 0.
        seed: the seed of the request; the sampler combines it with `index`.
        eos_ids: the tokens that end a text, unless the request ignores them.
        score_from: the first token of the prompt whose log probability is asked for; None: what the request says.
        rules: which tokens may follow; None for all.
        adapter: what the model runner adds to the linear layers (model.adapters.packed.PackedAdapter); None for
            nothing. Sequences share keys and values only with those whose adapter has the same digest.
    """

    request: GenerateRequest
    prompt: list[int]
    index: int
    seed: int
    eos_ids: frozenset[int] = frozenset()
    score_from: int | None = None
    rules: TokenRules | None = None
    adapter: Any = None
    output: list[int] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    slot: Slot | None = None
    #: How many tokens of the prompt are in the cache, and how many of them another sequence has computed.
    prefilled: int = 0
    reused: int = 0
    #: What has the same first `prefix_length` tokens: a running sequence, or what a finished one left in the cache. The
    #: keys and values will be copied from its slot. A running one was admitted earlier, so two sequences never wait
    #: for each other.
    prefix_source: Sequence | CachedPrefix | None = None
    prefix_length: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    #: Whether the last token is a stop token, whose text is left out.
    ends_with_stop_token: bool = False
    #: The activations captured for checkpoints. Belongs to the model runner, as `sampling` does: this module and the
    #: scheduler know no tensors.
    activations: Any = None
    #: How often tokens of the draft model are accepted; belongs to `DraftProposer`.
    drafting: Acceptance | None = None
    #: The sampler's parameters, made from the request once.
    sampling: Any = None
    admitted_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        if self.request.ignore_eos:
            self.eos_ids = frozenset()
        request = self.request
        if request.prompt_logprobs is not None or (request.echo and request.logprobs is not None):
            self.score_from = 0
        #: Tokens that end the sequence, once it has `min_tokens`.
        self.stop_tokens = (
            self.eos_ids.union(self.request.stop_token_ids) if self.request.stop_token_ids else self.eos_ids
        )
        #: Digest of the adapter's files; empty for none.
        self.adapter_digest = "" if self.adapter is None else str(self.adapter.digest)
        self._ngrams: NgramProposer | None = None  # built on first use: a full batch never proposes tokens
        self._proposed_by: Acceptance | None = None  # the estimate for what proposed tokens last

    @property
    def max_length(self) -> int:
        """Tokens of the prompt and the longest output: what its slot must hold."""
        return len(self.prompt) + self.request.max_tokens

    @property
    def prefilling(self) -> bool:
        """Whether part of its prompt is not in the cache yet."""
        return self.prefilled < len(self.prompt)

    @property
    def late(self) -> bool:
        """Whether it has to wait because which tokens may follow is still being computed."""
        return self.rules is not None and self.rules.late

    @property
    def slow(self) -> bool:
        """Whether its masks, or those of another sequence with its grammar, were late when they were last needed."""
        return self.rules is not None and self.rules.group.slow

    @property
    def masks_s(self) -> float:
        """Seconds that the masks of all sequences with its grammar have taken."""
        return 0.0 if self.rules is None else self.rules.group.spent_s

    @property
    def written(self) -> int:
        """How many positions of its slot hold something that is needed."""
        return self.prefilled + len(self.output)

    @property
    def proven_prefix(self) -> int:
        """How many tokens of its prompt are known to have keys and values without a NaN, which reaches all later rows.

        The logits of the last row show it for the whole prompt. They were used if a token was sampled; a request for
        the scores of its prompt alone uses those of the row before.
        """
        if self.output:
            return len(self.prompt)
        return len(self.prompt) - 1 if any(score.logprob is not None for score in self.prompt_scores) else 0

    @property
    def scores_prompt(self) -> bool:
        """Whether the request asks for log probabilities of the prompt, from `score_from` on."""
        return self.score_from is not None

    @property
    def reusable_prefix(self) -> int:
        """How many tokens of its prompt another sequence may compute for it: those whose rows give it no logits.

        The logits of a token are those of the row before it; the last row gives those of the first new token.
        """
        first = len(self.prompt) if self.score_from is None else self.score_from
        return max(first - 1, 0)

    @property
    def captures_activations(self) -> bool:
        """Whether the request asks for the tensors of this sample. Only the first sample of a request is captured."""
        return bool(self.request.checkpoints) and self.index == 0

    @property
    def reuses_whole_prompt(self) -> bool:
        """Whether it takes the whole prefill of its prefix source, so that both sample from the same last row."""
        return self.prefix_source is not None and self.prefix_length == len(self.prompt)

    @property
    def prefill_key(self) -> tuple[object, ...]:
        """Sequences with equal keys can share one prefill. A captured sequence shares its prefill with no other."""
        own = self if self.captures_activations else None
        return tuple(self.prompt), self.score_from, self.adapter_digest, own

    @property
    def most_proposed(self) -> int:
        """How many tokens may be proposed after the next one so that `max_tokens` is not exceeded.

        A captured sequence gets none: its tensors must be those of its own tokens. Nor does one whose mask was late:
        that is for its next token alone.
        """
        if self.captures_activations or (self.rules is not None and self.rules.work is not None):
            return 0
        return self.request.max_tokens - len(self.output) - 1

    def propose(self, most: int, at_least: float = 0.0) -> list[int]:
        """Up to `most` tokens that n-grams propose; none if they are accepted less often than `at_least`."""
        if self._ngrams is None:
            self._ngrams = NgramProposer(self.prompt)
        if self._ngrams.acceptance < at_least:
            return []
        return self.take_proposed(self._ngrams.propose(self.output, most), self._ngrams)

    def take_proposed(self, tokens: list[int], proposed_by: Acceptance) -> list[int]:
        """The proposed tokens before the first that the rules forbid. `proposed_by` will learn what was accepted."""
        self._proposed_by = proposed_by
        return tokens if self.rules is None else tokens[: self.rules.possible(tokens)]

    def note_accepted(self, proposed: int, accepted: int) -> None:
        """Note how many of the tokens proposed last were accepted."""
        if self._proposed_by is not None:
            self._proposed_by.note(proposed, accepted)

    def append(self, score: TokenScore) -> None:
        """Append the next token. End the sequence at a stop token, where nothing may follow, or at `max_tokens`.

        Stop strings are found by `SequenceText`. The log probability is kept if the request asks for it.
        """
        token = score.token_id
        self.output.append(token)
        if self.request.logprobs is not None:
            self.scores.append(score)
        if token in self.stop_tokens and len(self.output) > self.request.min_tokens:
            self.ends_with_stop_token = True
            self.finish("stop", None if token in self.eos_ids else token)
        elif self.rules is not None and self.rules.advance(token):
            self.finish("stop")
        elif len(self.output) >= self.request.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End the sequence; `stop_reason` is the stop string or stop token that ended it."""
        self.finish_reason, self.stop_reason = reason, stop_reason

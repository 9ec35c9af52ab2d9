"""Decides what the next step computes: continuous batching, chunked prefill and prefix reuse. No tensors, no Redis."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.worker.engine.cache_slots import SlotTable
from headrace.worker.engine.draft_proposer import DraftProposer
from headrace.worker.engine.sequence import CachedPrefix, NoToken, Sequence, TokenScore

#: Sequences whose masks were late make room for others, up to this many times `max_rows` in all.
MOST_RUNNING = 4
#: A step is filled up to this many rows with proposed tokens. A GEMM with 16 rows takes hardly longer than one with
#: a few rows, because both read the whole weight.
SPECULATIVE_ROWS = 16


@dataclass(frozen=True)
class PromptChunk:
    """`count` tokens of a sequence's prompt from position `start`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def last(self) -> bool:
        """Whether it completes the prompt, so that the first token can be sampled."""
        return self.start + self.count == len(self.sequence.prompt)


class PrefixCopy(NamedTuple):
    """Copy the keys and values of the first `length` positions of a slot to the slot of a sequence."""

    source: Sequence | CachedPrefix
    target: Sequence
    length: int


@dataclass
class SchedulerOutput:
    """One forward pass: all decoding sequences, and the chunks of prompts that the token budget leaves room for."""

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[PromptChunk] = field(default_factory=list)
    #: Sequence whose prompt this step completes -> sequences with the same prompt, which reuse its whole prefill.
    same_prompt: dict[Sequence, list[Sequence]] = field(default_factory=dict)
    #: Decoding sequence -> proposed tokens after its next one, each computed in a row of its own.
    proposed: dict[Sequence, list[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def decode_rows(self) -> int:
        """Rows of the decoding sequences, with those of proposed tokens."""
        return len(self.decodes) + sum(map(len, self.proposed.values()))

    @property
    def prefilled(self) -> list[Sequence]:
        """The sequences whose prompt this step completes: those it computes, and those that reuse their prefill."""
        computed = [chunk.sequence for chunk in self.chunks if chunk.last]
        return [s for source in computed for s in (source, *self.same_prompt.get(source, ()))]

    @property
    def sampled_sequences(self) -> list[Sequence]:
        """The sequences that get a token from this step. A request for no tokens only has its prompt computed."""
        return [*self.decodes, *(s for s in self.prefilled if s.request.max_tokens > 0)]

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences that have rows in this step."""
        return [*self.decodes, *dict.fromkeys(chunk.sequence for chunk in self.chunks)]

    def by_sequence(self) -> Iterator[SchedulerOutput]:
        """The same work in steps of one sequence, without proposed tokens, to find the one that makes it fail."""
        for sequence in self.decodes:
            yield SchedulerOutput(decodes=[sequence])
        for _, chunks in itertools.groupby(self.chunks, key=lambda chunk: chunk.sequence):
            yield SchedulerOutput(chunks=list(chunks))


@dataclass(frozen=True)
class ModelRunnerOutput:
    """What the model runner computed for a step.

    Attributes:
        tokens: a token for each sampled sequence, or why it gets none. A sequence whose proposed tokens were accepted
            has one more entry for each of them, in order.
        prompt_scores: scores of prompt tokens for the requests that ask for them.
    """

    tokens: list[tuple[Sequence, TokenScore | NoToken]]
    prompt_scores: list[tuple[Sequence, list[TokenScore]]]


class Scheduler:
    """The waiting and running sequences of an engine.

    Sequences are admitted by priority, then by arrival. The first in the queue is never skipped, so short jobs cannot
    starve a long one.

    Args:
        slots: the slots of the key-value cache.
        max_rows: sequences that run at once (`max_num_seqs` in vLLM). Those whose masks were late do not count.
        step_tokens: tokens that one step computes (`max_num_batched_tokens` in vLLM). A step computes at least one
            chunk of a prompt even if its decoding rows exceed this.
        prefill_chunk: tokens of a chunk of a prompt.
        draft_tokens: proposed tokens for each sequence and step at most (`num_speculative_tokens` in vLLM).
        drafts: proposes tokens of a draft model where n-grams do not, or are accepted less often.
    """

    def __init__(
        self,
        slots: SlotTable,
        *,
        max_rows: int,
        step_tokens: int,
        prefill_chunk: int,
        draft_tokens: int = 0,
        drafts: DraftProposer | None = None,
    ) -> None:
        self.slots = slots
        self.max_rows = max_rows
        self.step_tokens = step_tokens
        self.prefill_chunk = prefill_chunk
        self.draft_tokens = draft_tokens
        self.drafts = drafts
        self.running: list[Sequence] = []
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._removed: set[Sequence] = set()  # removed while they waited; dropped when they are first in the queue
        self._arrivals = itertools.count()
        self._prefilling: dict[tuple[object, ...], Sequence] = {}
        #: Tokens of the prompts that are in the cache, and how many of them another sequence had computed.
        self.prefix_queries = self.prefix_hits = 0

    @property
    def waiting(self) -> int:
        """How many sequences have no slot yet."""
        return len(self._waiting) - len(self._removed)

    def add(self, sequence: Sequence, priority: int) -> None:
        """Put a sequence into the queue; lower numbers go first."""
        heapq.heappush(self._waiting, (priority, next(self._arrivals), sequence))

    def admit(self) -> list[Sequence]:
        """Move sequences from waiting to running while there are a row and a slot for the first in the queue."""
        admitted: list[Sequence] = []
        slow = sum(sequence.slow for sequence in self.running)
        most = min(self.max_rows + slow, MOST_RUNNING * self.max_rows)
        while self._waiting and len(self.running) < most:
            sequence = self._waiting[0][2]
            if sequence in self._removed:
                self._removed.discard(sequence)
            elif self._allocate(sequence):
                self.running.append(sequence)
                self._set_prefix_source(sequence)
                admitted.append(sequence)
            else:
                break
            heapq.heappop(self._waiting)
        return admitted

    def _allocate(self, sequence: Sequence) -> bool:
        """Give a sequence a slot. If the slot is the one with its cached prefix, that is reused where it is."""
        prefix, length = self._cached_prefix(sequence)  # counts as a use: it is evicted last
        held = prefix.slot if prefix is not None else None
        whole = prefix if prefix is not None and len(prefix.tokens) == length else None
        if not self.slots.allocate(sequence, whole):
            return False
        taken_over = prefix is not None and prefix.slot is None and sequence.slot == held
        sequence.prefilled = sequence.reused = length if taken_over else 0
        return True

    def schedule(self) -> SchedulerOutput:
        """The next step: the decoding sequences, then chunks of prompts in order of admission within the token budget.

        At least one chunk is included, however many rows decode. Where a chunk begins and ends depends on its prompt
        alone, so that the bits of its keys and values do not depend on the batch composition.
        """
        step = SchedulerOutput(decodes=self._decodes())
        self._add_proposed_tokens(step)
        room = self.step_tokens - step.decode_rows
        for sequence in self.running:
            if not sequence.prefilling or sequence.prefix_source is not None:
                continue
            for start in range(sequence.prefilled, len(sequence.prompt), self.prefill_chunk):
                chunk = PromptChunk(sequence, start, min(self.prefill_chunk, len(sequence.prompt) - start))
                if chunk.count > room and step.chunks:
                    return step
                step.chunks.append(chunk)
                room -= chunk.count
                if chunk.last and (same := self._waiting_for_prompt_of(sequence)):
                    step.same_prompt[sequence] = same
        return step

    def _decodes(self) -> list[Sequence]:
        """The sequences that decode, without those whose masks are late, unless there is nothing else to compute."""
        decoding = [s for s in self.running if not s.prefilling]
        found = [s for s in decoding if not s.late] or (decoding if len(decoding) == len(self.running) else [])
        if len(found) > self.max_rows:
            found.sort(key=lambda s: s.masks_s)  # those that made room displace no others
        return found[: self.max_rows]

    def _add_proposed_tokens(self, step: SchedulerOutput) -> None:
        """If few sequences decode, fill the step up to SPECULATIVE_ROWS with proposed tokens, in equal shares."""
        if not self.draft_tokens:
            return
        room = min(SPECULATIVE_ROWS, self.step_tokens) - len(step.decodes)
        drafted: dict[Sequence, int] = {}  # where n-grams propose nothing
        for i, sequence in enumerate(step.decodes):
            share = room // (len(step.decodes) - i)  # rows that one sequence does not use go to those after it
            if (most := min(share, self.draft_tokens, sequence.most_proposed)) <= 0:
                continue
            at_least = self.drafts.acceptance(sequence) if self.drafts is not None else 0.0
            if tokens := sequence.propose(most, at_least):
                step.proposed[sequence] = tokens
                room -= len(tokens)
            elif self.drafts is not None:
                drafted[sequence] = most
                room -= most
        if self.drafts is not None:
            step.proposed.update(self.drafts.propose(len(step.decodes), drafted))

    def advance(self, chunk: PromptChunk) -> None:
        """Note that a chunk is in the cache. If it completes a prompt, so are the sequences that reuse its prefill."""
        sequence = chunk.sequence
        sequence.prefilled = chunk.start + chunk.count
        if chunk.last:
            self._prefilling.pop(sequence.prefill_key, None)
            same = self._waiting_for_prompt_of(sequence)
            for other in same:
                other.prefix_source, other.prefilled, other.reused = None, sequence.prefilled, sequence.prefilled
            self.prefix_queries += len(sequence.prompt) * (1 + len(same))
            self.prefix_hits += sequence.reused + sum(other.reused for other in same)

    def remove(self, sequence: Sequence, keep: int = 0) -> None:
        """Remove a sequence, finished or not, and free its slot.

        Args:
            keep: tokens of its prompt that may stay in the cache; see `kept_prefix`.
        """
        if sequence.slot is None:
            self._removed.add(sequence)
            return
        self.running.remove(sequence)
        if self._prefilling.get(sequence.prefill_key) is sequence:
            del self._prefilling[sequence.prefill_key]
        self.slots.free(sequence, keep)
        for dependent in [s for s in self.running if s.prefix_source is sequence]:
            self._set_prefix_source(dependent)  # the first of them computes the prefix for the others

    def kept_prefix(self, sequence: Sequence) -> int:
        """How many tokens of its prompt may stay in the cache after a sequence: whole chunks without a NaN."""
        return sequence.proven_prefix // self.prefill_chunk * self.prefill_chunk if self.slots.prefixes.chunk else 0

    # --- prefix reuse ----------------------------------------------------------------------------------------------

    def _set_prefix_source(self, sequence: Sequence) -> None:
        """Find the sequence whose prefill this one reuses: one that computes the same prompt, else a common prefix."""
        same = self._prefilling.setdefault(sequence.prefill_key, sequence)
        if same is not sequence:
            sequence.prefix_source, sequence.prefix_length = same, len(sequence.prompt)
        else:
            sequence.prefix_source, sequence.prefix_length = self._longest_prefix(sequence)

    def _longest_prefix(self, sequence: Sequence) -> tuple[Sequence | CachedPrefix | None, int]:
        """What shares the most whole chunks, and how many tokens they are: a cached prefix, or another sequence.

        Only whole chunks are shared, because they have the same bits in every prompt that begins with them. Rows that
        give logits are not shared: the last one, from which the first token is sampled, and those of scored tokens.
        """
        best: tuple[Sequence | CachedPrefix | None, int] = None, sequence.prefilled
        if sequence.captures_activations or sequence.reusable_prefix < self.prefill_chunk:
            return None, 0  # it needs all of its rows, or has no whole chunk to reuse
        cached = self._cached_prefix(sequence)
        if cached[1] > best[1]:
            best = cached
        earlier = True
        for other in self.running:
            if other is sequence:
                earlier = False
            if other is sequence or other.adapter_digest != sequence.adapter_digest:
                continue
            # A later one only has what it need not wait for: it may wait for this one.
            count = self._common_prefix(sequence, other.prompt if earlier else other.prompt[: other.prefilled])
            if count > best[1]:
                best = other, count
        return best

    def _cached_prefix(self, sequence: Sequence) -> tuple[CachedPrefix | None, int]:
        """The cached prefix that shares the most whole chunks, and how many tokens they are."""
        prompt = [] if sequence.captures_activations else sequence.prompt[: sequence.reusable_prefix]
        return self.slots.prefixes.find(prompt, sequence.adapter_digest)

    def _common_prefix(self, sequence: Sequence, other: list[int]) -> int:
        prompt = sequence.prompt
        most = min(sequence.reusable_prefix, len(other)) // self.prefill_chunk * self.prefill_chunk
        for start in range(0, most, self.prefill_chunk):
            if prompt[start : start + self.prefill_chunk] != other[start : start + self.prefill_chunk]:
                return start
        return most

    def _waiting_for_prompt_of(self, source: Sequence) -> list[Sequence]:
        return [s for s in self.running if s.prefix_source is source and s.reuses_whole_prompt]

    def reuse_prefixes(self) -> list[PrefixCopy]:
        """The prefixes that their sources have computed by now; counts them as prefilled. Copy them in this order."""
        copies = []
        for sequence in self.running:  # a source is before the sequences that wait for it
            source = sequence.prefix_source
            if isinstance(source, CachedPrefix) and source.slot is None:  # a sequence admitted later has got its slot
                self._set_prefix_source(sequence)
                source = sequence.prefix_source
            if source is not None and not sequence.reuses_whole_prompt and source.prefilled >= sequence.prefix_length:
                copies.append(PrefixCopy(source, sequence, sequence.prefix_length))
                sequence.prefix_source, sequence.prefilled = None, sequence.prefix_length
                sequence.reused = sequence.prefix_length
        return copies

    def stop_sharing(self, step: SchedulerOutput) -> None:
        """Let sequences that reuse a prefill of this step compute their own, so that an error in one ends no other."""
        for sequence in itertools.chain.from_iterable(step.same_prompt.values()):
            sequence.prefix_source = None
        step.same_prompt.clear()

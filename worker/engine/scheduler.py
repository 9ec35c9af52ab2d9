"""What runs in the next step: decisions only, no tensors, no Redis."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.worker.engine.cache_slots import SlotTable
from headrace.worker.engine.sequence import Sequence, TokenScore

#: Rows up to which drafts are computed: a product of 16 rows takes hardly longer than one of a few, as both read the
#: whole weight.
DRAFT_ROWS = 16


@dataclass(frozen=True)
class PromptChunk:
    """`count` tokens of a sequence's prompt from position `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def last(self) -> bool:
        """Whether the prompt is through with it, so that the first token can be drawn."""
        return self.start + self.count == len(self.sequence.prompt)


class Copy(NamedTuple):
    """The keys and values of the first `length` tokens of a sequence's prompt go to another's slot."""

    source: Sequence
    target: Sequence
    length: int


@dataclass
class Step:
    """One forward pass: every decoding sequence, and as many chunks of prompts as the token budget leaves room for."""

    decodes: list[Sequence] = field(default_factory=list)
    chunks: list[PromptChunk] = field(default_factory=list)
    #: Sequence whose prompt is through in this step -> those that share its prefill.
    followers: dict[Sequence, list[Sequence]] = field(default_factory=dict)
    #: Decoding sequence -> guesses at the tokens after the next one, each computed in a row of its own.
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def decode_rows(self) -> int:
        """Rows of its decoding sequences."""
        return len(self.decodes) + sum(map(len, self.drafts.values()))

    @property
    def prefilled(self) -> list[Sequence]:
        """The sequences whose prompt is through with this step: those computed and those that share."""
        leaders = [chunk.sequence for chunk in self.chunks if chunk.last]
        return [s for leader in leaders for s in (leader, *self.followers.get(leader, ()))]

    @property
    def drawing(self) -> list[Sequence]:
        """The sequences that get a token out of this step; a request for none only has its prompt read."""
        return [*self.decodes, *(s for s in self.prefilled if s.request.max_tokens > 0)]

    @property
    def sequences(self) -> list[Sequence]:
        """Everyone with a row in it."""
        return [*self.decodes, *dict.fromkeys(chunk.sequence for chunk in self.chunks)]

    def alone(self) -> Iterator[Step]:
        """The same work one sequence at a time, without drafts, to find the one that makes the step fail."""
        for sequence in self.decodes:
            yield Step(decodes=[sequence])
        for _, chunks in itertools.groupby(self.chunks, key=lambda chunk: chunk.sequence):
            yield Step(chunks=list(chunks))


@dataclass(frozen=True)
class Outcome:
    """What a step gave: a token for each drawing sequence (None: its logits hold a NaN), and scores of prompts.

    A sequence has another token for each of its drafts that turned out right, in order.
    """

    tokens: list[tuple[Sequence, TokenScore | None]]
    prompt_scores: list[tuple[Sequence, list[TokenScore]]]


class Scheduler:
    """Waiting and running sequences. Admission is by priority, then arrival, and never skips the first in line, so a
    long job cannot be starved by short ones."""

    def __init__(
        self, slots: SlotTable, *, max_rows: int, step_tokens: int, prefill_chunk: int, draft_tokens: int = 0
    ) -> None:
        self.slots = slots
        self.max_rows = max_rows
        self.step_tokens = step_tokens
        self.prefill_chunk = prefill_chunk
        self.draft_tokens = draft_tokens
        self.running: list[Sequence] = []
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._gone: set[Sequence] = set()  # removed while waiting; skipped when their turn comes
        self._arrivals = itertools.count()
        self._leaders: dict[tuple[object, ...], Sequence] = {}

    @property
    def waiting(self) -> int:
        """How many sequences have no slot yet."""
        return len(self._waiting) - len(self._gone)

    def add(self, sequence: Sequence, priority: int) -> None:
        """Put a sequence in line; a lower number goes first."""
        heapq.heappush(self._waiting, (priority, next(self._arrivals), sequence))

    def admit(self) -> list[Sequence]:
        """Move sequences from waiting to running while there is a row and a slot for the first in line."""
        admitted = []
        while self._waiting and len(self.running) < self.max_rows:
            sequence = self._waiting[0][2]
            if sequence in self._gone:
                self._gone.discard(sequence)
            elif self.slots.place(sequence):
                self.running.append(sequence)
                self._join(sequence)
                admitted.append(sequence)
            else:
                break
            heapq.heappop(self._waiting)
        return admitted

    def _join(self, sequence: Sequence) -> None:
        """Share the prefill of a sequence with the same prompt that is still at it, or be the one to share.

        Who is the first of its prompt looks for one whose prompt begins alike.
        """
        leader = self._leaders.setdefault(sequence.share_key, sequence)
        if leader is not sequence:
            sequence.leader, sequence.shared = leader, len(sequence.prompt)
        else:
            sequence.leader, sequence.shared = self._find_beginning(sequence)

    def _find_beginning(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        """The one among those admitted earlier with the most whole chunks in common, and how many tokens they are.

        Whole chunks: they have the same bits in every prompt that begins with them. The last token is not among them,
        as the next one is drawn from its row.
        """
        best: tuple[Sequence | None, int] = None, sequence.prefilled
        if sequence.scores_prompt or sequence.traced or len(sequence.prompt) <= self.prefill_chunk:
            return None, 0  # all of its rows are needed, or there is no whole chunk to spare
        for other in itertools.takewhile(lambda other: other is not sequence, self.running):
            count = self._common(sequence.prompt, other.prompt)
            if count > best[1]:
                best = other, count
        return best

    def _common(self, prompt: list[int], other: list[int]) -> int:
        most = min(len(prompt) - 1, len(other)) // self.prefill_chunk * self.prefill_chunk
        for start in range(0, most, self.prefill_chunk):
            if prompt[start : start + self.prefill_chunk] != other[start : start + self.prefill_chunk]:
                return start
        return most

    def take_over(self) -> list[Copy]:
        """The beginnings of prompts that others have computed by now; counts them as computed. Copy in this order."""
        copies = []
        for sequence in self.running:  # a leader stands before those who wait for it
            leader = sequence.leader
            if leader is not None and not sequence.waits_for_whole and leader.prefilled >= sequence.shared:
                copies.append(Copy(leader, sequence, sequence.shared))
                sequence.leader, sequence.prefilled = None, sequence.shared
        return copies

    def plan(self) -> Step:
        """The next step: all decoding rows, then chunks of prompts in order of admission within the budget.

        At least one chunk goes in, however many rows decode, and a chunk's borders depend on its prompt alone.
        """
        step = Step(decodes=[s for s in self.running if not s.prefilling])
        self._add_drafts(step)
        room = self.step_tokens - step.decode_rows
        for sequence in self.running:
            if not sequence.prefilling or sequence.leader is not None:
                continue
            for start in range(sequence.prefilled, len(sequence.prompt), self.prefill_chunk):
                chunk = PromptChunk(sequence, start, min(self.prefill_chunk, len(sequence.prompt) - start))
                if chunk.count > room and step.chunks:
                    return step
                step.chunks.append(chunk)
                room -= chunk.count
                if chunk.last:
                    self._add_followers(step, sequence)
        return step

    def _add_drafts(self, step: Step) -> None:
        """Let few decoding sequences run ahead, in equal shares of the rows that cost little more than none."""
        room = min(DRAFT_ROWS, self.step_tokens) - len(step.decodes)
        if not self.draft_tokens or room <= 0:
            return
        for i, sequence in enumerate(step.decodes):
            share = room // (len(step.decodes) - i)  # what one leaves, the others may use
            if share > 0 and (drafts := sequence.draft_next(min(share, self.draft_tokens))):
                step.drafts[sequence] = drafts
                room -= len(drafts)

    def _add_followers(self, step: Step, leader: Sequence) -> None:
        if followers := [s for s in self.running if s.leader is leader and s.waits_for_whole]:
            step.followers[leader] = followers

    def detach_followers(self, step: Step) -> None:
        """Let those who share a prefill of this step compute their own: so an error in one cannot reach another."""
        for sequence in itertools.chain.from_iterable(step.followers.values()):
            sequence.leader = None
        step.followers.clear()

    def advance(self, chunk: PromptChunk) -> None:
        """Note that a chunk is in the cache; when its prompt is through, so it is for those who share it."""
        sequence = chunk.sequence
        sequence.prefilled = chunk.start + chunk.count
        if chunk.last:
            self._leaders.pop(sequence.share_key, None)
            for follower in self.running:
                if follower.leader is sequence and follower.waits_for_whole:
                    follower.leader, follower.prefilled = None, sequence.prefilled

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not."""
        if sequence.slot is None:
            self._gone.add(sequence)
            return
        self.running.remove(sequence)
        if self._leaders.get(sequence.share_key) is sequence:
            del self._leaders[sequence.share_key]
        for follower in [s for s in self.running if s.leader is sequence]:
            self._join(follower)  # the first starts over for the others
        self.slots.free(sequence)

"""Lays out a step as rows: token ids, positions and cache slots, and the rows whose logits are sampled."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from headrace.model.adapters.packed import AdapterRows
from headrace.model.attention import Chunk, DecodeGroup
from headrace.model.sampler import Draw, RowParams
from headrace.worker.engine.scheduler import PromptChunk, SchedulerOutput
from headrace.worker.engine.sequence import CachedPrefix, Sequence, Slot
from headrace.worker.engine.token_masks import MaskedRow

#: Parameters that the sampler takes from the request by name.
_FROM_REQUEST = tuple(name for name in RowParams.__dataclass_fields__ if name != "banned")


class SampledRow(NamedTuple):
    """A row from whose logits a token is sampled: the token of `sequence` that follows these proposed tokens."""

    sequence: Sequence
    row: int
    proposed: list[int]

    @property
    def output(self) -> list[int]:
        """The sequence's tokens so far, with those proposed."""
        return [*self.sequence.output, *self.proposed] if self.proposed else self.sequence.output

    def draw(self) -> Draw:
        """What the sampler needs to know. The stop tokens are banned until the sequence has `min_tokens`."""
        sequence, output = self.sequence, self.output
        free, without_stops = sequence.sampling or _sampling(sequence)
        params = without_stops if len(output) < sequence.request.min_tokens else free
        return Draw(params, sequence.prompt, output, sequence.seed, sequence.index)


class ScoredRows(NamedTuple):
    """Rows that give the log probabilities of `tokens` of a prompt: each row that of the token after it.

    `with_first`: the first token of the prompt, which has none, is before them.
    """

    sequence: Sequence
    rows: range
    tokens: list[int]
    with_first: bool


def _sampling(sequence: Sequence) -> tuple[RowParams, RowParams]:
    """The sampler's parameters of a sequence, without and with its stop tokens banned; kept for its later steps."""
    params = {name: getattr(sequence.request, name) for name in _FROM_REQUEST}
    pair = RowParams(**params), RowParams(**params, banned=tuple(sorted(sequence.stop_tokens)))
    sequence.sampling = pair
    return pair


def masked_rows(rows: list[SampledRow]) -> list[MaskedRow]:
    """The rows whose sequences may not get every token, by their indices."""
    return [
        MaskedRow(i, each.sequence.rules, each.output, each.proposed)
        for i, each in enumerate(rows)
        if each.sequence.rules is not None
    ]


def accepted_rows(rows: list[SampledRow], tokens: list[int]) -> list[int]:
    """Indices of the sampled tokens that count.

    A token counts if it follows no proposed token, or if all proposed tokens before it were sampled themselves.
    """
    accepted: list[int] = []
    for i, each in enumerate(rows):
        if not each.proposed or (accepted[-1] == i - 1 and tokens[i - 1] == each.proposed[-1]):
            accepted.append(i)
    return accepted


class InputBatch:
    """The rows of a step: decoding sequences arena by arena, then chunks of prompts.

    In an arena the sequences are in the order of their adapters, then of their slots, so that rows of one adapter are
    neighbours, which are computed together.
    """

    def __init__(self, step: SchedulerOutput) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.decode_groups: list[DecodeGroup] = []
        self.chunks: list[Chunk] = []
        #: The rows that have an adapter; neighbours with the same one are one entry.
        self.adapters: list[AdapterRows] = []
        self._step = step
        self._row_of: dict[Sequence, int] = {}  # the row that gives its next token; rows of proposed tokens follow it
        self._chunk_rows: list[int] = []
        decodes = sorted(step.decodes, key=_order)
        for length_class, members in itertools.groupby(decodes, key=lambda each: slot_of(each).length_class):
            self._add_decodes(length_class, list(members))
        for chunk in step.chunks:
            self._add_chunk(chunk)

    def _add_decodes(self, length_class: int, sequences: list[Sequence]) -> None:
        first, slots, proposed = len(self.token_ids), [slot_of(s).index for s in sequences], self._step.proposed
        starts = [len(s.prompt) + len(s.output) - 1 for s in sequences]
        for sequence, start in zip(sequences, starts, strict=True):
            self._row_of[sequence] = len(self.token_ids)
            tokens = [sequence.output[-1], *proposed.get(sequence, ())]
            self._note_adapter(sequence, len(tokens))
            self.token_ids += tokens
            self.positions += range(start, start + len(tokens))
        counts = [1 + len(proposed.get(s, ())) for s in sequences]
        self.decode_groups.append(DecodeGroup(length_class, slots, starts, counts, first))

    def _add_chunk(self, chunk: PromptChunk) -> None:
        slot, row, stop = slot_of(chunk.sequence), len(self.token_ids), chunk.start + chunk.count
        self.chunks.append(Chunk(slot.length_class, slot.index, chunk.start, chunk.count, row))
        self._chunk_rows.append(row)
        self._row_of[chunk.sequence] = row + chunk.count - 1
        self._note_adapter(chunk.sequence, chunk.count)
        self.token_ids += chunk.sequence.prompt[chunk.start : stop]
        self.positions += range(chunk.start, stop)

    def _note_adapter(self, sequence: Sequence, count: int) -> None:
        """Note whose adapter the next `count` rows have, before they are added."""
        adapter, first = sequence.adapter, len(self.token_ids)
        if adapter is None:
            return
        last = self.adapters[-1] if self.adapters else None
        if last is not None and last.adapter is adapter and last.first + last.count == first:
            self.adapters[-1] = AdapterRows(adapter, last.first, last.count + count)
        else:
            self.adapters.append(AdapterRows(adapter, first, count))

    def pad(self, count: int) -> None:
        """Add rows that belong to no sequence until there are `count`."""
        missing = count - len(self.token_ids)
        self.token_ids += [0] * missing
        self.positions += [0] * missing

    def sampled(self) -> list[SampledRow]:
        """The rows from which tokens are sampled: one for each sampled sequence, then its proposed tokens."""
        step = self._step
        source_of = {sequence: source for source, same in step.same_prompt.items() for sequence in same}
        rows = []
        for sequence in step.sampled_sequences:
            row, proposed = self._row_of[source_of.get(sequence, sequence)], step.proposed.get(sequence, [])
            rows += [SampledRow(sequence, row + i, proposed[:i]) for i in range(len(proposed) + 1)]
        return rows

    def spans(self) -> list[tuple[Sequence, slice]]:
        """Every sequence of the step with its rows; the chunks of a prompt are contiguous."""
        spans = {s: slice(self._row_of[s], self._row_of[s] + 1) for s in self._step.decodes}
        for row, chunk in zip(self._chunk_rows, self._step.chunks, strict=True):
            first = spans.get(chunk.sequence, slice(row, row)).start
            spans[chunk.sequence] = slice(first, row + chunk.count)
        return list(spans.items())

    def scored_rows(self) -> list[ScoredRows]:
        """The chunks of prompts whose log probabilities are asked for, with the rows that give them."""
        scored = []
        for row, chunk in zip(self._chunk_rows, self._step.chunks, strict=True):
            sequence = chunk.sequence
            if sequence.score_from is None:
                continue
            first = max(sequence.score_from, chunk.start + 1)
            tokens = sequence.prompt[first : chunk.start + chunk.count + 1]
            start = row + first - 1 - chunk.start
            with_first = chunk.start == 0 and sequence.score_from == 0
            if tokens or with_first:
                scored.append(ScoredRows(sequence, range(start, start + len(tokens)), tokens, with_first))
        return scored


def _order(sequence: Sequence) -> tuple[int, str, int, int]:
    """Where a decoding sequence is among the rows of a step."""
    slot = slot_of(sequence)
    return slot.length_class, sequence.adapter_digest, slot.index, sequence.index


def slot_of(sequence: Sequence | CachedPrefix) -> Slot:
    """The slot of a running sequence, or of a cached prefix."""
    if sequence.slot is None:  # pragma: no cover - the scheduler runs only sequences with a slot
        raise RuntimeError("a running sequence has no slot")
    return sequence.slot

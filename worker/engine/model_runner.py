"""Sequences -> tensors -> model -> tokens. The only torch in the worker beside the checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Rows
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from headrace.client.wire.activations import CHECKPOINT_TENSORS
from headrace.client.wire.requests import MAX_LOGPROBS
from headrace.model.activations import PROBS_TEMPERATURE, Trace
from headrace.model.cuda_graphs import decode_graphs
from headrace.model.gpt2 import GPT2
from headrace.model.kv_cache import CachedAttention, Chunk, DecodeGroup, KVCache
from headrace.model.sampler import Draw, RowParams, filtered, sample, top_logprobs
from headrace.worker.engine.cache_slots import Move
from headrace.worker.engine.scheduler import Copy, Outcome, PromptChunk, Step
from headrace.worker.engine.sequence import Sequence, Slot, TokenScore

#: Rows of a prompt whose log probabilities are taken at once: 128 rows of logits of GPT-2 are 26 MB.
SCORE_ROWS = 128


class Runner:
    """The model with its cache."""

    def __init__(self, model: GPT2, lengths: Rows[int]) -> None:
        self.model = model
        self.cache = KVCache(model.config, lengths=lengths, dtype=model.dtype, device=model.device)
        self.graphs = decode_graphs(model, self.cache)

    @property
    def position_bytes(self) -> int:
        """Bytes of cache that one position takes: keys and values of all layers."""
        config = self.model.config
        return 2 * config.n_layer * config.n_embd * self.model.dtype.itemsize

    @property
    def takes_drafts(self) -> bool:
        """Whether a step may have several rows of one sequence."""
        return self.cache.decode_kernel() is not None

    @property
    def dense(self) -> bool:
        """Whether the slots in use should be the first of their arena: torch's attention reads all up to the last."""
        return self.cache.decode_kernel() is None

    def fit(self, capacity: dict[int, int]) -> None:
        """Bring every arena to the capacity the slot table asks for; those that shrink first."""
        for length, count in sorted(capacity.items(), key=lambda item: item[1] - self.cache.arenas[item[0]].capacity):
            if self.cache.arenas[length].capacity != count:
                self.graphs.forget()  # they hold the addresses of the arenas
                self.cache.arenas[length].resize(count)

    def move(self, move: Move) -> None:
        """Bring a sequence to another slot. Nothing stays there of who had it, for a trace tells what the cache holds;
        and nothing stays behind: an unfinished prompt may hold NaN."""
        arena = self.cache.arenas[move.length_class]
        arena.clear(move.target)
        arena.copy(move.source, move.target, move.length)
        arena.clear(move.source, move.length)

    def copy(self, copy: Copy) -> None:
        """Give a sequence the keys and values of a beginning that it shares with another."""
        source, target = _slot(copy.source), _slot(copy.target)
        if source.length_class == target.length_class:
            self.cache.arenas[source.length_class].copy(source.index, target.index, copy.length)
            return
        origin, goal = self.cache.arenas[source.length_class], self.cache.arenas[target.length_class]
        for old, new in zip((*origin.k, *origin.v), (*goal.k, *goal.v), strict=True):
            new[target.index, :, : copy.length] = old[source.index, :, : copy.length]

    def clear(self, slot: Slot) -> None:
        """Zero the slot of a sequence that may have left a NaN in it."""
        self.cache.arenas[slot.length_class].clear(slot.index)

    @torch.inference_mode()
    def run(self, step: Step) -> Outcome:
        """One forward pass over everything in the step, and a token for each sequence that is due one."""
        batch = _Batch(step)
        traced = self._traced(step, batch)
        hidden = None
        if not batch.chunks and not traced:
            hidden = self.graphs.forward(batch.token_ids, batch.groups)
        if hidden is None:
            hidden = self._forward(batch, [sequence.trace.at(rows) for sequence, rows in traced])
        for sequence, rows in traced:
            self._trace_step(sequence, hidden[rows])
        prompt_scores = [self._score(chunk, hidden[rows]) for chunk, rows in batch.scored(step)]
        self._share_prefills(step)
        outcome = Outcome(self._draw(batch.drawn(step), hidden), prompt_scores)
        for sequence, _ in traced:
            sequence.trace.commit()
        return outcome

    def _forward(self, batch: _Batch, traces: list[Trace]) -> Tensor:
        batch.pad(self.model.padded_rows(len(batch.token_ids)))
        tokens, positions = (torch.tensor(x, device=self.model.device) for x in (batch.token_ids, batch.positions))
        attend = CachedAttention.of(self.cache, self.model.config.scale, groups=batch.groups, chunks=batch.chunks)
        return self.model.forward(tokens, positions, attend, traces)

    def _draw(self, drawn: list[_Drawn], hidden: Tensor) -> list[tuple[Sequence, TokenScore | None]]:
        """Next tokens; sequences that share a prefill share its last row, and the head runs once for it."""
        if not drawn:
            return []
        rows = [each.row for each in drawn]
        at = {row: i for i, row in enumerate(dict.fromkeys(rows))}
        logits = self.model.head(hidden[torch.tensor(list(at), device=hidden.device)])
        if len(at) < len(rows):
            logits = logits[torch.tensor([at[row] for row in rows], device=hidden.device)]
        tokens = sample(logits, [each.sequence.draw(each.drafts) for each in drawn])
        for i, (sequence, _, _) in enumerate(drawn):
            if sequence.trace is not None and not sequence.output:
                self._trace_last(sequence, logits[i].float())
        chosen: list[int] = tokens.tolist()
        kept = _kept(drawn, chosen)
        if len(kept) < len(drawn):
            rest = torch.tensor(kept, device=logits.device)
            logits, tokens = logits[rest], tokens[rest]
        sequences = [drawn[i].sequence for i in kept]
        return list(zip(sequences, self._token_scores(sequences, logits, tokens), strict=True))

    def _traced(self, step: Step, batch: _Batch) -> list[tuple[Sequence, slice]]:
        """The sequences whose tensors are asked for, with their rows; a new one gets a trace and an empty slot."""
        traced = []
        for sequence, rows in batch.spans(step):
            if sequence.traced:
                if sequence.trace is None:
                    sequence.trace = Trace(self.model.config.scale, len(sequence.prompt))
                if not sequence.prefilled:  # perhaps not for the first time: in between it may have been moved
                    self.clear(_slot(sequence))
                traced.append((sequence, rows))
        return traced

    def _trace_step(self, sequence: Sequence, hidden: Tensor) -> None:
        """After the pass: the prompt's logits, and what the cache of block 0 holds now. hidden: [rows, E]."""
        trace, slot, count = sequence.trace, _slot(sequence), len(sequence.prompt)
        arena = self.cache.arenas[slot.length_class]
        k, v = (tensors[0][slot.index].transpose(0, 1) for tensors in (arena.k, arena.v))  # [length, H, D]
        if sequence.prefilling:
            trace.append(logits=self.model.head(hidden).float())
            trace.keep(cache_k=k[:count], cache_v=v[:count], cache_rest=torch.cat([k[count:], v[count:]]).abs().sum())
        written = count + len(sequence.output)
        trace.keep(cache_k_end=k[:written], cache_v_end=v[:written])

    def _trace_last(self, sequence: Sequence, logits: Tensor) -> None:
        """What the first token is drawn from, as the sampler sees it. logits: [V]."""
        params = RowParams(temperature=PROBS_TEMPERATURE)
        greedy = Draw(RowParams(temperature=0), sequence.prompt, [], 0, 0)
        sequence.trace.keep(
            last_logits=logits, next_token=sample(logits[None], [greedy])[0], probs=filtered(logits[None], [params])[0]
        )

    def collect(self, sequence: Sequence) -> dict[str, bytes]:
        """The tensors that a finished sequence was asked for, each as safetensors bytes, numbers in float32."""
        tensors = {**sequence.trace.finish(), "tokens": torch.tensor(sequence.output, dtype=torch.long)}
        wanted = dict.fromkeys(name for n in sequence.request.checkpoints for name in CHECKPOINT_TENSORS[n])
        return {name: _to_bytes(tensors[name]) for name in wanted if name in tensors}

    def _token_scores(self, sequences: list[Sequence], logits: Tensor, tokens: Tensor) -> list[TokenScore | None]:
        chosen: list[int] = tokens.tolist()
        scores = [None if token < 0 else TokenScore(token, None, []) for token in chosen]
        asked = [i for i, s in enumerate(sequences) if s.request.logprobs is not None and chosen[i] >= 0]
        if asked:
            rows = torch.tensor(asked, device=logits.device)
            for i, score in zip(asked, _scores(logits[rows].float(), tokens[rows]), strict=True):
                scores[i] = score
        return scores

    def _score(self, chunk: PromptChunk, hidden: Tensor) -> tuple[Sequence, list[TokenScore]]:
        """Log probabilities of the prompt tokens that follow each position of the chunk. hidden: [count, E]."""
        sequence = chunk.sequence
        following = sequence.prompt[chunk.start + 1 : chunk.start + chunk.count + 1]
        scores = [TokenScore(sequence.prompt[0], None, [])] if chunk.start == 0 else []
        for start in range(0, len(following), SCORE_ROWS):
            tokens = torch.tensor(following[start : start + SCORE_ROWS], device=hidden.device)
            scores += _scores(self.model.head(hidden[start : start + len(tokens)]).float(), tokens)
        return sequence, scores

    def _share_prefills(self, step: Step) -> None:
        """Copy the cache of prompts that are through to the sequences that waited for them."""
        for leader, followers in step.followers.items():
            for follower in followers:
                self.copy(Copy(leader, follower, len(leader.prompt)))


def _to_bytes(tensor: Tensor) -> bytes:
    plain = tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu()
    return save({"tensor": plain.contiguous()})


def _scores(logits: Tensor, tokens: Tensor) -> list[TokenScore]:
    """Always equally many likeliest tokens: how ties among them fall must not depend on what a neighbour asked."""
    count = min(MAX_LOGPROBS, logits.shape[-1])
    chosen, ids, values = (tensor.tolist() for tensor in top_logprobs(logits, tokens, count))
    return [
        TokenScore(token, logprob, list(zip(row_ids, row_values, strict=True)))
        for token, logprob, row_ids, row_values in zip(tokens.tolist(), chosen, ids, values, strict=True)
    ]


class _Drawn(NamedTuple):
    """A packed row from which a sequence's token is drawn that follows these drafts."""

    sequence: Sequence
    row: int
    drafts: list[int]


def _kept(drawn: list[_Drawn], chosen: list[int]) -> list[int]:
    """Which of the drawn tokens count: those that follow no draft, or a draft that was drawn and counts itself."""
    kept: list[int] = []
    for i, each in enumerate(drawn):
        if not each.drafts or (kept[-1] == i - 1 and chosen[i - 1] == each.drafts[-1]):
            kept.append(i)
    return kept


class _Batch:
    """A step laid out as packed rows: decoding sequences arena by arena in slot order, then the chunks of prompts."""

    def __init__(self, step: Step) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.groups: list[DecodeGroup] = []
        self.chunks: list[Chunk] = []
        self._drafts = step.drafts
        self._row_of: dict[Sequence, int] = {}  # the row whose logits give its next token; its drafts' rows follow
        self._chunk_rows: list[int] = []
        decodes = sorted((_slot(sequence), sequence.index, id(sequence), sequence) for sequence in step.decodes)
        for length_class, members in itertools.groupby(decodes, key=lambda item: item[0].length_class):
            self._add_group(length_class, [sequence for *_, sequence in members])
        for chunk in step.chunks:
            self._add_chunk(chunk)

    def _add_group(self, length_class: int, sequences: list[Sequence]) -> None:
        first, slots = len(self.token_ids), [_slot(s).index for s in sequences]
        starts = [len(s.prompt) + len(s.output) - 1 for s in sequences]
        for sequence, start in zip(sequences, starts, strict=True):
            self._row_of[sequence] = len(self.token_ids)
            tokens = [sequence.output[-1], *self._drafts.get(sequence, ())]
            self.token_ids += tokens
            self.positions += range(start, start + len(tokens))
        counts = [1 + len(self._drafts.get(s, ())) for s in sequences]
        self.groups.append(DecodeGroup(length_class, slots, starts, counts, first))

    def _add_chunk(self, chunk: PromptChunk) -> None:
        slot, row, stop = _slot(chunk.sequence), len(self.token_ids), chunk.start + chunk.count
        self.chunks.append(Chunk(slot.length_class, slot.index, chunk.start, chunk.count, row))
        self._chunk_rows.append(row)
        self._row_of[chunk.sequence] = row + chunk.count - 1
        self.token_ids += chunk.sequence.prompt[chunk.start : stop]
        self.positions += range(chunk.start, stop)

    def pad(self, count: int) -> None:
        """Add rows of no sequence until there are `count`."""
        missing = count - len(self.token_ids)
        self.token_ids += [0] * missing
        self.positions += [0] * missing

    def drawn(self, step: Step) -> list[_Drawn]:
        """The rows from which tokens are drawn: for each of `step.drawing` one, and those of its drafts after it."""
        leader_of = {follower: leader for leader, group in step.followers.items() for follower in group}
        drawn = []
        for sequence in step.drawing:
            row, drafts = self._row_of[leader_of.get(sequence, sequence)], self._drafts.get(sequence, [])
            drawn += [_Drawn(sequence, row + i, drafts[:i]) for i in range(len(drafts) + 1)]
        return drawn

    def spans(self, step: Step) -> list[tuple[Sequence, slice]]:
        """Every sequence of the step with its packed rows; a prompt's chunks lie end to end."""
        spans = {sequence: slice(self._row_of[sequence], self._row_of[sequence] + 1) for sequence in step.decodes}
        for row, chunk in zip(self._chunk_rows, step.chunks, strict=True):
            first = spans.get(chunk.sequence, slice(row, row)).start
            spans[chunk.sequence] = slice(first, row + chunk.count)
        return list(spans.items())

    def scored(self, step: Step) -> list[tuple[PromptChunk, slice]]:
        """The chunks whose prompt's log probabilities are asked for, with their rows."""
        rows = [slice(row, row + chunk.count) for row, chunk in zip(self._chunk_rows, step.chunks, strict=True)]
        return [(chunk, at) for chunk, at in zip(step.chunks, rows, strict=True) if chunk.sequence.scores_prompt]


def _slot(sequence: Sequence) -> Slot:
    if sequence.slot is None:  # pragma: no cover - the scheduler runs only sequences with a slot
        raise RuntimeError("a running sequence has no slot")
    return sequence.slot

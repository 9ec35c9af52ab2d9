"""Runs steps on the model: sequences to tensors, one forward pass, sampling, tokens. Owns the key-value cache.

Shapes: M rows of a step, E embedding, V vocabulary, KV heads of keys and values, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Rows

import torch
from safetensors.torch import save
from torch import Tensor

from headrace.client.wire.activations import CHECKPOINT_TENSORS
from headrace.client.wire.requests import MAX_LOGPROBS
from headrace.model.activations import PROBS_TEMPERATURE, ActivationCapture
from headrace.model.attention import CachedAttention
from headrace.model.cuda_graphs import decode_graphs
from headrace.model.decoder import Decoder
from headrace.model.kv_cache import KVCache
from headrace.model.sampler import NO_TOKEN, Draw, RowParams, TokenMasks, filtered, sample, top_logprobs
from headrace.worker.engine.cache_slots import SlotMove
from headrace.worker.engine.input_batch import (
    InputBatch,
    SampledRow,
    ScoredRows,
    accepted_rows,
    masked_rows,
    slot_of,
)
from headrace.worker.engine.scheduler import ModelRunnerOutput, PrefixCopy, SchedulerOutput
from headrace.worker.engine.sequence import NoToken, Sequence, Slot, TokenScore
from headrace.worker.engine.token_masks import Masks, MaskThreads, PendingMasks

#: Prompt positions whose log probabilities are computed at once: 128 rows of GPT-2's logits are 26 MB.
SCORE_ROWS = 128


class ModelRunner:
    """A model with its key-value cache. Implements `StepRunner`.

    Args:
        model: computes the forward pass.
        lengths: length classes of the cache, in positions. Every arena begins with no slots; see `fit`.
    """

    def __init__(self, model: Decoder, lengths: Rows[int]) -> None:
        self.model = model
        self.cache = KVCache(model.config, lengths=lengths, dtype=model.dtype, device=model.device)
        self.graphs = decode_graphs(model, self.cache)
        self._masks = MaskThreads()

    @property
    def position_bytes(self) -> int:
        """Bytes of the keys and values of one position, all layers together."""
        config = self.model.config
        return 2 * config.n_layer * config.kv_heads * config.head_dim * self.model.dtype.itemsize

    @property
    def takes_proposed_tokens(self) -> bool:
        """Whether a step may have several decoding rows of one sequence, as speculative decoding needs."""
        return self.cache.decode_kernel() is not None

    @property
    def dense(self) -> bool:
        """Whether the slots in use should be the first of their arena: torch's attention reads up to the last slot."""
        return self.cache.decode_kernel() is None

    # --- the cache -------------------------------------------------------------------------------------------------

    def fit(self, capacity: dict[int, int]) -> None:
        """Resize the arena of each length class to this many slots; arenas that shrink are resized first."""
        for length, count in sorted(capacity.items(), key=lambda item: item[1] - self.cache.arenas[item[0]].capacity):
            if self.cache.arenas[length].capacity != count:
                self.graphs.forget()  # they hold the addresses of the arenas
                self.cache.arenas[length].resize(count)

    def move(self, move: SlotMove) -> None:
        """Move a sequence to another slot.

        The target is cleared first, because captured activations show what the cache holds. The source is cleared
        afterwards, because an unfinished prompt may hold a NaN.
        """
        arena = self.cache.arenas[move.length_class]
        arena.clear(move.target)
        arena.copy(move.source, move.target, move.length)
        arena.clear(move.source, move.length)

    def copy(self, copy: PrefixCopy) -> None:
        """Copy the keys and values of a prefix to a sequence."""
        source, target = slot_of(copy.source), slot_of(copy.target)
        if source.length_class == target.length_class:
            self.cache.arenas[source.length_class].copy(source.index, target.index, copy.length)
            return
        origin, goal = self.cache.arenas[source.length_class], self.cache.arenas[target.length_class]
        for old, new in zip((*origin.k, *origin.v), (*goal.k, *goal.v), strict=True):
            new[target.index, :, : copy.length] = old[source.index, :, : copy.length]

    def clear(self, slot: Slot, start: int = 0, stop: int | None = None) -> None:
        """Set positions of a slot to zero, by default all, because its sequence may have left a NaN in them."""
        self.cache.arenas[slot.length_class].clear(slot.index, stop, start=start)

    # --- a step ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Compute one forward pass over all rows of the step, and sample a token for each sequence that gets one."""
        batch = InputBatch(step)
        sampled = batch.sampled()
        masked = masked_rows(sampled)
        masks = self._masks.begin(masked, others=len(masked) < len(sampled) or bool(step.chunks)) if masked else None
        captured = self._captured(batch)
        hidden = None
        if not batch.chunks and not captured and not batch.adapters:
            hidden = self.graphs.forward(batch.token_ids, batch.decode_groups)
        if hidden is None:
            hidden = self._forward(batch, [sequence.activations.at(rows) for sequence, rows in captured])
        for sequence, rows in captured:
            self._capture_step(sequence, hidden[rows])
        prompt_scores = self._score_prompts(batch.scored_rows(), hidden)
        for source, same in step.same_prompt.items():
            for sequence in same:
                self.copy(PrefixCopy(source, sequence, len(source.prompt)))
        outcome = ModelRunnerOutput(self._sample(sampled, hidden, masks), prompt_scores)
        for sequence, _ in captured:
            if not sequence.late:  # else this row is computed again
                sequence.activations.commit()
        return outcome

    def _forward(self, batch: InputBatch, traces: list[ActivationCapture]) -> Tensor:
        """Hidden states of the rows, [M, E], M rounded up to what the model computes well."""
        batch.pad(self.model.padded_rows(len(batch.token_ids)))
        tokens, positions = (torch.tensor(x, device=self.model.device) for x in (batch.token_ids, batch.positions))
        attend = CachedAttention.of(self.cache, groups=batch.decode_groups, chunks=batch.chunks)
        return self.model.forward(tokens, positions, attend, traces, batch.adapters)

    def _sample(
        self, rows: list[SampledRow], hidden: Tensor, masks: PendingMasks | None
    ) -> list[tuple[Sequence, TokenScore | NoToken]]:
        """Sample next tokens, and keep those that count. Sequences with the same row share logits. hidden: [M, E]

        Sequences whose masks are late get no token.
        """
        if not rows:
            return []
        indices = [each.row for each in rows]
        at = {row: i for i, row in enumerate(dict.fromkeys(indices))}
        adapter_of = {each.row: each.sequence.adapter for each in rows}
        logits = self.model.head(hidden[torch.tensor(list(at), device=hidden.device)], [adapter_of[row] for row in at])
        if len(at) < len(indices):
            logits = logits[torch.tensor([at[row] for row in indices], device=hidden.device)]
        found = None if masks is None else masks.result()
        if found is not None and found.late:
            ready = [i for i in range(len(rows)) if i not in found.late]
            if not ready:
                return []
            rows, logits = [rows[i] for i in ready], logits[torch.tensor(ready, device=logits.device)]
        tokens = self._tokens(rows, logits, found)
        for i, (sequence, _, _) in enumerate(rows):
            if sequence.activations is not None and not sequence.output:
                self._capture_first_token(sequence, logits[i].float())
        accepted = accepted_rows(rows, tokens.tolist())
        if len(accepted) < len(rows):
            kept = torch.tensor(accepted, device=logits.device)
            logits, tokens = logits[kept], tokens[kept]
        sequences = [rows[i].sequence for i in accepted]
        return list(zip(sequences, self._token_scores(sequences, logits, tokens), strict=True))

    def _tokens(self, rows: list[SampledRow], logits: Tensor, masks: Masks | None) -> Tensor:
        """Sample a token for each row; see `sample`. logits: [R, V], overwritten if nothing reads them later."""
        draws = [each.draw() for each in rows]
        if masks is None or not masks.rows:
            return sample(logits, draws)
        # Log probabilities and captured activations are of the logits without masks.
        read = any(s.request.logprobs is not None or s.activations is not None for s, _, _ in rows)
        return sample(logits.clone() if read else logits, draws, TokenMasks(masks.rows, masks.words))

    def _token_scores(self, sequences: list[Sequence], logits: Tensor, tokens: Tensor) -> list[TokenScore | NoToken]:
        """Scores of sampled tokens, or why there is none. logits: [R, V], tokens: [R]."""
        token_ids: list[int] = tokens.tolist()
        scores = [TokenScore(token, None, []) if token >= 0 else _no_token(token) for token in token_ids]
        asked = [i for i, s in enumerate(sequences) if s.request.logprobs is not None and token_ids[i] >= 0]
        if asked:
            rows, count = torch.tensor(asked, device=logits.device), _count_of_others(sequences[i] for i in asked)
            for i, score in zip(asked, _scores(logits[rows].float(), tokens[rows], count), strict=True):
                scores[i] = score
        return scores

    def _score_prompts(self, scored: list[ScoredRows], hidden: Tensor) -> list[tuple[Sequence, list[TokenScore]]]:
        """Log probabilities of the tokens of prompts that are asked for. hidden: [M, E].

        Only the rows before these tokens go through the head, those of all prompts of the step together.
        """
        rows = [row for each in scored for row in each.rows]
        tokens = [token for each in scored for token in each.tokens]
        adapters = [each.sequence.adapter for each in scored for _ in each.rows]
        scores: list[TokenScore] = []
        count = _count_of_others(each.sequence for each in scored)
        for start in range(0, len(rows), SCORE_ROWS):
            part = slice(start, start + SCORE_ROWS)
            indices, targets = (torch.tensor(x[part], device=hidden.device) for x in (rows, tokens))
            logits = self.model.head(hidden[indices], adapters[part]).float()
            scores += _scores(logits, targets, count, ranked=True)
        of_rows = iter(scores)
        found = []
        for each in scored:
            first = [TokenScore(each.sequence.prompt[0], None, [])] if each.with_first else []
            found.append((each.sequence, [*first, *itertools.islice(of_rows, len(each.rows))]))
        return found

    # --- captured activations --------------------------------------------------------------------------------------

    def _captured(self, batch: InputBatch) -> list[tuple[Sequence, slice]]:
        """The sequences whose activations are captured, with their rows. A new one gets an empty slot."""
        captured = []
        for sequence, rows in batch.spans():
            if sequence.captures_activations:
                if sequence.activations is None:
                    sequence.activations = ActivationCapture(self.model.config.layer_scale(0), len(sequence.prompt))
                if not sequence.prefilled:  # this may be true again: its first step failed, and it was moved since then
                    self.clear(slot_of(sequence))
                captured.append((sequence, rows))
        return captured

    def _capture_step(self, sequence: Sequence, hidden: Tensor) -> None:
        """Capture the prompt's logits, and what the cache of block 0 holds after the pass. hidden: [rows, E]."""
        trace, slot, count = sequence.activations, slot_of(sequence), len(sequence.prompt)
        arena = self.cache.arenas[slot.length_class]
        k, v = (tensors[0][slot.index].transpose(0, 1) for tensors in (arena.k, arena.v))  # [length, KV, D]
        if sequence.prefilling:
            trace.append(logits=self.model.head(hidden, [sequence.adapter] * len(hidden)).float())
            trace.keep(cache_k=k[:count], cache_v=v[:count], cache_rest=torch.cat([k[count:], v[count:]]).abs().sum())
        written = count + len(sequence.output)
        trace.keep(cache_k_end=k[:written], cache_v_end=v[:written])

    def _capture_first_token(self, sequence: Sequence, logits: Tensor) -> None:
        """Capture what the first token is sampled from, as the sampler sees it. logits: [V]."""
        params = RowParams(temperature=PROBS_TEMPERATURE)
        greedy = Draw(RowParams(temperature=0), sequence.prompt, [], 0, 0)
        sequence.activations.keep(
            last_logits=logits, next_token=sample(logits[None], [greedy])[0], probs=filtered(logits[None], [params])[0]
        )

    def collect(self, sequence: Sequence) -> dict[str, bytes]:
        """The activations captured for a finished sequence, each as safetensors bytes by name, in float32."""
        wanted = dict.fromkeys(name for n in sequence.request.checkpoints for name in CHECKPOINT_TENSORS[n])
        tensors = sequence.activations.finish(scores="scores" in wanted)
        tensors["tokens"] = torch.tensor(sequence.output, dtype=torch.long)
        return {name: _to_bytes(tensors[name]) for name in wanted if name in tensors}


def _no_token(code: int) -> NoToken:
    return NoToken.MASKED if code == NO_TOKEN else NoToken.NAN


def _to_bytes(tensor: Tensor) -> bytes:
    plain = tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu()
    return save({"tensor": plain.contiguous()})


def _count_of_others(sequences: Iterable[Sequence]) -> int:
    """How many of the likeliest tokens are found for these sequences: none if no request asks for any.

    Otherwise always the same number, so that the order of ties does not depend on what other requests ask for.
    """
    requests = (sequence.request for sequence in sequences)
    return MAX_LOGPROBS if any(request.logprobs or request.prompt_logprobs for request in requests) else 0


def _scores(logits: Tensor, tokens: Tensor, count: int, *, ranked: bool = False) -> list[TokenScore]:
    """Log probabilities of the tokens and of the `count` likeliest ones. logits: [R, V], tokens: [R]."""
    count = min(count, logits.shape[-1])
    chosen, ids, values = (tensor.tolist() for tensor in top_logprobs(logits, tokens, count))
    own = logits.gather(1, tokens[:, None])
    ranks = ((logits > own).sum(-1) + 1).tolist() if ranked else [None] * len(tokens)
    return [
        TokenScore(token, logprob, list(zip(row_ids, row_values, strict=True)), rank)
        for token, logprob, row_ids, row_values, rank in zip(tokens.tolist(), chosen, ids, values, ranks, strict=True)
    ]

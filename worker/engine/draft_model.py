"""A draft model: a small model that proposes how texts continue (speculative decoding, Leviathan et al. 2023).

It has a key-value cache of its own: a few slots of one length. The tokens in a slot are compared with the text at each
call, which computes from the first one that differs. So nobody has to say which proposed tokens were accepted, and
nothing has to be undone.
"""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from headrace.model.attention import CachedAttention, DecodeGroup
from headrace.model.decoder import Decoder
from headrace.model.kv_cache import KVCache
from headrace.model.sampler import sample
from headrace.worker.engine.input_batch import SampledRow
from headrace.worker.engine.sequence import Sequence


class DraftModel:
    """Implements `Drafter` with a model.

    Args:
        model: has the vocabulary of the model whose texts it continues.
        length: positions of a slot.
        slots: how many sequences have a slot at a time.
    """

    def __init__(self, model: Decoder, *, length: int, slots: int) -> None:
        self.model, self.length = model, length
        self._cache = KVCache(model.config, lengths=[length], dtype=model.dtype, device=model.device)
        self._cache.arenas[length].resize(slots)
        #: The sequences that have slots: those that ended are not kept alive.
        self._slot_of: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()
        #: For each slot the tokens whose keys and values it holds.
        self._held: list[list[int]] = [[] for _ in range(slots)]

    @property
    def works(self) -> bool:
        """Whether it can be used: several rows of one sequence in a step need the compiled attention."""
        return self._cache.decode_kernel() is not None

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache."""
        arena = self._cache.arenas[self.length]
        return sum(tensor.nbytes for tensor in (*arena.k, *arena.v))

    def missing(self, sequence: Sequence) -> int:
        """How many tokens of a sequence it would have to compute before it can propose one."""
        slot = self._slot_of.get(sequence)
        held = [] if slot is None else self._held[slot]
        text = [*sequence.prompt, *sequence.output]
        return len(text) - _common(held, text)

    @torch.inference_mode()
    def propose(self, counts: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Continue each sequence by at most so many tokens, drawn as the model would draw them with the same numbers.

        No more sequences than slots. A slot must hold the text and all of its proposed tokens but the last.
        """
        slots = self._slots(list(counts))
        proposed: dict[Sequence, list[int]] = {sequence: [] for sequence in counts}
        writing = sorted((s for s in counts if counts[s] > 0), key=slots.__getitem__)
        while writing:
            logits = self._forward([(slots[s], [*s.prompt, *s.output, *proposed[s]]) for s in writing])
            tokens = sample(logits, [SampledRow(s, 0, proposed[s]).draw() for s in writing]).tolist()
            for sequence, token in zip(writing, tokens, strict=True):
                if token >= 0:
                    proposed[sequence].append(token)
            writing = [
                sequence
                for sequence, token in zip(writing, tokens, strict=True)
                if token >= 0 and len(proposed[sequence]) < counts[sequence]
            ]
        return proposed

    def _forward(self, texts: list[tuple[int, list[int]]]) -> Tensor:
        """The logits after each text. texts: slot and tokens, in the order of the slots. -> [texts, V]."""
        starts = [_common(self._held[slot], text) for slot, text in texts]
        counts = [len(text) - start for (_, text), start in zip(texts, starts, strict=True)]
        ids = [token for (_, text), start in zip(texts, starts, strict=True) for token in text[start:]]
        positions = [at for start, count in zip(starts, counts, strict=True) for at in range(start, start + count)]
        last = torch.tensor(counts).cumsum(0) - 1
        padding = [0] * (self.model.padded_rows(len(ids)) - len(ids))
        group = DecodeGroup(self.length, [slot for slot, _ in texts], starts, counts, 0)
        hidden = self.model.forward(
            torch.tensor(ids + padding),
            torch.tensor(positions + padding),
            CachedAttention.of(self._cache, groups=[group], chunks=[]),
        )
        for slot, text in texts:
            self._held[slot] = text
        return self.model.head(hidden[last])

    def _slots(self, sequences: list[Sequence]) -> dict[Sequence, int]:
        """The slots of these sequences. Those without one get the slots of sequences that are not among them."""
        slots = {sequence: slot for sequence in sequences if (slot := self._slot_of.get(sequence)) is not None}
        free = [slot for slot in range(len(self._held)) if slot not in slots.values()]
        for sequence in sequences:
            if sequence not in slots:
                slot = slots[sequence] = free.pop()
                self._held[slot] = []
                for owner in [each for each, its in self._slot_of.items() if its == slot]:
                    del self._slot_of[owner]
                self._slot_of[sequence] = slot
        return slots


def _common(held: list[int], text: list[int]) -> int:
    """How many tokens of a text a slot holds: never the last one, whose logits are wanted."""
    count = min(len(held), len(text) - 1)
    while held[:count] != text[:count]:
        count -= 1
    return count

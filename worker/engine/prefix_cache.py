"""The prefix cache: finds the longest prefix of a prompt that finished sequences have left in their slots. No tensors.

A prefix is found by the hash of its adapter and its tokens, then compared token for token. An engine has one cache, so
all of it is of the same base weights.
"""

from __future__ import annotations

import hashlib
from array import array

from headrace.worker.engine.sequence import CachedPrefix, Slot


class PrefixCache:
    """The cached prefixes by the hashes of their chunks, in the order of their last use.

    Args:
        chunk: tokens of a prefill chunk, in which prefixes are cached; 0: nothing is cached.
    """

    def __init__(self, chunk: int = 0) -> None:
        self.chunk = chunk
        #: Counts uses; the clock of `CachedPrefix.used_at`.
        self.now = 0
        self._order: dict[CachedPrefix, None] = {}
        #: Key -> the prefixes that begin with these tokens, in the order in which they were added.
        self._holders: dict[bytes, dict[CachedPrefix, None]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def in_order(self) -> list[CachedPrefix]:
        """All prefixes, the least recently used first."""
        return list(self._order)

    def find(self, tokens: list[int], adapter: str = "") -> tuple[CachedPrefix | None, int]:
        """The cached prefix with the most whole chunks in common, and how many tokens they are; counts as a use.

        Args:
            tokens: the prompt.
            adapter: digest of the adapter that is to compute it; empty for none.
        """
        keys = self._keys(tokens, adapter)
        for count in range(len(keys), 0, -1):
            if (found := self._holder(keys[count - 1], tokens[: count * self.chunk], adapter)) is not None:
                return found, count * self.chunk
        return None, 0

    def add(self, tokens: list[int], slot: Slot, adapter: str = "") -> CachedPrefix | None:
        """Cache the whole chunks of `tokens`, which are in a slot. None if there are none, or they are cached.

        Args:
            tokens: the beginning of a prompt.
            slot: the slot that holds its keys and values.
            adapter: digest of the adapter that computed them; empty for none.
        """
        keys = self._keys(tokens, adapter)
        tokens = tokens[: len(keys) * self.chunk]
        if not keys or self._holder(keys[-1], tokens, adapter) is not None:
            return None
        prefix = CachedPrefix(tokens, keys, slot, adapter)
        for key in keys:
            self._holders.setdefault(key, {})[prefix] = None
        self._use(prefix)
        return prefix

    def continued_by(self, prefix: CachedPrefix) -> list[CachedPrefix]:
        """The cached prefixes all of whose tokens are the first ones of `prefix`: nothing is lost with them."""
        shorter = [each for key in prefix.keys[:-1] for each in self._holders[key] if each.keys[-1] == key]
        return [
            each
            for each in shorter
            if each.adapter == prefix.adapter and each.tokens == prefix.tokens[: len(each.tokens)]
        ]

    def remove(self, prefix: CachedPrefix) -> None:
        """Forget a prefix, because its slot is needed."""
        prefix.slot = None
        del self._order[prefix]
        for key in prefix.keys:
            holders = self._holders[key]
            del holders[prefix]
            if not holders:
                del self._holders[key]

    def _keys(self, tokens: list[int], adapter: str) -> list[bytes]:
        """For each whole chunk the hash of the adapter's digest and all tokens up to its end."""
        found, keys = hashlib.blake2b(digest_size=16), []
        found.update(adapter.encode())
        for end in range(self.chunk, len(tokens) + 1, self.chunk) if self.chunk else ():
            found.update(array("q", tokens[end - self.chunk : end]).tobytes())
            keys.append(found.digest())
        return keys

    def _holder(self, key: bytes, tokens: list[int], adapter: str) -> CachedPrefix | None:
        """The newest cached prefix that begins with these tokens, whose key it is; counts as a use."""
        for prefix in reversed(self._holders.get(key, {})):
            if prefix.adapter == adapter and prefix.tokens[: len(tokens)] == tokens:
                self._use(prefix)
                return prefix
        return None

    def _use(self, prefix: CachedPrefix) -> None:
        self.now += 1
        prefix.used_at = self.now
        self._order.pop(prefix, None)
        self._order[prefix] = None

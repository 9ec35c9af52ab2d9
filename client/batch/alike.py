"""Requests that differ only in their prompts and names, as the rows of most tables do: their common part is read once.

A million rows would otherwise have the same parameters checked and serialized a million times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from typing import Any

from headrace.client.batch.endpoints import COMPLETIONS
from headrace.client.batch.items import BatchItem, digest_of, seed_of
from headrace.client.wire.requests import MAX_PROMPT_BYTES

#: What stands for name and prompt in the JSON of which a digest is made. No other text has it: `made_from` compares.
_NAME, _PROMPT = "\0name\0", "\0prompt\0"


class Template:
    """Makes requests like one that was read: with the same parameters, another prompt and another name.

    Args:
        fields: of the request.
        content: that of which its digest was made.
    """

    def __init__(self, fields: Mapping[str, Any], content: Mapping[str, Any], *, has_own_seed: bool) -> None:
        text = json.dumps({**content, "custom_id": _NAME, "prompt": _PROMPT}, sort_keys=True, separators=(",", ":"))
        self._before, _, rest = text.partition(json.dumps(_NAME))
        self._between, _, self._after = rest.partition(json.dumps(_PROMPT))
        self._fields, self._has_own_seed = dict(fields), has_own_seed

    @classmethod
    def made_from(cls, item: BatchItem, model: str) -> Template | None:
        """The template of requests like this one; None if they have more than a digest of prompt and parameters."""
        if item.endpoint != COMPLETIONS.path or item.as_token_ids or item.prompts is not None or item.mistake:
            return None
        own = ("priority", "timeout_s", *(() if item.has_own_seed else ("seed",)))
        content = {name: value for name, value in item.fields.items() if name not in own} | {"model": model}
        try:
            made = cls(item.fields, content, has_own_seed=item.has_own_seed)
        except (TypeError, ValueError):
            return None  # parameters that JSON cannot represent as they are
        again = made.item(item.line, item.custom_id, item.fields["prompt"], item.columns)
        same = again == item and again.digest == digest_of({**content, "custom_id": item.custom_id})
        return made if same else None

    def item(self, line: int, custom_id: str, prompt: str, columns: Mapping[str, Any]) -> BatchItem:
        """The request with this name and prompt."""
        name, text = encode_basestring_ascii(custom_id), encode_basestring_ascii(prompt)
        content = f"{self._before}{name}{self._between}{text}{self._after}"
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        fields = self._fields.copy()
        fields["prompt"] = prompt
        if not self._has_own_seed:
            fields["seed"] = seed_of(digest)
        return BatchItem(line, custom_id, fields, digest, has_own_seed=self._has_own_seed, columns=columns)


class CheckedParameters:
    """The parameters of the last request that was checked, which need no check for the next request."""

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}

    def add(self, row: BatchItem) -> None:
        """Note a request that is right."""
        plain = row.prompts is None and not row.fields.keys() & {"echo", "prompt_logprobs", "continuation", "messages"}
        self._fields = row.fields if plain else {}

    def cover(self, row: BatchItem) -> bool:
        """Whether a request is right because it has the same parameters, as the same objects, and a usual prompt."""
        fields, known = row.fields, self._fields
        prompt = fields.get("prompt")
        if type(prompt) is not str or not prompt.isascii() or len(prompt) > MAX_PROMPT_BYTES:
            return False
        if len(fields) != len(known):
            return False
        own = ("prompt",) if row.has_own_seed else ("prompt", "seed")
        return all(name in own or (name in known and known[name] is value) for name, value in fields.items())

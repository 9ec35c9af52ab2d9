"""One request of a batch, and conversions of values from pyarrow, numpy and pandas."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.client.batch.openai import ENDPOINT
from headrace.client.wire.errors import InvalidRequest
from headrace.client.wire.values import json_default


@dataclass(frozen=True, slots=True)
class BatchItem:
    """A request of a batch.

    Attributes:
        line: the line in the input, from 1; of an iterable, the position of the item, from 1.
        custom_id: the name of the request in input and output.
        fields: what `Client.submit` takes, including the seed.
        digest: 16 hexadecimal digits, equal for requests that must have the same result.
        as_token_ids: whether the output names tokens by their ids.
        prompts: the prompts of a request with a list of them, each computed as a job; None if it has one prompt.
        endpoint: the path of the endpoint in whose form the answer is written.
        mistake: why the request can never be computed, if it is to be answered by that and not to refuse the batch.
        columns: columns of the input that are passed through to the output.
        has_own_seed: whether the request set a seed, so that `fields` does not have one derived from the digest.
    """

    line: int
    custom_id: str
    fields: dict[str, Any]
    digest: str
    as_token_ids: bool = False
    prompts: list[Any] | None = None
    has_own_seed: bool = True
    mistake: InvalidRequest | None = None
    endpoint: str = ENDPOINT
    columns: Mapping[str, Any] = field(default_factory=dict)

    def job_id(self, run: str) -> str:
        """The id of the job. It is the same in every process of the run, so a resumed run finds its submitted jobs."""
        return f"{run}.{digest_of(self.fields | {'custom_id': self.custom_id})}"

    def requests(self) -> list[dict[str, Any]]:
        """What `Client.submit` takes for each job of the request: one, or one for each prompt of a list."""
        if self.prompts is None:
            return [self.fields]
        requests = [{**self.fields, "prompt": prompt} for prompt in self.prompts]
        if not self.has_own_seed:  # one for each prompt, so that equal prompts have samples that differ
            for index, fields in enumerate(requests):
                fields["seed"] = seed_of(digest_of({"seed": self.fields["seed"], "prompt": index}))
        return requests


def seed_of(digest: str) -> int:
    """The seed of a request that has none. Every computation of the request draws the same numbers."""
    return int(digest[:13], 16)


def digest_of(content: dict[str, Any]) -> str:
    """16 hexadecimal digits, equal for equal content. Raises InvalidRequest for content that JSON cannot represent."""
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=json_default)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            "line", f"a value that JSON cannot represent ({error})", "texts, numbers, and lists of them"
        ) from None
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_column(value: Any) -> bool:
    """Whether a value can be iterated, perhaps only by index, and is not a single prompt or request."""
    if isinstance(value, (str, bytes, Mapping)):
        return False
    try:
        iter(value)
    except TypeError:
        return False
    return True

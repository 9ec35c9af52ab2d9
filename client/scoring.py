"""The verbs of `Client` and `AsyncClient` that score texts and choose among answers."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any, Protocol, overload

from headrace.client.batch.scores import (
    Normalization,
    Score,
    best_answer,
    check_answers,
    check_pairs,
    check_prompts,
    like_column,
    score_fields,
    score_of,
    score_pairs,
)
from headrace.client.batch.window import MAX_INFLIGHT, JobService

#: Jobs that `AsyncClient.score_many` submits at once: one message.
_TOGETHER = 16


class _Jobs(JobService, Protocol):
    def submit(self, prompt: Any = None, **params: Any) -> Any:
        """`Client.submit`."""

    def score_many(self, pairs: Iterable[Any], *, max_inflight: int = ..., **params: Any) -> Iterator[Score]:
        """`Client.score_many`."""


class ScoringVerbs:
    """What `Client` offers to score texts."""

    def score(
        self: _Jobs,
        prompt: str | Sequence[int],
        continuation: str | Sequence[int],
        *,
        timeout: float | None = None,
        **params: Any,
    ) -> Score:
        """The log probability of a continuation after a prompt.

        As evaluation harnesses do, white space at the end of the prompt is moved to the continuation, the tokens of
        both together are split where those of the prompt end, and the empty prompt is the token that begins a text.

        Args:
            prompt: text, or token ids.
            continuation: of the same kind, not empty.
            timeout: seconds to wait for the score; None waits for ever.
            params: `model`, `adapter`, `priority`, `timeout_s`; `logprobs`, the number of the likeliest tokens at each
                place.

        Raises:
            InvalidRequest, QueueFull, RedisUnreachable, RedisRefused, RedisUnsuitable: as for `submit`.
            ResultTimeout, JobError: as for `Job.result`. JobFailed also if all tokens of the two together are those of
                the prompt, so that the continuation has none.
        """
        return score_of(self.submit(**score_fields((prompt, continuation), params)).result(timeout))

    def score_many(
        self: JobService, pairs: Iterable[Any], *, max_inflight: int = MAX_INFLIGHT, **params: Any
    ) -> Iterator[Score]:
        """Yield the scores of pairs in their order. Reads at most `max_inflight` pairs ahead.

        Pairs with a common beginning should follow each other: its whole chunks (HEADRACE_PREFILL_CHUNK tokens) are
        then computed once.

        Args:
            pairs: each a prompt and a continuation, or a mapping of `prompt`, `continuation` and own parameters.
            params: defaults for pairs that do not set the parameter.

        Raises:
            InvalidRequest, JobFailed, JobExpired, ...: when the wrong or failed pair is reached. All unfinished jobs
                are cancelled then, as they are when the iterator is closed.
        """
        return score_pairs(self, pairs, params, max_inflight=max_inflight)

    @overload
    def choose(self, prompts: str, answers: Sequence[str], *, normalize: Normalization = ..., **params: Any) -> str: ...
    @overload
    def choose(self, prompts: Any, answers: Sequence[str], *, normalize: Normalization = ..., **params: Any) -> Any: ...
    def choose(
        self: _Jobs, prompts: Any, answers: Sequence[str], *, normalize: Normalization = "none", **params: Any
    ) -> Any:
        """The likeliest of the given answers after a prompt, by their scores; see `score`.

        Args:
            prompts: a text; or many: an iterable of texts, such as a column of a table.
            answers: texts as they follow the prompt, most of them with a space before the first word.
            normalize: compare the probabilities of whole answers (`none`, which favours short ones), or the mean log
                probability of a `token`, a `character` or a `byte`.
            params: as for `score_many`.

        Returns:
            One of `answers`; for many prompts a list of them, and for a pandas Series a Series with its index.
        """
        given = check_answers(answers, normalize)
        found, one = check_prompts(prompts)
        pairs = itertools.product(found, given)
        scores = self.score_many(pairs, **params)
        groups = iter(lambda: list(itertools.islice(scores, len(given))), [])
        chosen = [best_answer(given, group, normalize) for group in groups]
        return chosen[0] if one else like_column(prompts, chosen)


class _AsyncJobs(Protocol):
    async def submit(self, prompt: Any = None, **params: Any) -> Any:
        """`AsyncClient.submit`."""

    async def submit_many(self, requests: Iterable[Any], **params: Any) -> list[Any]:
        """`AsyncClient.submit_many`."""

    async def cancel(self, jobs: Any) -> Any:
        """`AsyncClient.cancel`."""

    def score_many(self, pairs: Iterable[Any], *, max_inflight: int = ..., **params: Any) -> AsyncIterator[Score]:
        """`AsyncClient.score_many`."""


class AsyncScoringVerbs:
    """What `AsyncClient` offers to score texts."""

    async def score(
        self: _AsyncJobs,
        prompt: str | Sequence[int],
        continuation: str | Sequence[int],
        *,
        timeout: float | None = None,
        **params: Any,
    ) -> Score:
        """The log probability of a continuation after a prompt; see `Client.score`."""
        job = await self.submit(**score_fields((prompt, continuation), params))
        return score_of(await job.result(timeout))

    async def score_many(
        self: _AsyncJobs, pairs: Iterable[Any], *, max_inflight: int = MAX_INFLIGHT, **params: Any
    ) -> AsyncIterator[Score]:
        """Yield the scores of pairs in their order; see `Client.score_many`. An error names its pair in its part."""
        check_pairs(pairs)
        waiting: deque[Any] = deque()
        source = iter(pairs)
        try:
            while part := [
                score_fields(pair, params) for pair in itertools.islice(source, min(_TOGETHER, max_inflight))
            ]:
                while len(waiting) + len(part) > max_inflight:
                    yield score_of(await waiting[0].result())
                    waiting.popleft()
                waiting += await self.submit_many(part)
            while waiting:
                yield score_of(await waiting[0].result())
                waiting.popleft()
        finally:
            if waiting:
                await self.cancel(list(waiting))

    async def choose(
        self: _AsyncJobs, prompts: Any, answers: Sequence[str], *, normalize: Normalization = "none", **params: Any
    ) -> Any:
        """The likeliest of the given answers after a prompt, or after each of many; see `Client.choose`."""
        given = check_answers(answers, normalize)
        found, one = check_prompts(prompts)
        pairs = itertools.product(found, given)
        scores = [score async for score in self.score_many(pairs, **params)]
        groups = [scores[at : at + len(given)] for at in range(0, len(scores), len(given))]
        chosen = [best_answer(given, group, normalize) for group in groups]
        return chosen[0] if one else like_column(prompts, chosen)

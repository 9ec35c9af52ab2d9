"""Scores of continuations: the jobs that compute them, and what their results say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from headrace.client.batch.frames import column_names
from headrace.client.batch.items import is_column
from headrace.client.batch.map import check_no_table, map_prompts
from headrace.client.batch.window import MAX_INFLIGHT, JobService
from headrace.client.wire.errors import InvalidRequest, JobFailed
from headrace.client.wire.results import Result, TokenLogprob
from headrace.client.wire.values import show, to_python

#: What a log probability is divided by, so that long answers compare with short ones.
Normalization = Literal["none", "token", "character", "byte"]
_PAIR = "a prompt and a continuation, or a mapping of `prompt`, `continuation` and own parameters"


class Score(BaseModel):
    """The log probability (base e) of a continuation after its prompt, before temperature and penalties."""

    model_config = ConfigDict(frozen=True)

    #: Of the whole continuation: the sum over its tokens.
    logprob: float
    #: Whether each token of the continuation is the likeliest one at its place.
    is_greedy: bool
    #: The tokens of the continuation.
    tokens: list[TokenLogprob]
    #: Length of the continuation.
    characters: int
    bytes: int

    @property
    def token_logprobs(self) -> list[float]:
        """The log probability of each token."""
        return [token.logprob for token in self.tokens if token.logprob is not None]

    def normalized(self, by: Normalization = "none") -> float:
        """The log probability, or what it is for each token, character or byte (of UTF-8) on average."""
        return (
            self.logprob / {"none": 1, "token": len(self.tokens), "character": self.characters, "byte": self.bytes}[by]
        )


def score_fields(pair: Any, params: Mapping[str, Any]) -> dict[str, Any]:
    """What `Client.submit` takes for a pair. Raises InvalidRequest if it is none; the field is empty."""
    pair = to_python(pair)
    if isinstance(pair, Mapping):
        own = {name: pair[name] for name in pair}
    elif isinstance(pair, (list, tuple)) and len(pair) == 2:
        own = {"prompt": pair[0], "continuation": pair[1]}
    else:
        raise InvalidRequest("pair", show(pair), _PAIR)
    if own.get("continuation") is None:
        raise InvalidRequest("continuation", "nothing", _PAIR)
    return {**params, **own, "max_tokens": 0}


def score_of(result: Result) -> Score:
    """The score that a worker computed. Raises JobFailed if its result has none."""
    choice = result.choices[0]
    if not choice.logprobs:
        raise JobFailed("unreadable_result", "the worker's answer has no log probabilities")
    return Score(
        logprob=math.fsum(token.logprob for token in choice.logprobs if token.logprob is not None),
        is_greedy=all(token.rank == 1 for token in choice.logprobs),
        tokens=choice.logprobs,
        characters=len(choice.text),
        bytes=len(choice.text.encode()),
    )


def score_pairs(
    client: JobService, pairs: Iterable[Any], params: Mapping[str, Any], *, max_inflight: int = MAX_INFLIGHT
) -> Iterator[Score]:
    """See `Client.score_many`."""
    check_pairs(pairs)
    results = map_prompts(client, _numbered(pairs, params), {}, max_inflight=max_inflight)
    return _scores(results)


def check_pairs(pairs: Any) -> None:
    """Refuse what has no pairs, and a whole table, which iterates over its columns. Raises InvalidRequest."""
    given = f"a {type(pairs).__name__}"
    if not is_column(pairs):
        raise InvalidRequest("pairs", given, "an iterable of pairs; use score for one")
    if column_names(pairs) is not None:
        expected = "pairs from two of its columns, for example zip(frame['prompt'], frame['continuation'])"
        raise InvalidRequest("pairs", given, expected)


def _numbered(pairs: Iterable[Any], params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for index, pair in enumerate(pairs):
        try:
            yield score_fields(pair, params)
        except InvalidRequest as error:
            raise InvalidRequest(f"prompts[{index}].{error.field}", error.value, error.expected) from None


def _scores(results: Iterator[Any]) -> Iterator[Score]:
    try:
        for result in results:
            yield score_of(result)
    except InvalidRequest as error:
        raise InvalidRequest(error.field.replace("prompts[", "pairs[", 1), error.value, error.expected) from None
    finally:
        results.close()  # type: ignore[attr-defined]  # a generator, which cancels the unfinished jobs


def check_prompts(prompts: Any) -> tuple[list[str], bool]:
    """The prompts of `Client.choose`, and whether it is one that was given. Raises InvalidRequest."""
    if not is_column(prompts):
        if not isinstance(prompts, str):
            raise InvalidRequest("prompts", show(prompts), "text, or a list or column of texts")
        return [prompts], True
    check_no_table(prompts)
    found = [to_python(prompt) for prompt in prompts]
    wrong = next((index for index, prompt in enumerate(found) if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise InvalidRequest(f"prompts[{wrong}]", show(found[wrong]), "text")
    return found, False


def check_answers(answers: Any, normalize: Any) -> list[str]:
    """The answers of `Client.choose`. Raises InvalidRequest."""
    found = to_python(answers)
    found = list(found) if isinstance(found, (list, tuple)) else []
    if not found or not all(isinstance(answer, str) and answer for answer in found) or len(set(found)) < len(found):
        raise InvalidRequest("answers", show(answers), "a list of texts, none empty, each of them once")
    if normalize not in ("none", "token", "character", "byte"):
        raise InvalidRequest("normalize", show(normalize), "'none', 'token', 'character' or 'byte'")
    return found


def best_answer(answers: Sequence[str], scores: Sequence[Score], normalize: Normalization) -> str:
    """The answer with the highest score; the first of equal ones."""
    return max(zip(answers, scores, strict=True), key=lambda pair: pair[1].normalized(normalize))[0]


def like_column(prompts: Any, answers: list[str]) -> Any:
    """The answers as a column with the index and the name of the prompts, if these are a pandas Series; else a list."""
    if hasattr(prompts, "index") and hasattr(prompts, "to_frame"):
        return type(prompts)(answers, index=prompts.index, name=prompts.name, dtype=object)
    return answers

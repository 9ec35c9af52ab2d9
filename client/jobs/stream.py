"""Events of a job that streams -> its text in order, each token once.

A job may be computed more than once: after a worker was killed another begins again, and both write the same text, cut
in other places. Every piece says where it belongs, so what has been told already is left out, and a piece behind a gap
waits for the result, which has everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from headrace.client.wire.errors import StreamChanged
from headrace.client.wire.requests import Result, StreamEvent, StreamPiece, TokenLogprob

if TYPE_CHECKING:
    from headrace.client.jobs.handle import Handle


@dataclass(frozen=True)
class Event:
    """Text that one sample gained, in whole characters, and the tokens it came from; with `echo` the prompt is first.

    The pieces of a sample make up its `Choice` in the result: text, token ids, and log probabilities if asked for.
    """

    #: Which sample, from 0 to n - 1.
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    #: Set in the last piece of each sample.
    finish_reason: Literal["stop", "length"] | None = None
    #: Set in the last event of all, which has no text.
    result: Result | None = None


@dataclass
class _Told:
    """What of one sample has been told."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False


class Reader:
    """Remembers what was told of a job, and makes of each entry what is new in it."""

    def __init__(self, job: Handle) -> None:
        self._job = job
        self._told: dict[int, _Told] = {}

    def take(self, entry: str) -> Iterator[Event]:
        """What is new in an entry of the stream; nothing in one that cannot be read. Raises StreamChanged."""
        try:
            pieces = StreamEvent.model_validate_json(entry).pieces
        except ValidationError:
            return
        for piece in pieces:
            yield from self._take_piece(piece)

    def finish(self, result: Result) -> Iterator[Event]:
        """All that has not been told, and the result. Raises StreamChanged."""
        for choice in result.choices:
            yield from self._take_piece(
                StreamPiece(
                    index=choice.index,
                    text=choice.text,
                    token_ids=choice.token_ids,
                    logprobs=choice.logprobs,
                    finish_reason=choice.finish_reason,
                )
            )
        yield Event(result=result)

    def _take_piece(self, piece: StreamPiece) -> Iterator[Event]:
        told = self._told.setdefault(piece.index, _Told())
        known, known_text = len(told.token_ids) - piece.at, len(told.text) - piece.text_at
        if known < 0 or known_text < 0:
            return  # what stands before it never came
        if not (
            _agree(told.token_ids[piece.at :], piece.token_ids, piece.finish_reason)
            and _agree(told.text[piece.text_at :], piece.text, piece.finish_reason)
        ):
            raise StreamChanged(self._job.id).about(self._job)
        text, tokens = piece.text[known_text:], piece.token_ids[known:]
        if text or tokens or (piece.finish_reason and not told.finished):
            told.text += text
            told.token_ids += tokens
            told.finished = piece.finish_reason is not None
            logprobs = None if piece.logprobs is None else piece.logprobs[known:]
            yield Event(piece.index, text, tokens, logprobs, piece.finish_reason)


def _agree(told: list[int] | str, new: list[int] | str, last: str | None) -> bool:
    """Whether both are the same as far as both go; what is told may not go beyond the last piece."""
    common = min(len(told), len(new))
    return told[:common] == new[:common] and not (last and len(told) > len(new))

"""Convert the event stream of a job to its text, in order and with each token once.

A job may be computed more than once: after a worker was killed, another one starts it again, and both write the same
text in different pieces. Every piece has its position, so text that was yielded before is skipped. After a gap, the
rest is taken from the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ValidationError

from headrace.client.wire.errors import StreamChanged
from headrace.client.wire.results import Result, StreamEvent, StreamPiece, TokenLogprob


@dataclass(frozen=True)
class Event:
    """New text of one sample, in whole characters, and its tokens. With `echo` the prompt comes first.

    The events of a sample, joined, are its `Choice` in the result: text, token ids, and log probabilities if requested.
    """

    #: The sample, from 0 to n - 1.
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    #: Set in the last event of each sample.
    finish_reason: Literal["stop", "length"] | None = None
    #: Set in the last event of the job, which has no text: all of it, with the seed and the fingerprint.
    result: Result | None = None
    #: In the last event of a sample: the stop string or stop token id that ended it, if one did.
    stop_reason: str | int | None = None
    #: In the last event of a sample with `structured_outputs`: whether its text has the form, as in its `Choice`.
    complete: bool | None = None
    #: Number of tokens of the prompt; None if a worker of an earlier version computes the job.
    prompt_tokens: int | None = None


@dataclass
class _Yielded:
    """The part of one sample that has been yielded."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False


class StreamReader:
    """Turns the entries of a job's event stream into events with the text that is new in each."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._yielded: dict[int, _Yielded] = {}

    def take(self, entry: str) -> Iterator[Event]:
        """The events for one entry; none for an entry that cannot be read. Raises StreamChanged."""
        try:
            pieces = StreamEvent.model_validate_json(entry).pieces
        except ValidationError:
            return
        for piece in pieces:
            yield from self._take_piece(piece)

    def finish(self, result: Result) -> Iterator[Event]:
        """The events for the rest of the result, and one with the result. Raises StreamChanged."""
        for choice in result.choices:
            yield from self._take_piece(
                StreamPiece(
                    index=choice.index,
                    text=choice.text,
                    token_ids=choice.token_ids,
                    logprobs=choice.logprobs,
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                    complete=choice.complete,
                    prompt_tokens=result.usage.prompt_tokens,
                )
            )
        yield Event(result=result)

    def _take_piece(self, piece: StreamPiece) -> Iterator[Event]:
        before = self._yielded.setdefault(piece.index, _Yielded())
        known, known_text = len(before.token_ids) - piece.at, len(before.text) - piece.text_at
        if known < 0 or known_text < 0:
            return  # pieces before this one are missing
        if not (
            _agree(before.token_ids[piece.at :], piece.token_ids, piece.finish_reason)
            and _agree(before.text[piece.text_at :], piece.text, piece.finish_reason)
        ):
            raise StreamChanged(self._job_id)
        text, tokens = piece.text[known_text:], piece.token_ids[known:]
        if text or tokens or (piece.finish_reason and not before.finished):
            before.text += text
            before.token_ids += tokens
            before.finished = piece.finish_reason is not None
            logprobs = None if piece.logprobs is None else piece.logprobs[known:]
            yield Event(
                index=piece.index,
                text=text,
                token_ids=tokens,
                logprobs=logprobs,
                finish_reason=piece.finish_reason,
                stop_reason=piece.stop_reason,
                complete=piece.complete,
                prompt_tokens=piece.prompt_tokens,
            )


def _agree(before: list[int] | str, new: list[int] | str, last: str | None) -> bool:
    """Whether one is a prefix of the other. `before` must not be longer than the last piece of a sample."""
    common = min(len(before), len(new))
    return before[:common] == new[:common] and not (last and len(before) > len(new))

"""The text of one sequence: decoding, stop strings, and the pieces in which it is streamed."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from headrace.client.wire.results import Choice, TokenLogprob, TopLogprob
from headrace.model.tokenizer import OffsetCounter, Tokenizer, continues
from headrace.worker.engine.sequence import FinishReason, Sequence, TokenScore


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that one sample gained, in whole characters, with its tokens; the last delta has a `finish_reason`.

    Each delta is a slice of the choice in the result, which begins with the prompt if the request has `echo`: tokens
    and log probabilities from index `at`, text from character `text_at`.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    at: int = 0
    text_at: int = 0
    logprobs: list[TokenLogprob] | None = None
    stop_reason: int | str | None = None
    prompt_tokens: int | None = None
    complete: bool | None = None


class SeenText:
    """A text with the special tokens that the caller's text leaves out, where stop strings are looked for.

    Args:
        tokenizer: of the model.
        output: the tokens before the first special one.
        shown: how many characters the caller's text of them has.
        inside: as for `Tokenizer.decoder`.
    """

    def __init__(self, tokenizer: Tokenizer, output: list[int], shown: int, *, inside: bool) -> None:
        self._decoder = tokenizer.decoder(inside=inside)
        self.text = "".join(map(self._decoder.push, output))
        self.scan_from = 0  # no stop string begins before this character
        self._before = len(self.text)
        #: Characters here and in the caller's text after each token from here on.
        self._lengths = [(len(self.text), shown)]

    def push(self, token_id: int, shown: int, *, last: bool) -> None:
        """Append the text of a token, after which the caller's text has `shown` characters."""
        self._before = len(self.text)
        self.text += self._decoder.push(token_id) + (self._decoder.flush() if last else "")
        self._lengths.append((len(self.text), shown))

    def find(self, stops: list[str], longest: int) -> list[tuple[int, str]]:
        """The stop strings that the newest token completes, and where the caller's text must be cut for each."""
        start = max(self.scan_from, self._before - longest + 1)
        found = [(self.text.find(stop, start), stop) for stop in stops]
        return [(self.shown_before(at), stop) for at, stop in found if at >= 0]

    def shown_before(self, at: int) -> int:
        """How many characters of the caller's text are before character `at` of this text."""
        index = bisect.bisect_right(self._lengths, at, key=lambda lengths: lengths[0])
        if not index:
            return at
        seen, shown = self._lengths[index - 1]
        later = self._lengths[index][1] if index < len(self._lengths) else shown
        return min(shown + at - seen, later)


class SequenceText:
    """Decodes the tokens of a sequence as they come, and ends the sequence at a stop string.

    Args:
        sequence: whose output is decoded.
        tokenizer: of the model that computes it.
        prompt_text: text of the prompt, for requests with `echo`.
        prompt_rest: bytes of an incomplete character at the end of the prompt. They are a U+FFFD in `prompt_text`,
            unless the output continues the character, which then belongs to the output.
    """

    def __init__(
        self, sequence: Sequence, tokenizer: Tokenizer, prompt_text: str = "", prompt_rest: bytes = b""
    ) -> None:
        self.sequence = sequence
        self.text = ""
        #: When the next delta may be sent, by the monotonic clock.
        self.next_delta_at = 0.0
        self._tokenizer = tokenizer
        self._skip = sequence.request.skip_special_tokens
        #: Whether the text follows that of the prompt, so that its first word keeps the space before it.
        hidden = tokenizer.special_ids if self._skip else frozenset[int]()
        is_formed = sequence.rules is not None and sequence.rules.matcher is not None  # then its spaces count
        self._inside = is_formed or any(token not in hidden for token in sequence.prompt)
        self._decoder = tokenizer.decoder(skip_special_tokens=self._skip, inside=self._inside)
        self._prompt_text, self._prompt_rest = prompt_text, prompt_rest
        self._stops = sequence.request.stop
        self._longest_stop = max(map(len, self._stops), default=0)
        self._scan_from = 0  # no stop string begins before this character
        self._sent_text = self._sent_tokens = 0
        self._logprobs: list[TokenLogprob] = []  # of the first tokens, so that each is converted once
        self._offsets = OffsetCounter(
            tokenizer,
            len(prompt_text) - bool(prompt_rest),
            prompt_rest,
            skip_special_tokens=self._skip,
            inside=self._inside,
        )
        # A stop string may hold special tokens, which the text leaves out: then it is looked for in another text.
        self._watched = tokenizer.special_ids if self._skip and self._stops else frozenset[int]()
        self._seen: SeenText | None = None

    def decode_last_token(self) -> None:
        """Append the text of the sequence's newest token. If that completes a stop string, end the sequence there."""
        sequence = self.sequence
        if sequence.ends_with_stop_token:
            self.end()
            return
        token_id = sequence.output[-1]
        if self._prompt_rest:
            self._join_prompt(token_id)
        if token_id in self._watched and self._seen is None:
            self._seen = SeenText(self._tokenizer, sequence.output[:-1], len(self.text), inside=self._inside)
            self._seen.scan_from = self._scan_from
        before = len(self.text)
        self.text += self._decoder.push(token_id)
        if sequence.finish_reason:
            self.text += self._decoder.flush()
        if self._seen is not None:
            self._seen.push(token_id, len(self.text), last=sequence.finish_reason is not None)
        if self._stops:
            self._cut_at_stop_string(before)

    def end(self) -> None:
        """End the text of a sequence that gets no more text."""
        self.text += self._decoder.flush()

    def _join_prompt(self, token_id: int) -> None:
        """If this first token continues the last character of the prompt, begin the output with that character."""
        skipped = self._skip and token_id in self._tokenizer.special_ids
        if skipped or not (data := self._tokenizer.known_bytes(token_id)):
            return  # the next token decides
        rest, self._prompt_rest = self._prompt_rest, b""
        if continues(rest, data):
            self._prompt_text = self._prompt_text[:-1]
            self._decoder = self._tokenizer.decoder(rest, skip_special_tokens=self._skip, inside=self._inside)

    def _cut_at_stop_string(self, before: int) -> None:
        """Look for the earliest stop string that the text from character `before` on completes."""
        seen = self._seen
        if len(self.sequence.output) < self.sequence.request.min_tokens:
            self._scan_from = len(self.text)
            if seen is not None:
                seen.scan_from = len(seen.text)
            return
        start = max(self._scan_from, before - self._longest_stop + 1)
        found = [(at, stop) for stop in self._stops if (at := self.text.find(stop, start)) >= 0]
        if seen is not None:
            found += seen.find(self._stops, self._longest_stop)
        if found:
            at, stop = min(found, key=lambda hit: hit[0])
            self.text = self.text[:at]
            self.sequence.finish("stop", stop)

    def take_delta(self) -> TextDelta | None:
        """The text since the last call, or None if there is none. Text that may begin a stop string is held back."""
        sequence = self.sequence
        end = len(self.text) if sequence.finish_reason else len(self.text) - self._held_back()
        if end <= self._sent_text and sequence.finish_reason is None:
            return None
        at, text_at = self._sent_tokens, self._sent_text
        text, logprobs = self.text[text_at:end], self._logprobs_from(at)
        if logprobs is not None and sequence.finish_reason is None:
            # A stop string may still remove the text after `end`, which moves the tokens that begin there.
            while logprobs and (logprobs[-1].text_offset or 0) > self._text_start + end:
                logprobs.pop()
        tokens = sequence.output[at:] if logprobs is None else [score.token_id for score in logprobs]
        self._sent_text, self._sent_tokens = max(end, text_at), at + len(tokens)
        if sequence.request.echo and at:
            at, text_at = at + len(sequence.prompt), text_at + len(self._prompt_text)
        elif sequence.request.echo:
            text, tokens, logprobs = self._prompt_text + text, sequence.prompt + tokens, self._with_prompt(logprobs)
        return TextDelta(
            sequence.index,
            text,
            tokens,
            sequence.finish_reason,
            at,
            text_at,
            logprobs,
            sequence.stop_reason,
            len(sequence.prompt),
            self._is_complete() if sequence.finish_reason else None,
        )

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string may still remove."""
        length = self._begun_stop(self.text)
        if self._seen is not None:
            seen = self._seen.text
            length = max(length, len(self.text) - self._seen.shown_before(len(seen) - self._begun_stop(seen)))
        return length

    def _begun_stop(self, text: str) -> int:
        """Length of the longest end of a text that is the beginning of a stop string."""
        for length in range(min(self._longest_stop - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0

    def choice(self) -> Choice:
        """This sample as the result holds it."""
        if self.sequence.request.continuation is not None:
            return self._continuation()
        sequence, echo, logprobs = self.sequence, self.sequence.request.echo, self._logprobs_from(0)
        return Choice(
            index=sequence.index,
            text=(self._prompt_text if echo else "") + self.text,
            token_ids=(sequence.prompt if echo else []) + sequence.output,
            finish_reason=sequence.finish_reason or "length",
            stop_reason=sequence.stop_reason,
            logprobs=self._with_prompt(logprobs) if echo else logprobs,
            complete=self._is_complete(),
        )

    def _is_complete(self) -> bool | None:
        """Whether the text has the form that was asked for; None if none was."""
        sequence = self.sequence
        if sequence.rules is None or sequence.rules.matcher is None:
            return None
        return sequence.rules.may_end and not isinstance(sequence.stop_reason, str)

    def _continuation(self) -> Choice:
        """The continuation that was scored."""
        sequence = self.sequence
        scores = sequence.prompt_scores
        return Choice(
            index=sequence.index,
            text=self._prompt_text,
            token_ids=[score.token_id for score in scores],
            finish_reason="length",
            logprobs=self._prompt_logprobs(scores, sequence.request.logprobs),
        )

    def prompt_logprobs(self) -> list[TokenLogprob] | None:
        """Log probabilities of the prompt, if the request has `prompt_logprobs`."""
        sequence = self.sequence
        if (count := sequence.request.prompt_logprobs) is None:
            return None
        return self._prompt_logprobs(sequence.prompt_scores, count)

    @property
    def _text_start(self) -> int:
        """The character of the choice's text where the output begins."""
        return len(self._prompt_text) if self.sequence.request.echo else 0

    def _logprobs_from(self, at: int) -> list[TokenLogprob] | None:
        """Log probabilities of the output from index `at` on; None if the request does not ask for them."""
        sequence, logprobs = self.sequence, self._logprobs
        if sequence.request.logprobs is None:
            return None
        hidden = 0 if sequence.request.echo else len(self._prompt_text)
        for score in sequence.scores[len(logprobs) :]:
            at_text = max(self._offsets.next(score.token_id) - hidden, 0)
            logprobs.append(self._logprob(score, at_text, sequence.request.logprobs))
        if sequence.finish_reason == "stop":
            self._move_removed_tokens()
        return logprobs[at:]

    def _move_removed_tokens(self) -> None:
        """Give the tokens whose text a stop has removed the offset of the end of the text."""
        end = self._text_start + len(self.text)
        if self.sequence.ends_with_stop_token:
            self._logprobs[-1].text_offset = end
        for last in reversed(self._logprobs):
            if last.text_offset is None or last.text_offset <= end:
                break
            last.text_offset = end

    def _with_prompt(self, logprobs: list[TokenLogprob] | None) -> list[TokenLogprob] | None:
        if logprobs is None:
            return None
        return [*self._prompt_logprobs(self.sequence.prompt_scores, self.sequence.request.logprobs), *logprobs]

    def _prompt_logprobs(self, scores: list[TokenScore], count: int | None) -> list[TokenLogprob]:
        offsets, end = OffsetCounter(self._tokenizer), len(self._prompt_text)
        # The text may lack what the tokenizer adds around a prompt.
        return [self._logprob(score, min(offsets.next(score.token_id), end), count or 0) for score in scores]

    def _logprob(self, score: TokenScore, text_offset: int, count: int) -> TokenLogprob:
        name = self._tokenizer.token_name
        return TokenLogprob(
            token_id=score.token_id,
            token=name(score.token_id),
            logprob=score.logprob,
            top=[TopLogprob(token_id=i, token=name(i), logprob=p) for i, p in score.top[:count]],
            text_offset=text_offset,
            rank=score.rank,
        )

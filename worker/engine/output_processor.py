"""Turns the tokens of a step into text and results: stop strings, streaming, retiring finished sequences."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable

from headrace.worker.engine.protocols import StepRunner
from headrace.worker.engine.request_table import RequestTable
from headrace.worker.engine.requests import RequestState
from headrace.worker.engine.scheduler import ModelRunnerOutput, Scheduler, SchedulerOutput
from headrace.worker.engine.sequence import NoToken, Sequence, TokenScore

NAN_MESSAGE = "the model gave no numbers for this prompt (NaN); check its weights"
MASKED_MESSAGE = (
    "no token may follow, and the text must not end here: structured_outputs, allowed_token_ids, bad_words, min_tokens "
    "and the model's vocabulary leave none"
)


class OutputProcessor:
    """Hands tokens to their sequences, streams text, and answers finished requests.

    Args:
        runner: clears slots, and gives captured activations.
        scheduler: says what of a finished sequence stays in the cache.
        requests: the engine's requests.
        model_name: how results name the model.
        fingerprint: how results name software, hardware and weights.
    """

    def __init__(
        self, runner: StepRunner, scheduler: Scheduler, requests: RequestTable, *, model_name: str, fingerprint: str
    ) -> None:
        self.tokens = self.proposed = self.accepted = 0
        self._runner, self._scheduler, self._requests = runner, scheduler, requests
        self._model_name, self._fingerprint = model_name, fingerprint

    def process(self, step: SchedulerOutput, outcome: ModelRunnerOutput) -> list[Sequence]:
        """Append the step's tokens to their sequences, and stream their text. Returns the finished sequences."""
        now, owner = time.monotonic(), self._requests.owner
        for sequence, scores in outcome.prompt_scores:
            sequence.prompt_scores.extend(scores)
        for source, same in step.same_prompt.items():
            for sequence in same:
                sequence.prompt_scores = list(source.prompt_scores)
        for sequence in step.prefilled:
            sequence.first_token_at = now
            if sequence.request.max_tokens == 0 and sequence in owner:
                self._finish_scoring(sequence)
        if step.proposed:
            self._count_accepted(step, outcome)
        for sequence, score in outcome.tokens:
            if sequence.finish_reason:
                continue  # a token before this one in the same step ended it
            if isinstance(score, NoToken) and not self._ends_without_token(sequence, score):
                continue
            if (state := owner.get(sequence)) is not None:
                text = state.texts[sequence.index]
                if isinstance(score, TokenScore):
                    self.tokens += 1
                    sequence.append(score)
                    text.decode_last_token()
                else:
                    sequence.finish("stop")
                    text.end()
                if state.on_text is not None and (now >= text.next_delta_at or sequence.finish_reason):
                    self._stream(state, sequence, state.on_text, now)
        return [s for s in (*step.decodes, *step.prefilled) if s.finish_reason and s in owner]

    def _ends_without_token(self, sequence: Sequence, reason: NoToken) -> bool:
        """Whether a sequence that gets no token is complete. Fails its request if it is not."""
        rules = sequence.rules
        if reason is NoToken.NAN or rules is None:
            self._requests.fail(sequence, "nan_logits", NAN_MESSAGE)
        elif rules.error:
            self._requests.fail(sequence, "grammar_too_complex", rules.error)
        elif rules.matcher is None or not rules.may_end:
            self._requests.fail(sequence, "no_token_allowed", MASKED_MESSAGE)
        else:
            return True
        return False

    def _count_accepted(self, step: SchedulerOutput, outcome: ModelRunnerOutput) -> None:
        """Count the proposed tokens that were accepted: each gave its sequence one more token."""
        tokens = Counter(sequence for sequence, _ in outcome.tokens)
        for sequence, proposed in step.proposed.items():
            if not tokens[sequence]:
                continue  # its masks were late
            accepted = tokens[sequence] - 1
            sequence.note_accepted(len(proposed), accepted)
            self.proposed += len(proposed)
            self.accepted += accepted

    def _finish_scoring(self, sequence: Sequence) -> None:
        """End a request for no new tokens; `retire` clears its slot, after others have copied its prefix."""
        last = sequence.prompt_scores[-1].logprob if sequence.prompt_scores else None
        if last is not None and math.isnan(last):  # a NaN reaches all later positions
            self._requests.fail(sequence, "nan_logits", NAN_MESSAGE)
            return
        sequence.finish("length")

    def _stream(self, state: RequestState, sequence: Sequence, on_text: Callable[..., None], now: float) -> None:
        text = state.texts[sequence.index]
        if (delta := text.take_delta()) is not None:
            text.next_delta_at = now + state.text_every_s
            self._requests.guard(state, functools.partial(on_text, delta))

    def retire(self, finished: list[Sequence]) -> None:
        """Free the slots of finished sequences, and answer the requests whose last sequence it was."""
        for sequence in finished:
            if (state := self._requests.owner.get(sequence)) is None:
                continue  # another sequence of the same request has ended it
            if sequence.activations is not None and state.on_activations is not None:
                self._requests.guard(
                    state, functools.partial(self._hand_over_activations, sequence, state.on_activations)
                )
            kept = self._scheduler.kept_prefix(sequence)
            if sequence.request.max_tokens == 0 and sequence.slot is not None:
                # Nothing has shown the other rows to be free of NaN.
                self._runner.clear(sequence.slot, kept, sequence.written)
            self._requests.release(sequence, kept)
            if state.finished and state in self._requests:
                self._requests.guard(state, functools.partial(self._complete, state))

    def _hand_over_activations(self, sequence: Sequence, receive: Callable[[dict[str, bytes]], None]) -> None:
        receive(self._runner.collect(sequence))

    def _complete(self, state: RequestState) -> None:
        self._requests.complete(state, state.result(self._model_name, self._fingerprint, time.monotonic()))

"""Measures on this machine whether results depend on the batch composition."""

from __future__ import annotations

from headrace.client.wire.requests import GenerateRequest
from headrace.model.decoder import Decoder
from headrace.model.trusted_files import ModelError
from headrace.worker.engine.cache_slots import SlotTable
from headrace.worker.engine.model_runner import ModelRunner
from headrace.worker.engine.scheduler import PromptChunk, SchedulerOutput
from headrace.worker.engine.sequence import NoToken, Sequence, TokenScore

#: Steps after which the log probabilities of the probe are compared; fewer if the model has fewer than 4 positions.
STEPS = 3
#: Tokens of the longest other prompt.
LONG_PROMPT = 129


def is_batch_invariant(model: Decoder) -> bool:
    """Whether a row's log probabilities have the same bits alone and beside 3, 20 and 21 other rows.

    Batch invariance depends on kernels that do not guarantee it. So it is measured on this machine with this model, and
    the fingerprint of each result says whether it holds. One of the other prompts is longer than a prefill chunk.

    Raises:
        ModelError: the model computes no numbers.
    """
    most = max(1, model.config.n_positions - 4)
    probe = [(7919 * i) % model.config.vocab_size for i in range(min(20, most))]
    alone = _probe_scores(model, probe, others=[])
    batches = (
        [[t] for t in (1, 2, 3)],
        [[t, t + 1] for t in range(20)],
        [*(list(range(t, t + 7)) for t in range(20)), list(range(min(LONG_PROMPT, most)))],
    )
    return all(_probe_scores(model, probe, others) == alone for others in batches)


def _probe_scores(model: Decoder, probe: list[int], others: list[list[int]]) -> list[TokenScore]:
    """Scores of the tokens after the probe, computed beside other prompts in a new cache."""
    request = GenerateRequest(prompt=[0], max_tokens=STEPS + 1, temperature=0, logprobs=1, ignore_eos=True)
    longest = max(1, model.config.n_positions - 4)
    prompts = [prompt[:longest] for prompt in (*others, probe)]
    steps = min(STEPS, model.config.n_positions - longest + 1)
    length = -(-(max(map(len, prompts)) + STEPS + 1) // 16) * 16
    runner = ModelRunner(model, [length])
    slots = SlotTable([length], position_bytes=1, budget_bytes=length * (len(prompts) + 8))
    sequences = [Sequence(request, [t % model.config.vocab_size for t in prompt], 0, 0) for prompt in prompts]
    for sequence in sequences:
        slots.allocate(sequence)
    runner.fit(slots.capacity)
    step = SchedulerOutput(chunks=[PromptChunk(s, 0, len(s.prompt)) for s in sequences])
    scores: list[TokenScore] = []
    for _ in range(steps):
        for sequence, score in runner.run(step).tokens:
            if isinstance(score, NoToken):
                raise ModelError(
                    f"the model's logits are not finite in {str(model.dtype).removeprefix('torch.')}: a weight is NaN "
                    "or infinite, or the number format is too small for it; check the weights, or set "
                    "HEADRACE_DTYPE=float32"
                )
            sequence.prefilled = len(sequence.prompt)
            sequence.append(score)
            if sequence is sequences[-1]:
                scores.append(score)
        step = SchedulerOutput(decodes=sequences)
    return scores

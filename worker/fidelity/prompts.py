"""The texts that `headrace validate` computes."""

from __future__ import annotations

#: The default prompts: text, the empty prompt and one token. `_cases` adds one that fills the context.
PROMPTS = ("Hello.", "The quick brown", "Once upon a time", "", "The")
#: Text on which the loss of lower precisions is measured: the beginning of H. G. Wells, The Time Machine (1895).
PASSAGE = (
    "The Time Traveller (for so it will be convenient to speak of him) was expounding a recondite matter to us. "
    "His pale grey eyes shone and twinkled, and his usually pale face was flushed and animated. The fire burnt "
    "brightly, and the soft radiance of the incandescent lights in the lilies of silver caught the bubbles that "
    "flashed and passed in our glasses. Our chairs, being his patents, embraced and caressed us rather than "
    "submitted to be sat upon, and there was that luxurious after-dinner atmosphere, when thought runs gracefully "
    "free of the trammels of precision."
)
#: Prompts of other jobs, so that the jobs under test are computed in a batch.
BATCH_PROMPTS = (
    "It was a dark night, and",
    "She said that",
    "London",
    "The river ran past the old house on the hill " * 8,
)

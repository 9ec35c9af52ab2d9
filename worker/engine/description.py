"""Describes a loaded model for its log line, `headrace status` and clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headrace.client.wire.model_description import MAX_IDS, MAX_TEXT, ModelDescription, shortened_notes
from headrace.model.decoder import Decoder
from headrace.model.generation_config import Ends
from headrace.model.tokenizer import Tokenizer


def describe(
    model: Decoder,
    tokenizer: Tokenizer,
    ends: Ends,
    *,
    max_context: int,
    defaults: Mapping[str, int | float],
    notes: Iterable[str] = (),
) -> ModelDescription:
    """What was understood of a model's files, of bounded size.

    Args:
        model: the model.
        tokenizer: of the model.
        ends: of the model.
        max_context: limit of prompt and new tokens together.
        defaults: parameters of requests that do not set them.
        notes: further sentences about what was ignored.
    """
    config = model.config
    return ModelDescription(
        family=config.family,
        parameters=model.parameters,
        dtype="int8" if model.gemm_backend == "int8" else str(model.dtype).removeprefix("torch."),
        max_context=max_context,
        positions=config.n_positions,
        vocab_size=config.vocab_size,
        tokenizer=tokenizer.kind[:MAX_TEXT],
        tokenizer_size=tokenizer.vocab_size,
        added_tokens=tokenizer.added_tokens,
        has_chat_template=tokenizer.chat_template is not None,
        eos_token_ids=list(ends.eos_token_ids[:MAX_IDS]),
        eos_count=len(ends.eos_token_ids),
        eos_source=ends.source,
        bos_token_id=ends.bos_token_id,
        defaults=dict(defaults),
        notes=shortened_notes([*model.notes, *tokenizer.notes, *ends.notes, *notes]),
    )

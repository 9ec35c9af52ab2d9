"""Requests for token ids or for their text: answered by the tokenizer alone, without a slot."""

from __future__ import annotations

import time

from headrace.client.wire.errors import JobExpired, JobFailed
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.results import Choice, Result, Timings, Tokenized, Usage
from headrace.model.generation_config import Ends
from headrace.model.tokenizer import Tokenizer
from headrace.model.tokenizers.ids_only import TokenIdsOnly
from headrace.worker.engine.requests import check_token_ids, read_prompt


def answer(
    request: GenerateRequest,
    job_id: str,
    *,
    tokenizer: Tokenizer,
    ends: Ends,
    vocab_size: int,
    max_context: int,
    model: str,
    parse_special_tokens: bool | None = None,
) -> Result:
    """The answer to a request with an `operation`: a result with `tokenized`, or with a text.

    Raises:
        JobFailed: this model cannot compute it.
        JobExpired: its time has passed.
    """
    if request.expires_at is not None and request.expires_at <= time.time():
        raise JobExpired(message="the job's timeout_s passed before it was computed")
    text, tokenized = "", None
    if request.operation == "tokenize":
        tokens = read_prompt(request, tokenizer, ends, parse_special_tokens)[0]
        check_token_ids(request, tokens, vocab_size)
        names = [tokenizer.token_name(token) for token in tokens]
        tokenized = Tokenized(tokens=tokens, token_strs=names, count=len(tokens), max_model_len=max_context)
    else:
        tokens = list(request.prompt) if isinstance(request.prompt, list) else []
        check_token_ids(request, tokens, vocab_size)
        if isinstance(tokenizer, TokenIdsOnly):
            raise JobFailed("no_tokenizer", tokenizer.reason)
        # Like outputs: an id without a token, of a padded embedding or a hole in the vocabulary, adds nothing.
        decoder = tokenizer.decoder(skip_special_tokens=request.skip_special_tokens)
        text = "".join(map(decoder.push, tokens)) + decoder.flush()
    return Result(
        id=job_id,
        model=model,
        choices=[Choice(index=0, text=text, token_ids=[], finish_reason="stop")],
        usage=Usage.of(len(tokens), 0),
        seed=0,
        timings=Timings(waiting_s=0.0, prefill_s=0.0, decode_s=0.0),
        tokenized=tokenized,
    )

"""The rules of a request, which its sequences follow: what is made of them once, and the checks against the model."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Set

from headrace.client.wire.constraints import FIELD
from headrace.client.wire.errors import JobFailed
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.values import show
from headrace.model.tokenizer import NoTokenizer, Tokenizer
from headrace.worker.engine.grammars import Grammars
from headrace.worker.engine.mask_budget import MaskBudget
from headrace.worker.engine.token_rules import TokenRules, mask_of

#: Of the shortest choices, so many that are no longer than this are looked at exactly.
EXACT_TEXTS, EXACT_BYTES = 64, 64


def request_rules(
    request: GenerateRequest, grammars: Grammars, tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]
) -> Callable[[], TokenRules] | None:
    """Makes the rules of each sequence of a request; None if every token may follow.

    Args:
        request: whose token ids are below `vocab_size`.
        grammars: of the model.
        tokenizer: of the model.
        vocab_size: every token id is below it.
        eos_ids: the tokens that end a text.

    Raises:
        JobFailed: the form cannot be computed, or no text of `max_tokens` tokens has it.
    """
    if not request.constrained:
        return None
    form, allowed = request.structured_outputs, request.allowed_token_ids
    grammar = None if form is None else grammars.get(form)
    if form is not None and "choice" in form:
        _check_room(form["choice"], request.max_tokens, grammars.token_bytes)
    elif form is not None and grammar is not None:
        _check_beginning(grammar.beginning, next(iter(form)), request.max_tokens, grammars.sorted_token_bytes)
    mask = None if allowed is None else mask_of(allowed, vocab_size)
    bad_words = _bad_words(request.bad_words, tokenizer)
    ends = frozenset[int]() if request.ignore_eos else eos_ids
    budget = MaskBudget(FIELD if form is None else f"{FIELD}.{next(iter(form))}")
    return lambda: TokenRules(vocab_size, ends, grammar=grammar, allowed=mask, bad_words=bad_words, budget=budget)


def _bad_words(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of each text, at the beginning of a text and after a space, as vLLM has them."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            try:
                ids = tokenizer.encode(text, parse_special_tokens=False, add_special_tokens=False)
            except NoTokenizer as error:
                raise JobFailed("no_tokenizer", str(error)) from None
            if ids:
                found[tuple(ids)] = None
    return [list(ids) for ids in found]


def _check_room(choices: list[str], max_tokens: int, tokens: Set[bytes]) -> None:
    """Refuse choices of which none can be written with `max_tokens` tokens. Only short ones are looked at exactly."""
    texts = sorted((choice.encode() for choice in choices), key=len)
    if len(texts[0]) <= max_tokens:
        return  # a token has at least one byte
    longest = max(map(len, tokens), default=1)
    counts = (
        fewest_tokens(text, tokens) if i < EXACT_TEXTS and len(text) <= EXACT_BYTES else -(-len(text) // longest)
        for i, text in enumerate(texts)
    )
    if (fewest := min(counts)) > max_tokens:
        raise JobFailed(
            "invalid_request",
            f"max_tokens: got {max_tokens}; expected at least {fewest}, the fewest tokens of a text in {FIELD}.choice",
        )


def _check_beginning(beginning: bytes, kind: str, max_tokens: int, tokens: list[bytes]) -> None:
    """Refuse a form if `max_tokens` tokens cannot even hold the bytes with which all of its texts begin.

    How short a text can be is not known otherwise: it would take all texts of the form, written in all ways.
    """
    if len(beginning) <= max_tokens:
        return
    longest = max(map(len, tokens))
    fewest = max(fewest_tokens_from(beginning[:EXACT_BYTES], tokens), -(-len(beginning) // longest))
    if fewest > max_tokens:
        text = beginning.decode(errors="replace")
        raise JobFailed(
            "invalid_request",
            f"max_tokens: got {max_tokens}; expected at least {fewest}, the fewest tokens of {show(text)}, with which "
            f"each text of {FIELD}.{kind} begins",
        )


def fewest_tokens_from(beginning: bytes, tokens: list[bytes]) -> int:
    """The smallest number of tokens whose bytes begin with these; the last may go on. `tokens` are sorted."""
    before = _fewest_by_length(beginning, frozenset(tokens))
    ends = (start for start in range(len(beginning)) if _some_token_begins_with(beginning[start:], tokens))
    return min((before[start] + 1 for start in ends), default=len(beginning) + 1)


def _some_token_begins_with(text: bytes, tokens: list[bytes]) -> bool:
    place = bisect.bisect_left(tokens, text)
    return place < len(tokens) and tokens[place].startswith(text)


def fewest_tokens(text: bytes, tokens: Set[bytes]) -> int:
    """The smallest number of tokens whose bytes are this text; larger than the text if there are none."""
    return _fewest_by_length(text, tokens)[-1]


def _fewest_by_length(text: bytes, tokens: Set[bytes]) -> list[int]:
    """The smallest number of tokens for the first bytes of a text, by how many these are."""
    fewest = [0] + [len(text) + 1] * len(text)
    for end in range(1, len(text) + 1):
        before = (fewest[start] for start in range(end) if text[start:end] in tokens)
        fewest[end] = min(before, default=len(text)) + 1
    return fewest

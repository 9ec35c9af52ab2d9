"""Equal ids and equal text on 3,000 texts: a directory's tokenizer beside the library that wrote its files."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from headrace.model import Tokenizer
from tests.unit.model.strings import strings
from tests.zoo.entry import Entry
from tests.zoo.reference import Reader, quiet

#: Random lists of ids, which no text gives.
RANDOM_LISTS = 1_000


def compare_texts(ours: Tokenizer, folder: Path, entry: Entry, every: int = 1) -> tuple[int, list[str]]:
    """Compare all texts, or one of `every`. -> (how many texts, the first difference of each kind)."""
    with quiet():
        theirs = Reader(folder, entry)
        texts = strings()[::every]
        found = [
            *_first(_ids(ours, theirs, texts, parse=True, add=True)),
            *_first(_ids(ours, theirs, texts[::5], parse=False, add=False)),
        ]
        lists = _lists(theirs, texts, RANDOM_LISTS // every)
        for skip in (False, True):
            found += _first(_texts(ours, theirs, lists, skip=skip))
            found += _first(_continued(ours, theirs, lists, skip=skip))
        if ours.parses_special_tokens != entry.reads_special_tokens:
            found.append(f"special tokens in prompts: expected read {entry.reads_special_tokens}")
        if (sizes := (theirs.size, ours.vocab_size))[0] != sizes[1]:
            found.append(f"size of the vocabulary: expected {sizes[0]}, got {sizes[1]}")
    return len(texts), found


def _first(faults: Iterator[str]) -> list[str]:
    first = next(faults, None)
    return [] if first is None else [f"{first}; {sum(1 for _ in faults)} more"]


def _ids(ours: Tokenizer, theirs: Reader, texts: Sequence[str], *, parse: bool, add: bool) -> Iterator[str]:
    for text, expected in zip(texts, theirs.encode_all(texts, parse=parse, add=add), strict=True):
        got = ours.encode(text, parse_special_tokens=parse, add_special_tokens=add)
        if got != expected:
            yield f"ids of {text!r} (parse {parse}, add {add}): expected {expected}, got {got}"


def _lists(theirs: Reader, texts: Sequence[str], count: int) -> list[list[int]]:
    """Lists of ids: those of some of the texts, and random ones."""
    draw, known = random.Random(0), theirs.known
    lists = [ids for ids in theirs.encode_all(texts[::5], parse=True, add=True) if ids]
    return lists + [draw.choices(known, k=draw.randint(1, 12)) for _ in range(count)]


def _texts(ours: Tokenizer, theirs: Reader, lists: Sequence[list[int]], *, skip: bool) -> Iterator[str]:
    for ids, expected in zip(lists, theirs.decode_all(lists, skip=skip), strict=True):
        got = ours.decode(ids, skip_special_tokens=skip)
        if got != expected:
            yield f"text of {ids} (skip {skip}): expected {expected!r}, got {got!r}"


def _continued(ours: Tokenizer, theirs: Reader, lists: Sequence[list[int]], *, skip: bool) -> Iterator[str]:
    """The text of an output: what it adds to the text of its prompt, which are here the first tokens of a list."""
    hidden = ours.special_ids if skip else frozenset[int]()
    parts = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in lists]
    prompts = theirs.decode_all([prompt for prompt, _ in parts], skip=skip)
    wholes = theirs.decode_all(lists, skip=skip)
    for (prompt, output), before, whole in zip(parts, prompts, wholes, strict=True):
        if not whole.startswith(before) or before.endswith("\ufffd"):
            continue  # the output continues a character of the prompt
        decoder = ours.decoder(skip_special_tokens=skip, inside=any(token not in hidden for token in prompt))
        got = "".join(map(decoder.push, output)) + decoder.flush()
        if got != (expected := whole.removeprefix(before)):
            yield f"text of {output} after {prompt} (skip {skip}): expected {expected!r}, got {got!r}"

"""The row `text` of `headrace validate`: prompt ids, decoded text and the end of text, as other tools have them.

Checkpoints 1 to 12 start from token ids and end with token ids. A model whose tensors are all right still writes wrong
text if its prompts become other ids than in training, or if it does not stop where it learned to stop.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.client.wire.results import Result
from headrace.model.tokenizer import Tokenizer
from headrace.worker.fidelity.references.base import ReferenceUnavailable
from headrace.worker.fidelity.references.text import TextReference, load_text, stated_ends

#: Texts in which tokenizers differ: spaces, digits, capitals, contractions, scripts, combined characters, line ends.
TEXTS = (
    "Hello.",
    "hello",
    " hello",
    "two  spaces and   three ",
    "\ttab\nline\r\nline\n\n  indented",
    "in 1998, 3.14 and 1,000,000",
    "CAPITALS and Title Case",
    "They've said it's hers; I'd WE'LL",
    "x = {'a': [1, 2]}  # note",
    "naïve café — “quoted” … ﬁne",
    "cafe\u0301 Å \uff21\uff22\uff23 ①",
    "Река течёт мимо дома.",
    "河は丘のそばを流れる。",
    "النهر يجري 👩‍👩‍👧🙂",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "\u00a0\u200b\u3000",
)
#: The added tokens that are tried, and the ends of text.
MOST_ADDED, MOST_ENDS = 16, 8
#: The largest bias that a request may give a token: with it a model writes that token whatever its logits are.
BIAS = 100.0


@dataclass(frozen=True)
class TextResult:
    """What was compared with the reference. `ok` is None if nothing was."""

    name: str = "text"
    compared: str = ""
    #: How many texts, and which ids end a text.
    texts: int = 0
    eos_token_ids: tuple[int, ...] = ()
    ok: bool | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class _Probe:
    """A job, and what its result must be."""

    kind: str
    shown: str
    request: dict[str, Any]
    expected: Any


class TextCheck:
    """The jobs of the row and its verdict.

    Args:
        folder: the model's directory.
        tokenizer: the worker's, to know whether it reads special tokens in prompts.
        positions: the longest text in tokens.
        vocab_size: token ids are below it.
        prompts: texts in place of the usual ones.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, positions: int, vocab_size: int, prompts: Sequence[str] = ()
    ) -> None:
        self._why_not = ""
        reference: TextReference | None = None
        try:
            if tokenizer.kind.startswith("none"):
                raise ReferenceUnavailable("the model has no tokenizer that can be computed; it takes token ids")
            reference = load_text(folder)
        except ReferenceUnavailable as error:
            self._why_not = str(error)
        self._reference = reference
        self.ends = stated_ends(folder, reference.end if reference else None, vocab_size) if folder.is_dir() else []
        self._probes: list[_Probe] = []
        #: The first half of each text's ids, and the id that follows.
        self._halves: list[tuple[list[int], int]] = []
        if reference is not None:
            self._add_texts(reference, tokenizer, positions, vocab_size, prompts)
        self._texts = len(self._probes) // 2
        if reference is not None and positions > 2:
            self._add_outputs(reference, vocab_size)
        if positions > 2:
            self._probes += [_end_probe(end) for end in self.ends[:MOST_ENDS]]

    def _add_texts(
        self, reference: TextReference, tokenizer: Tokenizer, positions: int, vocab_size: int, prompts: Sequence[str]
    ) -> None:
        texts = [text for text in (prompts or TEXTS) if text]
        if tokenizer.parses_special_tokens and not prompts:
            texts += [f"left {added} right{added}end" for added in list(reference.added.values())[:MOST_ADDED]]
        for text in texts:
            ids = reference.encode(text)
            if 0 < len(ids) < positions and max(ids) < vocab_size:
                echo = {"max_tokens": 0, "echo": True, "temperature": 0}
                self._probes.append(_Probe("prompt ids", text, {"prompt": text, **echo}, ids))
                self._probes.append(_Probe("text", repr(ids), {"prompt": ids, **echo}, reference.decode(ids, False)))
                self._halves.append((ids[: len(ids) // 2], ids[len(ids) // 2]))

    def _add_outputs(self, reference: TextReference, vocab_size: int) -> None:
        """Jobs that are made to write one token: each added one, whose text is left out if it is special, and the next
        one of each text, whose space stays."""
        for token_id in list(reference.added)[:MOST_ADDED]:
            if token_id < vocab_size:
                written = {"prompt": [0], "max_tokens": 1, "temperature": 0, "logit_bias": {token_id: BIAS}}
                text = reference.decode([token_id], True)
                self._probes.append(_Probe("output", str(token_id), written, ([token_id], text)))
        for prompt, token_id in self._halves:
            before, whole = (reference.decode(ids, True) for ids in (prompt, [*prompt, token_id]))
            # Where a character or a cleaned-up text is cut in two, the output's text is not the rest of the whole one.
            if prompt and token_id not in self.ends and whole.startswith(before) and not before.endswith("\ufffd"):
                written = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logit_bias": {token_id: BIAS}}
                shown, text = f"{token_id} after {reprlib.repr(prompt)}", whole.removeprefix(before)
                self._probes.append(_Probe("output", shown, written, ([token_id], text)))

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The jobs to submit."""
        return [probe.request for probe in self._probes]

    def judge(self, results: Sequence[Result]) -> TextResult:
        """The row, from the results of the jobs in the same order."""
        wrong = [line for probe, result in zip(self._probes, results, strict=True) if (line := _fault(probe, result))]
        note = f"{wrong[0]}{f'; {len(wrong) - 1} more' if len(wrong) > 1 else ''}" if wrong else self._why_not
        compared = [f"prompt ids, text with {self._reference.name}"] if self._reference and self._texts else []
        if any(probe.kind == "end" for probe in self._probes):
            compared.append(f"end of text {', '.join(map(str, self.ends))} with the model's files")
        return TextResult(
            compared="; ".join(compared),
            texts=self._texts,
            eos_token_ids=tuple(self.ends),
            ok=not wrong if self._probes else None,
            note=note,
        )


def _end_probe(end: int) -> _Probe:
    """A job that is made to write an end of text, with room for one more token."""
    request = {"prompt": [0], "max_tokens": 2, "temperature": 0, "logit_bias": {end: BIAS}}
    return _Probe("end", str(end), request, ([end], "stop"))


def _fault(probe: _Probe, result: Result) -> str:
    """What is wrong with a result; empty if nothing is."""
    choice = result.choices[0]
    if probe.kind == "end":
        if choice.token_ids[0] != probe.expected[0][0] or (choice.token_ids, choice.finish_reason) == probe.expected:
            return ""  # logits of more than 100 can keep the token from being written
        return f"eos_token_id {probe.shown} does not end a text"
    if probe.kind == "output":
        ids, text = probe.expected
        if choice.token_ids != ids or choice.text == text:
            return ""
        return f"text of the output {probe.shown}: expected {text!r}, got {reprlib.repr(choice.text)}"
    got = choice.token_ids if probe.kind == "prompt ids" else choice.text
    if got == probe.expected:
        return ""
    return (
        f"{probe.kind} of {reprlib.repr(probe.shown)}: expected {reprlib.repr(probe.expected)}, got {reprlib.repr(got)}"
    )

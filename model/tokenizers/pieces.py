"""The text of tokens one at a time, for the decoders of tokenizer.json that are not byte-level.

Each step of a decoder changes a token by itself, by whether it is the first, or all of the text; the library computes
what a step makes of a token, and this module joins it as the library would join all tokens at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tokenizers import decoders

_BYTE = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")
#: What a step makes of a token: (token, whether it is the first) -> text.
Step = Callable[[str, bool], str]


class Chain:
    """The steps of a decoder.

    Args:
        raw: the field `decoder` of tokenizer.json.

    Raises:
        ValueError: the steps cannot be computed a token at a time. The message names the one that cannot.
    """

    def __init__(self, raw: Any) -> None:
        self.steps: list[Step] = []  # of a token by itself, before bytes are joined
        self.later_steps: list[Step] = []  # and after
        self.joins_bytes = self.fused = False
        self.strips: list[tuple[str, int, int]] = []  # of all of the text: character, at the start, at the end
        if raw is None:
            self.steps.append(lambda token, first: token if first else " " + token)
        for part in _flat(raw):
            self._add(part, str(part.get("type")))

    def _add(self, part: dict[str, Any], kind: str) -> None:
        if kind == "Fuse":
            self.fused = True
        elif kind == "Strip" and self.fused:
            self.strips.append((part["content"], part["start"], part["stop"]))
        elif self.fused or (kind == "ByteFallback" and self.joins_bytes) or kind not in _STEPS:
            raise ValueError(kind)
        elif kind == "ByteFallback":
            self.joins_bytes = True
        else:
            (self.later_steps if self.joins_bytes else self.steps).append(_STEPS[kind](part))

    def text(self, token: str, first: bool) -> str:
        """The text of a token, or the token of a byte as it is written."""
        for step in self.steps:
            token = step(token, first)
        return token

    def finish(self, text: str, first: bool) -> str:
        """The text of a token after bytes were joined."""
        for step in self.later_steps:
            text = step(text, first)
        return text

    def byte(self, text: str) -> int | None:
        """The byte that a token such as `<0xE2>` stands for."""
        found = _BYTE.fullmatch(text) if self.joins_bytes else None
        return int(found[1], 16) if found else None

    def bytes_of(self, token: str, first: bool) -> bytes:
        """The bytes of one token, not always whole characters."""
        text = self.text(token, first)
        if (byte := self.byte(text)) is not None:
            return bytes([byte])
        text = self.finish(text, first)
        for content, start, _ in self.strips if first else ():
            text = _strip_start(text, content, start)[0]
        return text.encode()


def _flat(raw: Any) -> list[dict[str, Any]]:
    if raw is None:
        return []
    if raw.get("type") == "Sequence":
        return [part for step in raw["decoders"] for part in _flat(step)]
    return [raw]


def is_byte_level(raw: Any) -> bool:
    """Whether a decoder is GPT-2's: each token stands for bytes."""
    return [part.get("type") for part in _flat(raw) if part.get("type") != "Fuse"] == ["ByteLevel"]


def _replace(part: dict[str, Any]) -> Step:
    from tokenizers import Regex

    ((kind, pattern),) = part["pattern"].items()
    decoder = decoders.Replace(Regex(pattern) if kind == "Regex" else pattern, part["content"])
    return lambda token, _: str(decoder.decode([token]))


def _strip(part: dict[str, Any]) -> Step:
    def step(token: str, _first: bool) -> str:
        token, _ = _strip_start(token, part["content"], part["start"])
        return _strip_start(token[::-1], part["content"], part["stop"])[0][::-1]

    return step


def _metaspace(part: dict[str, Any]) -> Step:
    mark = part["replacement"]
    scheme = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
    at_start = " " if scheme == "never" else ""
    return lambda token, first: token.replace(mark, at_start if first else " ")


def _word_piece(part: dict[str, Any]) -> Step:
    decoder = decoders.WordPiece(part["prefix"], part["cleanup"])
    return lambda token, first: str(decoder.decode([token])) if first else str(decoder.decode(["a", token]))[1:]


_STEPS: dict[str, Callable[[dict[str, Any]], Step]] = {
    "Metaspace": _metaspace,
    "Replace": _replace,
    "Strip": _strip,
    "WordPiece": _word_piece,
    "ByteFallback": _strip,  # never called: it joins tokens
}


def _strip_start(text: str, content: str, count: int) -> tuple[str, int]:
    """Remove up to `count` characters at the start. Returns the text, and how many more may be removed after it."""
    cut = 0
    while cut < min(count, len(text)) and text[cut] == content:
        cut += 1
    return text[cut:], count - cut if cut == len(text) else 0


class _StripAll:
    """Removes characters from the start and the end of a text that arrives in pieces."""

    def __init__(self, content: str, start: int, stop: int, *, inside: bool) -> None:
        self._content, self._start, self._stop, self._held = content, 0 if inside else start, stop, ""

    def push(self, text: str) -> str:
        if self._start:
            text, self._start = _strip_start(text, self._content, self._start)
        text = self._held + text
        keep = len(text)
        while keep and len(text) - keep < self._stop and text[keep - 1] == self._content:
            keep -= 1
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        self._held = ""
        return ""


class PieceDecoder:
    """Converts the tokens of a chain to text one at a time. What a later token may change is held back.

    Args:
        chain: the steps of the decoder.
        inside: the tokens follow other text, so that the first one is not the first of a text.
    """

    #: The bytes of an incomplete character that a decoder after this one could continue: none.
    rest = b""

    def __init__(self, chain: Chain, *, inside: bool = False) -> None:
        self._chain, self._first, self._first_later = chain, not inside, not inside
        self._run = bytearray()
        self._strips = [_StripAll(*strip, inside=inside) for strip in chain.strips]

    def push(self, token: str) -> str:
        """The text that this token completes."""
        chain = self._chain
        text, self._first = chain.text(token, self._first), False
        if (byte := chain.byte(text)) is not None:
            self._run.append(byte)
            return ""
        return self._emit([*self._joined(), text])

    def flush(self) -> str:
        """The text that was held back, called at the end."""
        text = self._emit(self._joined())
        for i, strip in enumerate(self._strips):
            left = strip.flush()
            for later in self._strips[i + 1 :]:
                left = later.push(left)
            text += left
        return text

    def _joined(self) -> list[str]:
        """The text of the bytes so far: if they are not UTF-8, U+FFFD for each."""
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)

    def _emit(self, texts: list[str]) -> str:
        made = ""
        for text in texts:
            made += self._chain.finish(text, self._first_later)
            self._first_later = False
        for strip in self._strips:
            made = strip.push(made)
        return made

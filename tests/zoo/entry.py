"""What the zoo's table says of one directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Made:
    """What a builder left."""

    #: What HEADRACE_MODEL names.
    model: Path
    #: The directory that transformers reads, where it is not the model itself.
    reference: Path | None = None
    #: A directory's pickles, to be converted by `headrace convert` into `model` first.
    source: Path | None = None


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    name: str
    #: Fills an empty directory of this name. Returns `Made` if the model is not simply the directory.
    build: Callable[[Path], object]
    #: What is special about it, for people.
    what: str
    #: Whether it runs in `make test`.
    quick: bool = False
    #: A regular expression: loading is refused with this sentence.
    refused: str = ""
    #: A regular expression: a prompt that is text is refused with this sentence; token ids are computed.
    text_refused: str = ""
    #: Prompts that this directory is about, beside the usual ones.
    prompts: tuple[str, ...] = ()
    #: Messages for the chat template.
    chats: tuple[tuple[dict[str, str], ...], ...] = ()
    #: Whether at least one of the prompts must end by an end-of-text token.
    stops: bool = False
    #: New tokens of each prompt, where they fit.
    new_tokens: int = 10
    #: Regular expressions: each must match something said when the model is loaded.
    said: tuple[str, ...] = ()
    #: Fields of requests that differ from the defaults.
    request: dict[str, Any] = field(default_factory=dict)
    #: Whether special tokens in prompts are read if the request does not say.
    reads_special_tokens: bool = True

    def parameter(self, name: str, default: bool) -> bool:
        """What the requests say, or the default."""
        return bool(self.request.get(name, default))

    @property
    def compared(self) -> str:
        """What is compared, for the table."""
        if self.refused:
            return "refused"
        if self.text_refused:
            return "tokens, stops, logits; text refused"
        return "prompt ids, tokens, stops, logits, text"

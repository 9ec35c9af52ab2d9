"""What a worker understood of a model's files: its log line, `headrace status` and the worker's record say it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

#: Limits of a description, which travels in every heartbeat: listed ids, notes, and characters of a text.
MAX_IDS, MAX_NOTES, MAX_TEXT = 32, 16, 300


class ModelDescription(BaseModel):
    """A loaded model, as its worker understood the files."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)  # a newer worker may say more

    #: The `model_type` of config.json.
    family: str = ""
    #: Number of weights; a tied head counts once.
    parameters: int = 0
    #: The number format of the matrices.
    dtype: str = ""
    #: The longest prompt and new text together, in tokens, and what the model itself could read.
    max_context: int = 0
    positions: int = 0
    #: Rows of the token embedding: token ids are below it.
    vocab_size: int = 0
    #: The kind of the tokenizer, such as "GPT-2 byte-level BPE", its tokens, and how many of them were added.
    tokenizer: str = ""
    tokenizer_size: int = 0
    added_tokens: int = 0
    has_chat_template: bool = False
    #: The tokens that end a text, at most MAX_IDS of them, how many there are, and the file that names them.
    eos_token_ids: list[int] = []
    eos_count: int = 0
    eos_source: str = ""
    #: The token for which the empty prompt stands; None: the empty prompt is refused.
    bos_token_id: int | None = None
    #: Parameters of requests that do not set them, from generation_config.json.
    defaults: dict[str, int | float] = {}
    #: Each thing that was ignored or changed, in a sentence.
    notes: list[str] = []

    def log_fields(self) -> dict[str, Any]:
        """The fields for the log line of the loaded model."""
        return self.model_dump(exclude={"eos_count", "vocab_size"})

    def summary(self) -> str:
        """One line for people, without the notes."""
        shown = ", ".join(map(str, self.eos_token_ids)) + (", ..." if self.eos_count > len(self.eos_token_ids) else "")
        ends = f"texts end at {shown} ({self.eos_source})" if self.eos_token_ids else "no token ends a text"
        kind = f"{self.tokenizer} with {self.tokenizer_size:,} tokens, {self.added_tokens or 'none'} of them added"
        context = f"{self.max_context:,}" + (f" of {self.positions:,}" if self.positions > self.max_context else "")
        chats = ", with a chat template" if self.has_chat_template else ""
        line = (
            f"{self.family}, {self.parameters:,} parameters, {self.dtype}, context {context}; "
            f"tokenizer: {kind if self.tokenizer_size else self.tokenizer}{chats}; {ends}"
        )
        if self.defaults:
            line += "; defaults: " + ", ".join(f"{name} {value:g}" for name, value in self.defaults.items())
        return printable(line)


def printable(text: str) -> str:
    """A text that came from a file or from Redis, for a terminal: without control characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def shortened_notes(notes: list[str]) -> list[str]:
    """At most MAX_NOTES notes of at most MAX_TEXT characters each."""
    texts = [note if len(note) <= MAX_TEXT else note[: MAX_TEXT - 3] + "..." for note in map(printable, notes)]
    if len(texts) > MAX_NOTES:
        texts[MAX_NOTES - 1 :] = [f"and {len(texts) - MAX_NOTES + 1} more"]
    return texts

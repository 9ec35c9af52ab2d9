"""The answers of transformers, in float64: prompt ids, greedy tokens, logits and text."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from tests.zoo.entry import Entry, Made
from tests.zoo.vocabularies import read_json

USUAL = ("The river runs past", "Hello there. How", "She said\n  that it's 1998")
#: Prompts of token ids, where there is no tokenizer to read text.
IDS = ((65, 66, 67), (1, 100, 7, 30, 99), (70,))
#: Tokens are compared up to the first whose logit is not larger than the others' by this.
TIE = 0.02
#: Sampling of generation_config.json is not what is asked for.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": None,
    "top_p": None,
    "top_k": None,
}


@dataclass
class Answer:
    """What transformers makes of one prompt."""

    prompt: str | list[int] | tuple[dict[str, str], ...]
    ids: list[int]
    tokens: list[int] = field(default_factory=list)
    #: Whether the last token ends the text.
    ended: bool = False
    text: str = ""
    #: Of the prompt: [T, V].
    logits: np.ndarray | None = None
    #: Log probabilities of the tokens.
    logprobs: list[float] = field(default_factory=list)
    #: The smallest difference of the two largest logits.
    gap: float = float("inf")


def written(folder: Path, prompt: str, count: int) -> list[int]:
    """What a directory's model writes after a prompt, whatever token ends a text."""
    with quiet():
        reader, model = Reader(folder, Entry(folder.name, str, "")), _load(folder)
    return _generate(model, reader.encode(prompt), count, eos_token_id=None)[0]


def answers(entry: Entry, made: Made) -> list[Answer]:
    """The answers to all prompts of an entry. Prompts that do not fit the model are left out."""
    folder = made.reference or made.model
    with quiet():
        model = _load(folder)
        ids = entry.text_refused != ""
        reader = None if ids else Reader(folder, entry)
        found = []
        for prompt in list(map(list, IDS)) if reader is None else [*entry.prompts, *USUAL, *entry.chats]:
            tokens = _read(reader, prompt)
            if tokens and max(tokens) < model.config.vocab_size:
                found.append(Answer(prompt, tokens))
            elif not tokens and (bos := _stated(folder, "bos_token_id", reader)) is not None:
                found.append(Answer(prompt, [bos]))
        longest = model.config.max_position_embeddings
        found = [answer for answer in found if len(answer.ids) < longest]
        ends = _stated(folder, "eos_token_id", reader)
        for answer in found:
            _complete(answer, model, reader, ends, min(entry.new_tokens, longest - len(answer.ids)))
    assert found, f"{entry.name}: no prompt fits"
    return found


def _read(reader: Reader | None, prompt: Any) -> list[int]:
    if reader is None:
        return list(prompt)
    return reader.encode(prompt) if isinstance(prompt, str) else reader.chat(prompt)


def _stated(folder: Path, field: str, reader: Reader | None) -> Any:
    """A field of generation_config.json, else of config.json, else of the tokenizer. A null says: there is none."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if file.is_file() and field in (raw := read_json(file)):
            return raw[field]
    return None if reader is None else getattr(reader.auto, field)


def _complete(answer: Answer, model: Any, reader: Reader | None, ends: Any, count: int) -> None:
    with torch.inference_mode():
        answer.logits = model(torch.tensor([answer.ids])).logits[0].numpy()
    tokens, rows = _generate(model, answer.ids, count, eos_token_id=ends)
    for token, row in zip(tokens, rows, strict=True):
        top = np.sort(row)[-2:]
        if top[1] - top[0] < TIE:
            break
        answer.gap = min(answer.gap, float(top[1] - top[0]))
        answer.tokens.append(token)
        answer.logprobs.append(float(row[token] - row.max() - np.log(np.exp(row - row.max()).sum())))
    listed = ends if isinstance(ends, list) else [ends]
    answer.ended = bool(answer.tokens) and answer.tokens[-1] in listed
    if reader is not None:
        answer.text = reader.text(answer.ids, answer.tokens[:-1] if answer.ended else answer.tokens)


def _generate(model: Any, ids: list[int], count: int, **more: Any) -> tuple[list[int], list[np.ndarray]]:
    prompt = torch.tensor([ids])
    settings = type(model.generation_config)(
        max_new_tokens=count, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True, **more
    )
    model_generation, model.generation_config = model.generation_config, settings
    try:
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    finally:
        model.generation_config = model_generation
    return out.sequences[0, len(ids) :].tolist(), [row[0].double().numpy() for row in out.logits]


class Reader:
    """A directory's tokenizer: tokenizer.json as it is written, or what AutoTokenizer composes."""

    def __init__(self, folder: Path, entry: Entry) -> None:
        from transformers import AutoTokenizer

        self.entry = entry
        self.auto = AutoTokenizer.from_pretrained(folder)
        file = folder / "tokenizer.json"
        self.file = Tokenizer.from_file(str(file)) if file.is_file() else None

    @property
    def library(self) -> Tokenizer:
        """The tokenizer of `tokenizers`, in AutoTokenizer too."""
        return self.file or self.auto.backend_tokenizer

    @property
    def size(self) -> int:
        """How many tokens there are, the added ones too."""
        return int(self.library.get_vocab_size())

    @property
    def known(self) -> list[int]:
        """The ids of all tokens."""
        return sorted(self.library.get_vocab().values())

    def encode_all(self, texts: Sequence[str], *, parse: bool, add: bool) -> list[list[int]]:
        """Ids of each text: with special tokens in it read or not, and the tokens around it added or not."""
        self.library.encode_special_tokens = not parse
        try:
            if self.file is None:
                return list(self.auto(list(texts), add_special_tokens=add, split_special_tokens=not parse)["input_ids"])
            return [encoded.ids for encoded in self.file.encode_batch(list(texts), add_special_tokens=add)]
        finally:
            self.library.encode_special_tokens = False

    def decode_all(self, lists: Sequence[list[int]], *, skip: bool) -> list[str]:
        """Text of each list of ids."""
        if self.file is None:
            return [str(self.auto.decode(ids, skip_special_tokens=skip)) for ids in lists]
        return [str(text) for text in self.file.decode_batch(list(lists), skip_special_tokens=skip)]

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, read as the entry's requests ask for it."""
        parse = self.entry.parameter("parse_special_tokens", self.entry.reads_special_tokens)
        return self.encode_all([text], parse=parse, add=self.entry.parameter("add_special_tokens", True))[0]

    def decode(self, ids: list[int]) -> str:
        return self.decode_all([ids], skip=self.entry.parameter("skip_special_tokens", True))[0]

    def text(self, prompt: list[int], tokens: list[int]) -> str:
        """What the tokens add to the text of the prompt, as vLLM and transformers' streamers give it."""
        before, whole = self.decode(prompt), self.decode([*prompt, *tokens])
        return whole.removeprefix(before) if whole.startswith(before) else self.decode(tokens)

    def chat(self, messages: Any) -> list[int]:
        text = self.auto.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return self.encode_all([text], parse=True, add=False)[0]


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
    assert not report["missing_keys"], f"{folder}: transformers fills {report['missing_keys']} with random numbers"
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress bars of transformers."""
    from transformers.utils import logging as theirs

    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bar:
            theirs.enable_progress_bar()

"""Can the row `text` fail? Mistakes in reading and ending text are planted in the worker and must be caught by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.client.wire.requests import parse_request
from headrace.config import Settings
from headrace.worker.engine.build import load_engine
from headrace.worker.engine.engine import Engine
from headrace.worker.fidelity.text import TextCheck, TextResult
from tests.zoo import vocabularies, weights

Plant = Callable[[pytest.MonkeyPatch, Engine], None]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts a space before texts and has an added token. Two tokens end its texts."""
    folder = tmp_path_factory.mktemp("own")
    made = vocabularies.byte_level(spaced=True)
    made.add_special_tokens(["<user>"])
    weights.gpt2(folder, vocabularies.save_json(made, folder))
    weights.ends(folder, generation=[0, 7], bos=0)
    return folder


@pytest.fixture
def reader(own: Path) -> Engine:
    return load_engine(Settings(model=str(own)))


def text_row(folder: Path, engine: Engine) -> TextResult:
    """The row `text` of `headrace validate`."""
    check = TextCheck(folder, engine.tokenizer, engine.max_context, engine.runner.model.config.vocab_size)  # type: ignore[attr-defined]
    jobs = [engine.submit(parse_request(request)) for request in check.requests]
    while engine.step():
        pass
    return check.judge([job.result(timeout=0) for job in jobs])


def eos_ignored(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    engine.ends = dataclasses.replace(engine.ends, eos_token_ids=engine.ends.eos_token_ids[:1])


def all_ends_ignored(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    engine.ends = dataclasses.replace(engine.ends, eos_token_ids=())


def added_token_split(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    encode = type(engine.tokenizer)._encode
    patch.setattr(type(engine.tokenizer), "_encode", lambda self, text, parse, add: encode(self, text, False, add))


def prefix_space_lost(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    """The text is read as if a space were not put before it."""
    encode, plain = type(engine.tokenizer)._encode, vocabularies.byte_level()

    def without_space(self: Any, text: str, parse: bool, add: bool) -> list[int]:
        return encode(self, text, parse, add) if text[:1] in " <" else list(plain.encode(text).ids)

    patch.setattr(type(engine.tokenizer), "_encode", without_space)


def special_tokens_written(patch: pytest.MonkeyPatch, engine: Engine) -> None:
    patch.setattr(engine.tokenizer, "special_ids", frozenset())


MUTATIONS: list[tuple[Plant, str]] = [
    (eos_ignored, "eos_token_id 7 does not end a text"),
    (all_ends_ignored, "eos_token_id 0 does not end a text; 1 more"),
    (added_token_split, "prompt ids of 'left <"),
    (prefix_space_lost, "prompt ids of 'Hello.'"),
    (special_tokens_written, ": expected '', got "),
]


def test_the_text_of_a_model_as_it_is_passes(own: Path, reader: Engine) -> None:
    row = text_row(own, reader)
    assert (row.ok, row.note) == (True, "")
    assert row.eos_token_ids == (0, 7)
    assert row.texts > 15


@pytest.mark.parametrize(("plant", "words"), MUTATIONS, ids=[m[0].__name__ for m in MUTATIONS])
def test_a_mistake_in_reading_or_ending_text_is_caught_by_the_row_text(
    own: Path, reader: Engine, monkeypatch: pytest.MonkeyPatch, plant: Plant, words: str
) -> None:
    plant(monkeypatch, reader)
    row = text_row(own, reader)
    assert row.ok is False
    assert words in row.note


def test_a_space_that_the_first_word_of_an_output_loses_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights.gpt2(tmp_path, vocabularies.save_json(vocabularies.unigram(), tmp_path, eos_token="</s>", bos_token=None))
    engine = load_engine(Settings(model=str(tmp_path)))
    assert text_row(tmp_path, engine).ok
    decoder = type(engine.tokenizer).decoder

    def outside(self: Any, *rest: Any, **more: Any) -> Any:
        return decoder(self, *rest, **{**more, "inside": False})

    monkeypatch.setattr(type(engine.tokenizer), "decoder", outside)
    row = text_row(tmp_path, engine)
    assert row.ok is False
    assert "text of the output" in row.note

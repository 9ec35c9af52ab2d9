"""Where texts end and what the empty prompt stands for, compared with `generate` of transformers on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import GPT2Config, GPT2LMHeadModel

from headrace.client.wire.errors import JobFailed
from headrace.client.wire.model_description import MAX_NOTES, MAX_TEXT, shortened_notes
from headrace.client.wire.requests import parse_request
from headrace.config import Settings
from headrace.worker.engine.build import build_engine
from headrace.worker.engine.engine import Engine
from headrace.worker.engine.sequence_text import TextDelta
from tests.unit.worker.engine.engine_helpers import ask, drive

PROMPT = [11, 7, 300, 42]
NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose greedy texts do not repeat one token, with GPT-2's vocabulary."""
    torch.manual_seed(4)
    made = tmp_path_factory.mktemp("ends")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64, initializer_range=0.9)
    GPT2LMHeadModel(config).save_pretrained(made)
    return made


def engine_with(folder: Path, named: dict[str, Any]) -> Engine:
    (folder / "generation_config.json").write_text(json.dumps(named))
    return build_engine(Settings(model=str(folder), served_name="tiny", device="cpu", dtype="float32", draft_tokens=7))


def generated(folder: Path, prompt: list[int] | None, **options: Any) -> list[int]:
    """What transformers generates with the same files, its own ends included."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    given = {} if prompt is None else {"input_ids": torch.tensor([prompt])}
    out = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options)[0].tolist()
    tokens: list[int] = out[len(prompt or [0]) :]
    return tokens


@pytest.fixture(scope="module")
def free(folder: Path) -> list[int]:
    """The greedy text if nothing ends it."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": None, "bos_token_id": 7}))
    tokens = generated(folder, PROMPT)
    assert len(tokens) == NEW
    assert len(set(tokens)) > 8
    return tokens


@pytest.mark.parametrize("places", [(5,), (9, 5), (12, 9, 20)])
def test_every_eos_of_a_list_ends_the_text_and_is_left_out(
    places: tuple[int, ...], folder: Path, free: list[int]
) -> None:
    ids = [free[place] for place in places]
    engine = engine_with(folder, {"eos_token_id": ids if len(ids) > 1 else ids[0], "bos_token_id": 7})
    expected = generated(folder, PROMPT)
    assert len(expected) < NEW
    deltas: list[TextDelta] = []
    streamed = engine.submit(ask(PROMPT, max_tokens=NEW), on_text=deltas.append)
    after = len(expected) + 1
    suppressed = engine.submit(ask(PROMPT, max_tokens=NEW, min_tokens=after))
    ignored = engine.submit(ask(PROMPT, max_tokens=NEW, ignore_eos=True))
    stops_itself = engine.submit(ask(PROMPT, max_tokens=NEW, ignore_eos=True, stop_token_ids=[ids[0]]))
    results = [result.choices[0] for result in drive(engine, streamed, suppressed, ignored, stops_itself)]
    assert results[0].token_ids == expected
    assert (results[0].finish_reason, results[0].stop_reason) == ("stop", None)
    assert results[0].text == engine.tokenizer.decode(expected[:-1])
    assert "".join(delta.text for delta in deltas) == results[0].text
    assert results[1].token_ids == generated(folder, PROMPT, min_new_tokens=after)
    assert (results[2].token_ids, results[2].finish_reason) == (free, "length")
    # The request's own stop token is named, although it is one of the ends that the request ignores.
    assert results[3].token_ids == free[: free.index(ids[0]) + 1]
    assert results[3].stop_reason == ids[0]


def test_the_empty_prompt_stands_for_bos_also_where_eos_is_another(folder: Path, free: list[int]) -> None:
    engine = engine_with(folder, {"eos_token_id": free[3], "bos_token_id": 7})
    (result,) = drive(engine, engine.submit(ask("", max_tokens=NEW)))
    assert result.choices[0].token_ids == generated(folder, None)
    assert result.usage.prompt_tokens == 1
    assert engine.ends.source == "generation_config.json"


def test_other_ends_are_another_model_in_the_fingerprint(folder: Path, free: list[int]) -> None:
    prints = {
        engine_with(folder, {"eos_token_id": eos, "bos_token_id": 7}).fingerprint
        for eos in (free[3], [free[3]], [free[3], free[5]], None)
    }
    assert len(prints) == 3


def test_defaults_of_generation_config_count_only_if_asked_for_and_not_set(folder: Path) -> None:
    named = {"eos_token_id": None, "bos_token_id": 7, "temperature": 0, "max_new_tokens": 500, "top_p": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(named))
    settings = Settings(model=str(folder), served_name="tiny", device="cpu", dtype="float32")
    plain, auto = (build_engine(settings.model_copy(update={"generation_config": kind})) for kind in ("none", "auto"))
    bare = parse_request({"prompt": PROMPT, "seed": 3})
    explicit = parse_request({"prompt": PROMPT, "seed": 3, "temperature": 1.0, "max_tokens": 16, "top_p": 1.0})
    arrived = [parse_request(request.to_wire()) for request in (bare, explicit)]  # as a worker reads them
    (as_before,) = drive(plain, plain.submit(bare))
    defaulted, chosen = drive(auto, *map(auto.submit, arrived))
    assert (as_before.defaults, chosen.defaults) == ({}, {})
    assert as_before.choices == chosen.choices
    # max_new_tokens is lowered to what the context of 64 holds.
    assert defaulted.defaults == {"temperature": 0, "max_tokens": 60, "top_p": 0.5}
    greedy = ask(PROMPT, max_tokens=60)
    assert defaulted.choices == drive(plain, plain.submit(greedy))[0].choices
    assert plain.fingerprint != auto.fingerprint
    assert auto.description.defaults == {"temperature": 0, "max_tokens": 500, "top_p": 0.5}
    with pytest.raises(JobFailed, match="min_tokens: got 61; expected at most max_tokens, which is 60 by the model's"):
        auto.submit(parse_request({"prompt": PROMPT, "min_tokens": 16}).model_copy(update={"min_tokens": 61})).result(0)


def test_the_load_line_says_what_was_understood(folder: Path) -> None:
    with capture_logs() as logs:
        engine = engine_with(folder, {"eos_token_id": [5, 60_000], "bos_token_id": 7})
    (line,) = [entry for entry in logs if entry["event"] == "model.loaded"]
    said = {name: line[name] for name in ("family", "dtype", "max_context", "tokenizer_size", "eos_token_ids")}
    assert said == {
        "family": "gpt2", "dtype": "float32", "max_context": 64, "tokenizer_size": 50257, "eos_token_ids": [5]
    }  # fmt: skip
    parameters = sum(p.numel() for p in GPT2LMHeadModel.from_pretrained(folder).parameters())
    assert line["parameters"] == parameters
    assert any("60000 of generation_config.json is outside the vocabulary" in note for note in line["notes"])
    assert len(engine.description.model_dump_json()) < 2_000


def test_a_description_is_bounded() -> None:
    notes = shortened_notes(["x" * 10_000] * 1_000)
    assert len(notes) == MAX_NOTES
    assert max(map(len, notes)) <= MAX_TEXT
    assert notes[-1] == f"and {1_000 - MAX_NOTES + 1} more"

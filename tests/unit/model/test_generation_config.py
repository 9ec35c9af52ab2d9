"""Which tokens end a text and stand for the empty prompt: each file that may say so, and wrong values."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.model.generation_config import MAX_EOS_IDS, Ends, read_ends, sampling_defaults, unapplied_defaults
from headrace.model.hub import ModelError

VOCABULARY = 40
ABSENT = object()


def ends(folder: Path, generation: Any = ABSENT, config: Any = ABSENT, own: int | None = 9) -> Ends:
    """The ends for eos_token_id and bos_token_id of these values in the two files, and `own` in the tokenizer's."""
    named = [
        {} if value is ABSENT else {"eos_token_id": value, "bos_token_id": value} for value in (generation, config)
    ]
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not ABSENT:
        path.write_text(json.dumps({**named[0], "temperature": 0.7}))
    return read_ends(folder, named[1], SimpleNamespace(bos_token_id=own, eos_token_id=own), VOCABULARY)


def test_generation_config_counts_before_config_and_config_before_the_tokenizer(tmp_path: Path) -> None:
    found = [ends(tmp_path, 3, 4), ends(tmp_path, ABSENT, 4), ends(tmp_path), ends(tmp_path, own=None)]
    assert [each.eos_token_ids for each in found] == [(3,), (4,), (9,), ()]
    assert [each.bos_token_id for each in found] == [3, 4, 9, None]
    assert [each.source for each in found] == ["generation_config.json", "config.json", "the tokenizer", "nothing"]
    assert not any(each.notes for each in found)


def test_a_file_without_the_key_leaves_the_choice_to_the_next(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    found = read_ends(tmp_path, {"bos_token_id": 4}, SimpleNamespace(bos_token_id=9, eos_token_id=9), VOCABULARY)
    assert (found.eos_token_ids, found.bos_token_id, found.bos_source) == ((3, 5), 4, "config.json")


def test_null_means_none_as_in_transformers_and_the_load_line_says_so(tmp_path: Path) -> None:
    found = ends(tmp_path, None, 4)
    assert (found.eos_token_ids, found.bos_token_id) == ((), None)
    assert "as generation_config.json says; the tokenizer's end is 9" in found.notes[0]


@pytest.mark.parametrize(("value", "known"), [(-1, ()), ([5, -1], (5,)), ([5, 1000, 5], (5,)), (2**70, ()), ([], ())])
def test_ids_outside_the_vocabulary_never_occur_and_are_noted(
    value: int | list[int], known: tuple[int, ...], tmp_path: Path
) -> None:
    for place in ({"generation": value}, {"config": value}):
        if isinstance(value, list):
            (tmp_path / "generation_config.json").unlink(missing_ok=True)
            found = read_ends(
                tmp_path, {"eos_token_id": value}, SimpleNamespace(bos_token_id=9, eos_token_id=9), VOCABULARY
            )
        else:
            found = ends(tmp_path, **place)
            assert found.bos_token_id is None
        assert found.eos_token_ids == known
        assert found.notes


@pytest.mark.parametrize("value", [True, "5", "<eos>", 5.0, {"a": 1}, [[5]], ["5"], [True], [None], [1.0]])
@pytest.mark.parametrize("place", ["generation", "config"])
def test_a_value_that_is_no_token_id_is_refused_by_field_value_and_file(place: str, value: Any, tmp_path: Path) -> None:
    name = "generation_config.json" if place == "generation" else "config.json"
    with pytest.raises(
        ModelError, match=rf"{name}: eos_token_id is .*; it must be a token id, a list of token ids, or"
    ):
        ends(tmp_path, **{place: value})
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": value}))
    with pytest.raises(ModelError, match=r"generation_config.json: bos_token_id is .*; it must be a token id, or null"):
        read_ends(tmp_path, {}, SimpleNamespace(bos_token_id=9, eos_token_id=9), VOCABULARY)


def test_a_huge_list_and_a_broken_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"eos_token_id is a list of {MAX_EOS_IDS + 1} ids; it may have at most"):
        ends(tmp_path, list(range(MAX_EOS_IDS + 1)))
    (tmp_path / "generation_config.json").write_text("{broken")
    with pytest.raises(ModelError, match=r"generation_config.json: not JSON"):
        read_ends(tmp_path, {}, SimpleNamespace(bos_token_id=9, eos_token_id=9), VOCABULARY)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(eos=json_values, bos=json_values)
def test_any_value_gives_known_tokens_or_an_error_that_names_it(eos: Any, bos: Any) -> None:
    tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    try:
        found = read_ends(Path("/nowhere"), {"eos_token_id": eos, "bos_token_id": bos}, tokenizer, VOCABULARY)
    except ModelError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "config.json: eos_token_id is" in refused or "config.json: bos_token_id is" in refused
        return
    assert all(type(token) is int and 0 <= token < VOCABULARY for token in found.eos_token_ids)
    assert found.bos_token_id is None or 0 <= found.bos_token_id < VOCABULARY


def test_sampling_defaults_have_the_names_of_requests(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}
    given = {
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": None,
        "repetition_penalty": 1,
        "max_new_tokens": 9.0,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps({**given, "do_sample": True, "num_beams": 4}))
    assert sampling_defaults(tmp_path) == {
        "temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1, "max_tokens": 9
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"), ("temperature", -1), ("temperature", True), ("top_k", 2.5),
        ("top_p", 0), ("top_p", [1]),
        ("min_p", 1.5), ("repetition_penalty", 0), ("max_new_tokens", 0), ("temperature", float("nan")),
    ],
)  # fmt: skip
def test_a_wrong_sampling_default_is_refused_by_field_value_and_file(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(ModelError, match=rf"generation_config.json: {name} is .*; it must be a .*CONFIG=none"):
        sampling_defaults(tmp_path)
    ends(tmp_path, 5)  # without HEADRACE_GENERATION_CONFIG=auto, sampling parameters are not read


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ({"temperature": 0.7, "top_k": 20}, "temperature 0.7, top_k 20 of generation_config.json were ignored: "),
        ({"max_new_tokens": 9}, "max_new_tokens 9 of generation_config.json was ignored: "),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "do_sample": True}, None),
        ({"temperature": [0.7]}, "temperature [0.7] of generation_config.json was ignored: "),
        (None, None),
    ],
)
def test_sampling_defaults_that_are_not_applied_are_said(tmp_path: Path, given: Any, note: str | None) -> None:
    if given is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(given))
    said = "requests decide, unless HEADRACE_GENERATION_CONFIG=auto"
    assert unapplied_defaults(tmp_path) == (() if note is None else (note + said,))


def test_a_gguf_file_says_its_ends_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    own = SimpleNamespace(bos_token_id=9, eos_token_id=9)
    found = read_ends(path, {"eos_token_id": 3, "bos_token_id": 4}, own, VOCABULARY)
    assert (found.eos_token_ids, found.bos_token_id, found.source) == ((3,), 4, "model.gguf")
    assert sampling_defaults(path) == {}
    with pytest.raises(ModelError, match=r"model\.gguf: eos_token_id is '3'"):
        read_ends(path, {"eos_token_id": "3"}, own, VOCABULARY)

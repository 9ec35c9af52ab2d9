"""Which tokens end a text and stand for the empty prompt: each file that may say so, and wrong values."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.model.generation_config import MAX_EOS_IDS, Ends, read_ends
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

"""Names of models follow from strings alone: no file system, no other name on another machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client import Client, InvalidRequest
from headrace.config import Settings, load_settings
from headrace.config.model_names import as_name, is_served_name, served_name, slug

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20) | st.text(st.sampled_from("aZ9._-/~ \0"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt2", "gpt2"),
        ("openai-community/gpt2-medium", "openai-community-gpt2-medium"),
        ("/models/my model", "my-model"),
        ("./here/gpt2.v1", "gpt2.v1"),
        ("./here/gpt2/", "gpt2"),
        ("~/gpt2_x", "gpt2_x"),
        ("../other/gpt2/../v2", "v2"),
        ("/", "model"),
        ("***", "model"),
        ("~\0", "model"),
        ("a" * 127 + "-b", "a" * 127),
    ],
)
def test_a_model_of_the_settings_has_a_served_name(model: str, name: str) -> None:
    assert slug(model) == name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt2", "gpt2"),
        ("v1.2_x", "v1.2_x"),
        ("openai-community/gpt2", "openai-community-gpt2"),
        *(
            (wrong, None)
            for wrong in ("", ".", "..", "./gpt2", "../gpt2", "~", "~/gpt2", "/models/gpt2", "a/b/c", "a/")
        ),
        *((wrong, None) for wrong in ("a b", "a/", "gpt2\n", "gpt2\0", "~\0", "\ud83d", "-", "a" * 129, "é", "*")),
    ],
)
def test_a_request_names_a_model_as_it_stands(model: str, name: str | None) -> None:
    assert served_name(model) == name


@given(ANY_TEXT)
def test_every_name_is_a_served_name_and_means_itself(text: str) -> None:
    for name in (as_name(text), slug(text), served_name(text)):
        assert name is None or (is_served_name(name) and slug(name) == served_name(name) == name)


def test_directories_and_links_do_not_decide_what_a_name_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some" / "v2").mkdir(parents=True)
    (tmp_path / "gpt2").symlink_to(tmp_path / "some" / "v2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADRACE_MODEL", "gpt2")
    assert load_settings().model_name == "gpt2"
    assert load_settings(model=str(tmp_path / "gpt2")).model_name == "gpt2"
    assert load_settings(model="some/v2").model_name == "some-v2"
    assert load_settings(model="./some/v2").model_name == "v2"
    with Client(settings=Settings(redis_url="redis://localhost:1/0", model="demo"), model="gpt2") as client:
        assert client.model_name == "gpt2"
        assert client.submitter.prepare({"prompt": "a", "model": "gpt2"}).model == "gpt2"
        assert client.submitter.prepare({"prompt": "a", "model": "some/v2"}).model == "some-v2"
        for path in ("./gpt2", str(tmp_path / "gpt2"), "~\0"):
            with pytest.raises(InvalidRequest, match=r"model: got .* a path belongs into the worker's HEADRACE_MODEL"):
                client.submitter.prepare({"prompt": "a", "model": path})
    with pytest.raises(InvalidRequest, match="model"):
        Client(settings=Settings(redis_url="redis://localhost:1/0"), model="./gpt2")


def test_the_working_directory_is_named_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v3" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "v3" / "inner")
    assert (slug("."), slug(".."), slug("./")) == ("inner", "v3", "inner")

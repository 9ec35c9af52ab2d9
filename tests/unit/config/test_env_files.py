"""The environment files that people copy: complete, spelt right, and accepted."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from headrace.config.settings import PREFIX, Settings, SettingsError, load_settings

CONFIG = Path(__file__).parents[3] / "config"
FILES = ["dev.env", "prod.env.example"]
SECRETS = ["HEADRACE_SIGNING_KEY", "HEADRACE_API_KEYS"]


def assignments(file: str, *, commented_out: bool) -> dict[str, str]:
    """Names and values in a file, on request including those that are commented out."""
    pattern = re.compile(rf"^{'#?' if commented_out else ''}([A-Z_]+)=(.*)$", re.MULTILINE)
    return dict(pattern.findall((CONFIG / file).read_text()))


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("file", FILES)
def test_the_files_contain_every_setting_and_nothing_else(file: str) -> None:
    assert set(assignments(file, commented_out=True)) == {PREFIX + name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("commented_out", [False, True])
def test_the_values_are_accepted(monkeypatch: pytest.MonkeyPatch, file: str, commented_out: bool) -> None:
    values = assignments(file, commented_out=commented_out)
    for name in SECRETS:
        values.pop(name, None)  # their placeholders must not work: below
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = load_settings().model_dump(mode="json")
    for name, value in values.items():
        assert settings[name.removeprefix(PREFIX).lower()] in (value, int(value) if value.isdigit() else value)


@pytest.mark.parametrize("file", FILES)
def test_every_line_is_read_alike_by_a_shell_and_by_docker(file: str) -> None:
    for line in (CONFIG / file).read_text().splitlines():
        assert line == "" or line.startswith("#") or re.fullmatch(r"[A-Z_]+=[^\s'\"$`\\;&|<>()]+", line), line


@pytest.mark.parametrize("file", FILES)
def test_every_setting_is_explained(file: str) -> None:
    for block in (CONFIG / file).read_text().strip().split("\n\n")[1:]:
        assert block.startswith("# "), f"no reason is given for {block!r}"


def test_production_logs_for_programs_and_holds_no_real_password() -> None:
    values = assignments("prod.env.example", commented_out=False)
    assert values["HEADRACE_LOG_FORMAT"] == "json"
    assert ":CHANGE-ME@" in values["HEADRACE_REDIS_URL"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", SECRETS)
def test_the_placeholders_of_secrets_do_not_work(file: str, name: str) -> None:
    placeholder = assignments(file, commented_out=True)[name]
    with pytest.raises(SettingsError, match=name):
        load_settings(**{name.removeprefix(PREFIX).lower(): placeholder})

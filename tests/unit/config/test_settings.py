"""Settings: defaults, sources, and the errors for wrong values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from headrace.config.settings import PREFIX, Settings, SettingsError, load_settings, redact_url


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the settings of the environment that runs the tests."""
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


def test_defaults() -> None:
    settings = load_settings()
    assert settings.model == settings.model_name == "demo"
    assert settings.redis_url is None
    assert (settings.device, settings.dtype) == ("auto", "auto")
    assert (settings.slots, settings.max_context, settings.kv_cache_bytes, settings.threads) == (64, None, None, None)
    assert (settings.log_level, settings.log_format) == ("info", "auto")
    assert settings.result_ttl_s == 24 * 60 * 60
    assert settings.lease_s > 0
    assert settings == Settings()


def test_the_environment_counts_and_arguments_count_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_SLOTS", "3")
    monkeypatch.setenv("HEADRACE_THREADS", "2")
    settings = load_settings(slots=5)
    assert (settings.slots, settings.threads) == (5, 2)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(PREFIX + name.upper(), "")
    assert load_settings() == Settings()


def test_settings_cannot_be_changed() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.slots = 5  # type: ignore[misc]
    assert settings.model_copy(update={"slots": 5}).slots == 5
    assert settings.slots == 64


#: For every setting an invalid value; None if every value is valid.
WRONG: dict[str, str | None] = {
    "model": "demo,",
    "served_name": "two words",
    "adapters": "demo=/adapters/demo",
    "adapters_dir": None,
    "adapter_bytes": "0",
    "redis_url": "http://localhost:6379",
    "signing_key": "thirty-one characters, one less",
    "redis_unsuitable": "warn",
    "device": "gpu",
    "dtype": "int4",
    "generation_config": "vllm",
    "allow_shared_model": "perhaps",
    "parse_special_tokens": "sometimes",
    "slots": "0",
    "max_context": "1",
    "kv_cache_bytes": "0",
    "threads": "0",
    "cpu_isa": "avx",
    "step_tokens": "15",
    "prefill_chunk": "1025",
    "prefix_cache": "sometimes",
    "draft_tokens": "16",
    "draft_model": None,  # whether there is such a model is checked when it is loaded
    "idle_unload_s": "-1",
    "max_queue": "0",
    "max_result_bytes": "65535",
    "result_ttl_s": "59",
    "events_ttl_s": "0",
    "checkpoint_ttl_s": "0",
    "checkpoint_max_bytes": "-1",
    "lease_s": "2",
    "max_attempts": "1",
    "soft_shutdown_s": "-1",
    "stall_s": "0.5",
    "api_keys": "fifteen-letters",
    "files_dir": None,
    "metrics_port": "65536",
    "otel": "otlp",
    "metrics_host": None,  # whether the machine has the address is checked at the start
    "log_level": "verbose",
    "log_format": "xml",
}


def test_every_setting_is_tried_with_a_wrong_value() -> None:
    assert set(WRONG) == set(Settings.model_fields)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value in WRONG.items() if value is not None])
def test_a_wrong_value_is_named_with_what_is_right(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(PREFIX + name.upper(), value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    right = Settings.model_fields[name].description
    assert right
    shown = "***" if name in ("signing_key", "api_keys") else value
    assert str(error.value) == f"{PREFIX}{name.upper()} is {shown!r}; it must be {right}"


@pytest.mark.parametrize("value", ["many", "1.5", "1e3", "5000"])
def test_numbers_are_whole_and_in_range(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HEADRACE_SLOTS", value)
    with pytest.raises(SettingsError, match=r"HEADRACE_SLOTS is .* a whole number from 1 to 4096"):
        load_settings()


@pytest.mark.parametrize("value", ["cuda:x", "cuda:", "CPU ", "cuda:0,1", "mps"])
def test_devices_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HEADRACE_DEVICE", value)
    with pytest.raises(SettingsError, match="HEADRACE_DEVICE"):
        load_settings()


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("HEADRACE_SLOT", "HEADRACE_SLOTS"),
        ("HEADRACE_REDISURL", "HEADRACE_REDIS_URL"),
        ("HEADRACE_LOGLEVEL", "HEADRACE_LOG_LEVEL"),
        ("HEADRACE_MAXCONTEXT", "HEADRACE_MAX_CONTEXT"),
    ],
)
def test_a_misspelt_variable_names_the_nearest(monkeypatch: pytest.MonkeyPatch, misspelt: str, nearest: str) -> None:
    monkeypatch.setenv(misspelt, "1")
    with pytest.raises(SettingsError, match=f"^{misspelt} is not a setting of headrace; did you mean {nearest}[?]$"):
        load_settings()


@pytest.mark.parametrize(
    ("model", "adapters"),
    [
        ("demo", "tone"),
        ("demo", "tone="),
        ("demo", "=/a"),
        ("demo", "a=/a,a=/b"),
        ("demo", "a=/a,,b=/b"),
        ("demo", "other/a=/a"),
        ("demo", "a/b/c=/a"),
        ("demo", ".a=/a"),
        ("demo,gpt2", "a=/a"),
        ("demo,gpt2", "demo/a=/a,gpt2/a=/b"),
        ("demo,gpt2", "demo/gpt2=/a"),
    ],
)
def test_wrong_adapters_are_refused(model: str, adapters: str) -> None:
    with pytest.raises(SettingsError, match=r"^HEADRACE_ADAPTERS is .*NAME=DIRECTORY"):
        load_settings(model=model, adapters=adapters)


def test_adapters_belong_to_their_models() -> None:
    one = load_settings(model="demo", adapters="a=/x/a, demo/b=/x/b=1", adapters_dir="/y")
    assert one.adapters_of("demo") == {"a": Path("/x/a"), "b": Path("/x/b=1")}
    assert one.adapters_dir_of("demo") == Path("/y")
    two = load_settings(model="demo,chat=/m", adapters="chat/a=/x/a,demo/b=/x/b", adapters_dir="/y")
    assert [two.adapters_of(name) for name in two.models] == [{"b": Path("/x/b")}, {"a": Path("/x/a")}]
    assert two.adapters_dir_of("chat") == Path("/y/chat")
    only = two.only("chat")
    assert (only.models, only.adapters_of("chat")) == ({"chat": "/m"}, {"a": Path("/x/a")})
    assert only.adapters_dir_of("chat") == Path("/y/chat")
    assert load_settings(served_name="x", adapters="x/a=/x").adapters_of("x") == {"a": Path("/x")}
    assert load_settings().adapters_dir_of("demo") is None


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(SettingsError, match="slotz is not a setting of headrace"):
        load_settings(slotz=3)


# Redis


@pytest.mark.parametrize("url", ["redis://localhost:6379/0", "rediss://host/1", "unix:///run/redis.sock"])
def test_valid_urls_are_accepted(url: str) -> None:
    assert load_settings(redis_url=url).redis_url == url


@pytest.mark.parametrize("show", [repr, str, "{}".format])
def test_a_password_is_never_shown(show: Any) -> None:
    settings = load_settings(redis_url="redis://user:secret@host:6379/0")
    assert "secret" not in show(settings)
    assert "redis://user:***@host:6379/0" in show(settings)


def test_a_wrong_url_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_REDIS_URL", "http://user:secret@host")
    with pytest.raises(
        SettingsError, match=r"HEADRACE_REDIS_URL is 'http://user:\*\*\*@host'; it must be a URL"
    ) as error:
        load_settings()
    assert error.value.__cause__ is None, "the cause quotes the URL as it was given"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user@host/0", "redis://user@host/0"),
        ("redis://user:secret@host:6379/0?x=1", "redis://user:***@host:6379/0?x=1"),
        ("rediss://:secret@host", "rediss://:***@host"),
        ("redis://:sec@ret@host", "redis://:***@host"),
        ("unix:///run/redis.sock?db=0", "unix:///run/redis.sock?db=0"),
    ],
)
def test_redact_url(url: str, shown: str) -> None:
    assert redact_url(url) == shown


# Names of models


def test_a_served_name_replaces_the_name_of_the_model() -> None:
    assert load_settings(model="gpt2", served_name="chat-1").model_name == "chat-1"


@pytest.mark.parametrize(
    ("value", "models"),
    [
        ("demo", {"demo": "demo"}),
        ("demo, gpt2", {"demo": "demo", "gpt2": "gpt2"}),
        (
            "chat=/models/v2,openai-community/gpt2",
            {"chat": "/models/v2", "openai-community-gpt2": "openai-community/gpt2"},
        ),
        ("a = demo , b=demo", {"a": "demo", "b": "demo"}),
        ("/runs/lr=0.1", {"lr-0.1": "/runs/lr=0.1"}),
        ("best=/runs/lr=0.1", {"best": "/runs/lr=0.1"}),
    ],
)
def test_several_models_have_names_of_their_own(value: str, models: dict[str, str]) -> None:
    settings = load_settings(model=value)
    assert settings.models == models
    assert settings.model_name == next(iter(models)), "jobs that name none go to the first"
    for name, model in models.items():
        assert settings.only(name).models == {name: model}


@pytest.mark.parametrize(
    "value", [",", "demo,", "demo,,gpt2", "demo,demo", "a=gpt2,a=demo", "gpt2=", "=gpt2", "/a/gpt2,/b/gpt2"]
)
def test_models_without_a_name_or_with_the_same_are_refused(value: str) -> None:
    with pytest.raises(SettingsError, match=f"HEADRACE_MODEL is '{value}'; it must be .* under different names"):
        load_settings(model=value)


def test_a_served_name_is_for_one_model() -> None:
    assert load_settings(model="a=gpt2", served_name="chat").models == {"chat": "gpt2"}
    with pytest.raises(SettingsError, match=r"HEADRACE_SERVED_NAME is 'chat'; .*NAME=MODEL"):
        load_settings(model="demo,gpt2", served_name="chat")


KEY, OLD_KEY = "k" * 32, "old-" * 8


def test_signing_keys_are_a_list_and_the_first_one_signs() -> None:
    assert load_settings().signing_keys == ()
    assert load_settings(signing_key=KEY).signing_keys == (KEY.encode(),)
    assert load_settings(signing_key=f"{KEY}, {OLD_KEY}").signing_keys == (KEY.encode(), OLD_KEY.encode())


@pytest.mark.parametrize("value", ["k" * 31, f"{KEY},", f"{KEY},short", f"{KEY} {KEY}", "k" * 31 + " ", ","])
def test_a_weak_signing_key_is_refused_and_never_shown(value: str) -> None:
    with pytest.raises(SettingsError, match="at least 32 characters") as error:
        load_settings(signing_key=value)
    assert "kkk" not in str(error.value)
    with pytest.raises(ValidationError) as plain:
        Settings(signing_key=value)  # type: ignore[arg-type]
    assert "kkk" not in str(plain.value)


def test_the_signing_key_is_in_no_text_about_the_settings() -> None:
    settings = load_settings(signing_key=KEY)
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump())):
        assert KEY not in text
    assert load_settings(**settings.model_dump()).signing_keys == settings.signing_keys


@pytest.mark.parametrize(
    "name", ["FILES_DIR", "MODEL", "SERVED_NAME", "REDIS_URL", "API_KEYS", "METRICS_HOST", "LOG_LEVEL"]
)
def test_bytes_that_are_no_utf8_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"HEADRACE_{name}", os.fsdecode(b"a-key-0123456789-\xff"))
    with pytest.raises(SettingsError, match=f"HEADRACE_{name} is .*UTF-8") as caught:
        load_settings()
    str(caught.value).encode()

"""Settings, read once from `HEADRACE_*` environment variables. `config/dev.env` lists them with comments."""

from __future__ import annotations

import difflib
import os
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from headrace.config.sentinel import is_sentinel, parse_sentinel

PREFIX = "HEADRACE_"
DEFAULT_REDIS_URL = "redis://localhost:6379/0"
URL_SCHEMES = ("redis", "rediss", "unix")
#: Characters of a model's name in queues and results.
MAX_NAME = 128
#: No setting that is a number may be larger: beyond it Redis, torch and clocks refuse numbers one by one, at work.
MAX_BYTES, MAX_SECONDS = 2**50, 10 * 365 * 86_400
#: As long as the digest that it keys: a shorter one could be guessed.
SHORTEST_SIGNING_KEY = 32
#: A key that goes over the network can be tried out only slowly.
SHORTEST_API_KEY = 16


class SettingsError(ValueError):
    """Raised when a setting is unknown or has a value it cannot have; the message names it and says what is right."""


class Settings(BaseSettings):
    """Everything that can be set. Immutable; build another with `model_copy(update=...)`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True
    )

    #: One, or several with commas between them. `models` has them apart.
    model: str = Field(
        "demo",
        description="'demo', a GPT-2 size by name, a hub id, or a directory; or several under different names, with "
        "commas between them, where NAME=MODEL gives one a name",
    )
    served_name: str | None = Field(
        None,
        description="a name of letters, digits, '.', '_' and '-', and is only for one model; of several in "
        "HEADRACE_MODEL each can have its own there, NAME=MODEL",
    )
    #: None: the embedded server if one runs, else DEFAULT_REDIS_URL.
    redis_url: str | None = Field(
        None,
        description="a URL as redis://host:6379/0, rediss://..., unix:///path or "
        "sentinel://host:26379,host:26379/0?master=name",
    )
    #: Several, separated by commas, are all accepted by workers; clients sign with the first. None: nothing is signed.
    signing_key: SecretStr | None = Field(
        None,
        description=f"a secret of at least {SHORTEST_SIGNING_KEY} characters without spaces, or several of them "
        "separated by commas; make one with `openssl rand -hex 32`",
    )
    device: str = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:N'", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="'auto', 'float32', 'bfloat16', 'float16' or 'int8'"
    )
    slots: int = Field(64, description="a whole number from 1 to 4096", ge=1, le=4096)
    #: None: as many positions as the model has.
    max_context: int | None = Field(None, description="a whole number from 2 to 2**50", ge=2, le=MAX_BYTES)
    #: Of all models together, in equal parts. None: room for every slot at full length, but at most a quarter of the
    #: memory that is free when a model is loaded.
    kv_cache_bytes: int | None = Field(None, description="a whole number of bytes, from 1 to 2**50", ge=1, le=MAX_BYTES)
    #: None: what torch finds, the physical cores.
    threads: int | None = Field(None, description="a whole number from 1 to 4096", ge=1, le=4096)
    #: Rows of one forward pass: bounds how long a decoding row can wait behind somebody's prompt.
    step_tokens: int = Field(512, description="a whole number from 16 to 8192", ge=16, le=8192)
    #: Prompts are computed in pieces of this many tokens; a different value may change the last bits of a result.
    prefill_chunk: int = Field(128, description="a whole number from 16 to 1024", ge=16, le=1024)
    #: Tokens of a text that are guessed at a time while few texts are computed; no result depends on it.
    draft_tokens: int = Field(7, description="a whole number from 0 to 15", ge=0, le=15)
    #: 0: never. Else all but the first model are loaded when a job for them comes.
    idle_unload_s: float = Field(0.0, description="a number of seconds, from 0 to 315360000", ge=0, le=MAX_SECONDS)
    max_queue: int = Field(1_000_000, description="a whole number from 1 to 2**50", ge=1, le=MAX_BYTES)
    result_ttl_s: int = Field(
        86_400, description="a whole number of seconds, from 60 to 315360000", ge=60, le=MAX_SECONDS
    )
    #: Of the events of a job that streams, after the last one; what they tell is in the result too.
    events_ttl_s: int = Field(3_600, description="a whole number of seconds, from 1 to 315360000", ge=1, le=MAX_SECONDS)
    checkpoint_ttl_s: int = Field(
        3_600, description="a whole number of seconds, from 1 to 315360000", ge=1, le=MAX_SECONDS
    )
    #: The tensors of one job, 0 if none may be kept; all of GPT-2 124M at 1,024 tokens are 330 MB, 206 of them logits.
    checkpoint_max_bytes: int = Field(
        512 * 2**20, description="a whole number of bytes, from 0 to 2**50", ge=0, le=MAX_BYTES
    )
    #: A message whose worker has not renewed its lease for this long goes to another worker.
    lease_s: int = Field(120, description="a whole number of seconds, from 3 to 315360000", ge=3, le=MAX_SECONDS)
    #: From 2: the first attempt is in company, and a job is failed only for one that it had alone.
    max_attempts: int = Field(3, description="a whole number from 2 to 100", ge=2, le=100)
    soft_shutdown_s: float = Field(20.0, description="a number of seconds, from 0 to 315360000", ge=0, le=MAX_SECONDS)
    #: An engine that is at one step for longer is stalled: its jobs go to other workers, it takes no more messages, and
    #: `headrace status` fails.
    stall_s: float = Field(60.0, description="a number of seconds, from 1 to 315360000", ge=1, le=MAX_SECONDS)
    #: Of `headrace serve`: who has one of them may use it. None: only this machine may.
    api_keys: SecretStr | None = Field(
        None,
        description=f"a secret of at least {SHORTEST_API_KEY} characters without spaces, or several of them separated "
        "by commas",
    )
    #: Of `headrace serve`: where uploaded files and batches lie. None: `data_dir()`.
    files_dir: str | None = Field(None, description="a directory")
    #: Of the worker's probes and metrics over HTTP; 0 is none.
    metrics_port: int = Field(0, description="a port from 1 to 65535, or 0 for none", ge=0, le=65535)
    metrics_host: str = Field(
        "127.0.0.1", description="an address or a name of this machine, or 0.0.0.0 or :: for all", min_length=1
    )
    #: Programs of ours set OpenTelemetry up, by the OTEL_* variables; where somebody else has, spans go there anyhow.
    otel: bool = Field(False, description="1 or 0")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="'debug', 'info', 'warning' or 'error'"
    )
    log_format: Literal["auto", "console", "json"] = Field("auto", description="'auto', 'console' or 'json'")

    @field_validator("redis_url")
    @classmethod
    def _url_scheme(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if is_sentinel(value):
            parse_sentinel(value)
            return value
        parts = urlsplit(value)  # parts.port raises ValueError where it is no number
        if parts.scheme not in URL_SCHEMES or (parts.port is None and parts.netloc.endswith(":")):
            raise ValueError("scheme or port")
        if parts.scheme == "unix" and ("@" in parts.netloc or "password=" in parts.query or not parts.path):
            raise ValueError("a unix socket goes by its path; kombu knows no password there")
        return value

    @field_validator("signing_key", "api_keys")
    @classmethod
    def _long_keys(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        shortest = SHORTEST_SIGNING_KEY if info.field_name == "signing_key" else SHORTEST_API_KEY
        if not all(is_key(key, shortest) for key in _split_keys(value)):
            raise ValueError("length")
        return value

    @field_validator("model")
    @classmethod
    def _different_names(cls, value: str) -> str:
        parse_models(value)
        return value

    @field_validator("served_name")
    @classmethod
    def _plain_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and (value != slug(value) or len(parse_models(info.data.get("model", "demo"))) > 1):
            raise ValueError("name")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments first, then the environment; no file is read that was not named."""
        return (init_settings, env_settings)

    def __repr_args__(self) -> Any:
        """The URL may hold a password: show it without."""
        for name, value in super().__repr_args__():
            yield name, redact_url(value) if name == "redis_url" and value else value

    @property
    def signing_keys(self) -> tuple[bytes, ...]:
        """The keys of `signing_key`; the first is the one to sign with. Empty if nothing is signed."""
        return tuple(key.encode() for key in _split_keys(self.signing_key))

    @property
    def api_key_list(self) -> list[str]:
        """The keys of `api_keys`."""
        return _split_keys(self.api_keys)

    @property
    def models(self) -> dict[str, str]:
        """What is served: the model, as `model.load_model` takes it, by the name of it that results and queues have."""
        found = parse_models(self.model)
        return found if self.served_name is None else {self.served_name: next(iter(found.values()))}

    @property
    def model_name(self) -> str:
        """The name of the first model, to which jobs go that name none: its queue is `headrace.<model_name>`."""
        return next(iter(self.models))

    def only(self, name: str) -> Settings:
        """The same with only this one of the models."""
        if len(self.models) == 1:
            return self
        return self.model_copy(update={"model": f"{name}={self.models[name]}", "served_name": None})


def is_key(key: str, shortest: int) -> bool:
    """Whether a secret is long enough and without spaces."""
    return len(key) >= shortest and len(key.split()) == 1


def _split_keys(value: SecretStr | None) -> list[str]:
    return [] if value is None else [key.strip() for key in value.get_secret_value().split(",")]


def slug(model: str) -> str:
    """A model's name for queues and results: a directory goes by its last part, `org/name` becomes `org-name`."""
    path = os.path.expanduser(model)
    local = os.path.isabs(path) or model.startswith((".", "~")) or os.path.isdir(path)
    return _as_name(os.path.basename(os.path.realpath(path.replace("\0", ""))) if local else model)


def _as_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:MAX_NAME] or "model"


def parse_models(value: str) -> dict[str, str]:
    """The models of a list such as `demo,gpt2,chat=/models/v2` by their names, in its order.

    Raises:
        ValueError: one is empty, or two have the same name.
    """
    models: dict[str, str] = {}
    for item in map(str.strip, value.split(",")):
        name, named, model = map(str.strip, item.partition("="))
        if not named or name != _as_name(name):  # a directory may have an = in its path
            name, model = slug(item), item
        if not model or model.startswith("=") or name in models:
            raise ValueError("model")
        models[name] = model
    return models


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment, with `overrides` on top.

    Raises:
        SettingsError: a `HEADRACE_` variable that does not exist, or a value out of range.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{_shorter(name)} is no setting of headrace; the nearest is {near}")
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    field = Settings.model_fields.get(name)
    if field is None:
        return f"{_shorter(name)} is no setting of headrace"
    shown = {"redis_url": redact_url(str(first["input"])), "signing_key": "***", "api_keys": "***"}
    value = shown.get(name, first["input"])
    return f"{PREFIX}{name.upper()} is {_shorter(repr(value))}; it must be {field.description}"


def _shorter(text: str) -> str:
    """The beginning of a text, in characters that can be written anywhere."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 120 else text[:117] + "..."


def redact_url(url: str) -> str:
    """The URL with its password replaced by `***`, fit for logs and error messages."""
    # As far as the last @: a password may hold a / or an @ that ought to have been escaped.
    url = re.sub(r"^([\w+.-]+://[^:@/?#]*:|(?![\w+.-]+://)(?://)?[^:@/?#]*:).*@", r"\1***@", url, flags=re.DOTALL)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)

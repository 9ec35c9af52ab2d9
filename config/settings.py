"""Settings from `HEADRACE_*` environment variables. `config/dev.env` lists all of them with comments."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from headrace.config.adapter_names import parse_adapters
from headrace.config.model_names import is_served_name, parse_models
from headrace.config.sentinel import is_sentinel, parse_sentinel

PREFIX = "HEADRACE_"
DEFAULT_REDIS_URL = "redis://localhost:6379/0"
URL_SCHEMES = ("redis", "rediss", "unix")
#: The longest model name in queues and results, in characters.
#: Upper limits of numeric settings. Redis, torch and the clock reject larger numbers, but only while a job runs.
MAX_BYTES, MAX_SECONDS = 2**50, 10 * 365 * 86_400
#: In characters: as long as the HMAC digest, so that guessing the key is no easier than guessing the digest.
MIN_SIGNING_KEY_LENGTH = 32
#: In characters. Shorter than a signing key, because each guess costs an HTTP request.
MIN_API_KEY_LENGTH = 16


class SettingsError(ValueError):
    """Raised when a setting is unknown or has an invalid value; the message names it and lists the valid values."""


class Settings(BaseSettings):
    """All settings. Immutable; change a copy with `model_copy(update=...)`.

    The description of a field lists its valid values and completes the sentence "it must be ...". `settings_help.py`
    has the documentation for users, with the names of the same settings in vLLM.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True
    )

    #: The model to serve, or several separated by commas; see the property `models`.
    model: str = Field(
        "demo",
        description="'demo', the name of a GPT-2 size, a Hugging Face id, or a directory; or several of these under "
        "different names, separated by commas, where NAME=MODEL sets a name",
    )
    #: The name of the model in queues and results; derived from `model` by default.
    served_name: str | None = Field(
        None,
        description="a name of letters, digits, '.', '_' and '-', and can only be set for one model; with several, "
        "write NAME=MODEL in HEADRACE_MODEL",
    )
    #: LoRA adapters that are loaded with their models; see `adapters_of`.
    adapters: str | None = Field(
        None,
        description="NAME=DIRECTORY, or several of these separated by commas; MODEL/NAME=DIRECTORY if several models "
        "are served; names of letters, digits, '.', '_' and '-', each different, also from those of the models",
    )
    #: A directory of adapters, each of which is loaded when a job first names it; see `adapters_dir_of`.
    adapters_dir: str | None = Field(None, description="a directory")
    #: Memory for adapters, in bytes; several models get equal parts.
    adapter_bytes: int = Field(2**30, description="a whole number of bytes from 1 to 2**50", ge=1, le=MAX_BYTES)
    #: The Redis server. None: the embedded server if it is running, else DEFAULT_REDIS_URL.
    redis_url: str | None = Field(
        None,
        description="a URL such as redis://host:6379/0, rediss://..., unix:///path or "
        "sentinel://host:26379,host:26379/0?master=name",
    )
    #: What clients and workers do with a Redis that loses jobs: one that evicts keys, a cluster, an old version.
    redis_unsuitable: Literal["refuse", "allow"] = Field("refuse", description="'refuse' or 'allow'")
    #: Clients sign messages with the first key, workers accept every key. None: messages are not signed.
    signing_key: SecretStr | None = Field(
        None,
        description=f"a secret of at least {MIN_SIGNING_KEY_LENGTH} characters without spaces, or several of them "
        "separated by commas; generate one with `openssl rand -hex 32`",
    )
    #: The device that computes; 'auto' is the first GPU, or the CPU if there is none.
    device: str = Field("auto", description="'auto', 'cpu', 'cuda' or 'cuda:N'", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    #: The number format of the weights and of the matrix products.
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="'auto', 'float32', 'bfloat16', 'float16' or 'int8'"
    )
    #: Whether the sampling parameters in a model's generation_config.json are the defaults of requests.
    generation_config: Literal["none", "auto"] = Field("none", description="'none' or 'auto'")
    #: Load a model even if every user of the machine can write its directory or files.
    allow_shared_model: bool = Field(False, description="1 or 0")
    #: The largest number of sequences in a batch (continuous batching).
    slots: int = Field(64, description="a whole number from 1 to 4096", ge=1, le=4096)
    #: The longest prompt and generated text together, in tokens. None: the model's maximum.
    max_context: int | None = Field(None, description="a whole number from 2 to 2**50", ge=2, le=MAX_BYTES)
    #: Memory for the key/value caches, in bytes; several models get equal parts. None: enough for every slot at full
    #: length, but at most a quarter of the memory that is free when a model is loaded.
    kv_cache_bytes: int | None = Field(None, description="a whole number of bytes from 1 to 2**50", ge=1, le=MAX_BYTES)
    #: Whether the names of special tokens in a text prompt mean these tokens, in requests that do not say it. None:
    #: what the model's tokenizer says.
    parse_special_tokens: bool | None = Field(None, description="1 or 0")
    #: CPU threads. None: torch's default, one for each physical core.
    threads: int | None = Field(None, description="a whole number from 1 to 4096", ge=1, le=4096)
    #: The instruction set of the compiled kernels; 'auto' is the best one of the CPU.
    cpu_isa: Literal["auto", "amx", "avx512_vnni", "avx512", "avx2", "neon", "none"] = Field(
        "auto", description="'auto', 'amx', 'avx512_vnni', 'avx512', 'avx2', 'neon' or 'none'"
    )
    #: The largest number of tokens in one forward pass. Limits how long a sequence that is generating waits for the
    #: prefill of another.
    step_tokens: int = Field(512, description="a whole number from 16 to 8192", ge=16, le=8192)
    #: Chunked prefill: a prompt is computed in chunks of this many tokens. A different value may change the last bits
    #: of a result.
    prefill_chunk: int = Field(128, description="a whole number from 16 to 1024", ge=16, le=1024)
    #: Whether the beginnings of prompts stay in the cache after their jobs. Results do not depend on it.
    prefix_cache: bool = Field(True, description="1 or 0")
    #: N-gram speculative decoding: tokens proposed for each sequence while few sequences are running; 0 turns it off.
    #: Results do not depend on it.
    draft_tokens: int = Field(7, description="a whole number from 0 to 15", ge=0, le=15)
    #: A small model with the same vocabulary that proposes tokens where n-grams do not. None: only n-grams propose.
    #: Results do not depend on it.
    draft_model: str | None = Field(None, description="the name of a GPT-2 size, a Hugging Face id, or a directory")
    #: Unload a model that had no job for this long, and load it again for the next job; the first model always stays
    #: loaded. 0: never unload.
    idle_unload_s: float = Field(0.0, description="a number of seconds from 0 to 315360000", ge=0, le=MAX_SECONDS)
    #: The largest number of jobs that wait in a queue; further jobs are refused.
    max_queue: int = Field(1_000_000, description="a whole number from 1 to 2**50", ge=1, le=MAX_BYTES)
    #: Clients refuse a request whose result can become larger. What a program needs to read a result is about ten
    #: times its size.
    max_result_bytes: int = Field(
        8 * 2**20, description="a whole number of bytes from 65536 to 2**29", ge=65_536, le=2**29
    )
    #: Seconds for which Redis keeps a result.
    result_ttl_s: int = Field(
        86_400, description="a whole number of seconds from 60 to 315360000", ge=60, le=MAX_SECONDS
    )
    #: Seconds for which Redis keeps the events of a streaming job after the last one. The result holds the same text.
    events_ttl_s: int = Field(3_600, description="a whole number of seconds from 1 to 315360000", ge=1, le=MAX_SECONDS)
    #: Seconds for which Redis keeps checkpoint tensors.
    checkpoint_ttl_s: int = Field(
        3_600, description="a whole number of seconds from 1 to 315360000", ge=1, le=MAX_SECONDS
    )
    #: The largest size of one job's checkpoint tensors; 0 turns checkpoints off. All tensors of GPT-2 124M at 1,024
    #: tokens take 330 MB, of which the logits are 206 MB.
    checkpoint_max_bytes: int = Field(
        512 * 2**20, description="a whole number of bytes from 0 to 2**50", ge=0, le=MAX_BYTES
    )
    #: Seconds after which the jobs of a worker that stopped renewing its lease are delivered to another worker.
    lease_s: int = Field(120, description="a whole number of seconds from 3 to 315360000", ge=3, le=MAX_SECONDS)
    #: How often a job is started again after its worker process died; then it fails. At least 2, because the first
    #: attempt shares a batch with other jobs and does not prove which of them killed the process.
    max_attempts: int = Field(3, description="a whole number from 2 to 100", ge=2, le=100)
    #: Seconds that running jobs have to finish after SIGQUIT (worker) or SIGTERM (`headrace serve`).
    soft_shutdown_s: float = Field(20.0, description="a number of seconds from 0 to 315360000", ge=0, le=MAX_SECONDS)
    #: An engine that spends longer in one step counts as stalled: its jobs are delivered to other workers, it accepts
    #: no more, and `headrace status` exits with 1.
    stall_s: float = Field(60.0, description="a number of seconds from 1 to 315360000", ge=1, le=MAX_SECONDS)
    #: `headrace serve`: every request must send one of these keys. None: only this machine may.
    api_keys: SecretStr | None = Field(
        None,
        description=f"a secret of at least {MIN_API_KEY_LENGTH} characters without spaces, or several of them "
        "separated by commas",
    )
    #: `headrace serve`: the directory for uploaded files and batches. None: `data_dir()`.
    files_dir: str | None = Field(None, description="a directory")
    #: The port of the worker's probes and Prometheus metrics; 0 turns them off.
    metrics_port: int = Field(0, description="a port from 1 to 65535, or 0 for none", ge=0, le=65535)
    #: The address on which the worker's probes and metrics listen.
    metrics_host: str = Field(
        "127.0.0.1", description="an address or a name of this machine, or 0.0.0.0 or :: for all", min_length=1
    )
    #: Export OpenTelemetry spans, configured by the OTEL_* variables. In a program that has set up OpenTelemetry
    #: itself, spans are exported regardless of this setting.
    otel: bool = Field(False, description="1 or 0")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="'debug', 'info', 'warning' or 'error'"
    )
    #: 'console' for people, 'json' for programs; 'auto' is 'console' on a terminal.
    log_format: Literal["auto", "console", "json"] = Field("auto", description="'auto', 'console' or 'json'")

    @field_validator("*", mode="before")
    @classmethod
    def _check_unicode(cls, value: Any) -> Any:
        """Refuse bytes that are not UTF-8: they could neither be printed nor be stored."""
        if isinstance(value, str):
            value.encode()  # raises a ValueError
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if is_sentinel(value):
            parse_sentinel(value)
            return value
        parts = urlsplit(value)  # parts.port raises ValueError if it is not a number
        if parts.scheme not in URL_SCHEMES or (parts.port is None and parts.netloc.endswith(":")):
            raise ValueError("scheme or port")
        if parts.scheme == "unix" and ("@" in parts.netloc or "password=" in parts.query or not parts.path):
            raise ValueError("kombu supports neither a host nor a password in the URL of a unix socket")
        return value

    @field_validator("signing_key", "api_keys")
    @classmethod
    def _check_keys(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        min_length = MIN_SIGNING_KEY_LENGTH if info.field_name == "signing_key" else MIN_API_KEY_LENGTH
        if not all(is_valid_key(key, min_length) for key in _split_keys(value)):
            raise ValueError("length")
        return value

    @field_validator("model")
    @classmethod
    def _check_models(cls, value: str) -> str:
        parse_models(value)
        return value

    @field_validator("served_name")
    @classmethod
    def _check_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and (not is_served_name(value) or len(parse_models(info.data.get("model", "demo"))) > 1):
            raise ValueError("name")
        return value

    @field_validator("adapters")
    @classmethod
    def _check_adapters(cls, value: str | None, info: ValidationInfo) -> str | None:
        served_name, models = info.data.get("served_name"), parse_models(info.data.get("model", "demo"))
        parse_adapters(value, [served_name] if served_name else models)
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
        """Arguments take precedence over the environment; .env and secret files are not read."""
        return (init_settings, env_settings)

    def __repr_args__(self) -> Any:
        """Hide the password of the Redis URL."""
        for name, value in super().__repr_args__():
            yield name, redact_url(value) if name == "redis_url" and value else value

    @property
    def signing_keys(self) -> tuple[bytes, ...]:
        """The keys of `signing_key`; the first one signs. Empty if messages are not signed."""
        return tuple(key.encode() for key in _split_keys(self.signing_key))

    @property
    def api_key_list(self) -> list[str]:
        """The keys of `api_keys`."""
        return _split_keys(self.api_keys)

    @property
    def models(self) -> dict[str, str]:
        """The served models: name in queues and results -> model, as `headrace.model.load_model` takes it."""
        found = parse_models(self.model)
        return found if self.served_name is None else {self.served_name: next(iter(found.values()))}

    @property
    def model_name(self) -> str:
        """The name of the first model, the default for jobs that name none. Its queue is `headrace.<model_name>`."""
        return next(iter(self.models))

    def adapters_of(self, model: str) -> dict[str, Path]:
        """The adapters of a served model in `adapters`: name -> directory."""
        return {name: Path(folder) for name, folder in parse_adapters(self.adapters, self.models)[model].items()}

    def adapters_dir_of(self, model: str) -> Path | None:
        """The directory of further adapters of a model; with several models one of its name in `adapters_dir`."""
        if self.adapters_dir is None:
            return None
        return Path(self.adapters_dir) / (model if len(self.models) > 1 else "")

    def only(self, name: str) -> Settings:
        """A copy of the settings that serves only the model `name`, with its adapters."""
        if len(self.models) == 1:
            return self
        folder, adapters = self.adapters_dir_of(name), self.adapters_of(name)
        return self.model_copy(
            update={
                "model": f"{name}={self.models[name]}",
                "served_name": None,
                "adapters": ",".join(f"{adapter}={place}" for adapter, place in adapters.items()) or None,
                "adapters_dir": None if folder is None else str(folder),
            }
        )


def is_valid_key(key: str, min_length: int) -> bool:
    """Whether a secret has at least `min_length` characters and no spaces."""
    return len(key) >= min_length and len(key.split()) == 1


def _split_keys(value: SecretStr | None) -> list[str]:
    return [] if value is None else [key.strip() for key in value.get_secret_value().split(",")]


def load_settings(**overrides: Any) -> Settings:
    """Read the settings from the environment; `overrides` take precedence.

    Raises:
        SettingsError: a `HEADRACE_` variable is not a setting, or a value is invalid.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{_truncate(name)} is not a setting of headrace; did you mean {near}?")
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    name = str(first["loc"][0])
    field = Settings.model_fields.get(name)
    if field is None:
        return f"{_truncate(name)} is not a setting of headrace"
    shown = {"redis_url": redact_url(str(first["input"])), "signing_key": "***", "api_keys": "***"}
    value = shown.get(name, first["input"])
    unreadable = any("\ud800" <= character <= "\udfff" for character in str(first["input"]))
    expected = f"text in UTF-8: {field.description}" if unreadable else field.description
    return f"{PREFIX}{name.upper()} is {_truncate(repr(value))}; it must be {expected}"


def _truncate(text: str) -> str:
    """Truncate a text and escape surrogates, so that every terminal can print it."""
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 120 else text[:117] + "..."


def redact_url(url: str) -> str:
    """The URL with its password replaced by `***`, for logs and error messages."""
    # Up to the last @: a password may contain an unescaped / or @.
    url = re.sub(r"^([\w+.-]+://[^:@/?#]*:|(?![\w+.-]+://)(?://)?[^:@/?#]*:).*@", r"\1***@", url, flags=re.DOTALL)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)

"""What starts the worker or the Redis that is missing: every error about either takes its command from here.

The command is complete for the caller's situation: it names the model that is missing, and the Redis that the caller
uses. It has no secret: the URL of a Redis with a password is not repeated.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from urllib.parse import urlsplit

from headrace.client.wire.embedded_redis import is_embedded
from headrace.config import Settings, SettingsError, load_settings
from headrace.config.model_names import slug
from headrace.config.settings import DEFAULT_REDIS_URL, PREFIX, redact_url

#: The model of `headrace up` without any setting.
DEMO = "demo"
MODEL, REDIS_URL = f"{PREFIX}MODEL", f"{PREFIX}REDIS_URL"
_LOCAL = ("localhost", "127.0.0.1", "::1", None)

#: The settings and the default model of the last client of this process for each URL. An error of Redis knows no more
#: than its URL.
_clients: dict[str, tuple[Settings, str]] = {}


def note_client(url: str, settings: Settings, model_name: str) -> None:
    """Remember who uses the Redis at `url`.

    Args:
        url: as `client.wire.redis.resolve_url` returns it.
        settings: of the client.
        model_name: the model of its jobs that name none.
    """
    _clients[url] = settings, model_name


def start_worker(url: str, models: Iterable[str] = (), settings: Settings | None = None) -> str:
    """The command that starts a worker for models, in backquotes.

    Args:
        url: of the Redis that the worker is to serve, as `client.wire.redis.resolve_url` returns it.
        models: the names of the models; by default that of the client.
        settings: which say what the models are; by default those of the client, else the environment's.
    """
    known, default = _settings_for(url)
    return _line("up", url, _model_option(list(models) or [default], settings or known))


def start_worker_here(url: str, models: Iterable[str]) -> str:
    """Like `start_worker`, for those who may see neither a path nor an address of the server: users of the HTTP API."""
    settings = _settings_for(url)[0]
    shown = "" if is_embedded(url) else f" with the same {REDIS_URL}"
    return f"`headrace up{_model_option(models, settings, show_paths=False)}`{shown}"


def use_worker(words: str, url: str, model: str) -> str:
    """A command for a worker that runs, in backquotes.

    Args:
        words: the command and its arguments.
        url: of the worker's Redis, as for `start_worker`.
        model: one of its models.
    """
    return _line(words, url, "" if model == DEMO and _serves_demo() else f" --model {model}")


def start_redis(url: str) -> str:
    """What to do if nothing answers at `url`, as a sentence without its end."""
    if is_embedded(url):
        return f"start it and a worker with {start_worker(url)}, or set {REDIS_URL} to use a Redis that runs"
    settings, model = _settings_for(url)
    own = f"without {REDIS_URL} `headrace up{_model_option([model], settings)}` runs a Redis of its own"
    parts = urlsplit(url)
    if parts.scheme == "redis" and parts.hostname in _LOCAL:
        port = parts.port or urlsplit(DEFAULT_REDIS_URL).port
        return f"start it with `redis-server --port {port}`; {own}"
    return f"start it, or correct {REDIS_URL}; {own}"


def start_redis_here(url: str) -> str:
    """Like `start_redis`, for users of the HTTP API."""
    if is_embedded(url):
        return f"run {start_worker_here(url, [_settings_for(url)[1]])}"
    return f"start the Redis that {REDIS_URL} names"


def _settings_for(url: str) -> tuple[Settings, str]:
    """The settings and the default model of who uses this Redis."""
    if url in _clients:
        return _clients[url]
    try:
        settings = load_settings()
    except SettingsError:  # the error that is written now must not be hidden by another
        settings = Settings.model_construct()
    return settings, settings.model_name


def _line(words: str, url: str, options: str) -> str:
    line = f"headrace {words}{options}"
    if is_embedded(url):
        return f"`{line}`"
    if redact_url(url) != url:
        return f"`{line}` with the same {REDIS_URL}"
    return f"`{REDIS_URL}={shlex.quote(url)} {line}`"


def _model_option(models: Iterable[str], settings: Settings, *, show_paths: bool = True) -> str:
    """The option `--model` for these models; nothing if they are what `headrace up` serves in every shell."""
    names = list(models)
    if names == [DEMO] and settings.models.get(DEMO, DEMO) == DEMO and _serves_demo():
        return ""
    return " --model " + shlex.quote(",".join(_as_given(name, settings, show_paths) for name in names))


def _serves_demo() -> bool:
    """Whether commands without `--model` use the bundled model, also in a shell that has this one's environment."""
    return os.environ.get(MODEL, DEMO) in ("", DEMO)


def _as_given(name: str, settings: Settings, show_paths: bool) -> str:
    """A model as HEADRACE_MODEL takes it, so that a worker serves it under this name."""
    source = settings.models.get(name, name)
    if not show_paths and source.startswith(("/", ".", "~")):
        return f"{name}=DIRECTORY"
    return source if slug(source) == name else f"{name}={source}"

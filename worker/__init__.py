"""The worker: Celery outside, the engine inside. `celery -A worker worker` finds `app` here."""

from typing import Any

from headrace.short_names import refuse_submodules as _refuse_submodules

_refuse_submodules(__name__)


def __getattr__(name: str) -> Any:
    """The Celery app, made when Celery asks for it: making it reads the settings."""
    if name == "app":
        from headrace.worker.celery import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

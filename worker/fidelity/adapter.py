"""The adapter that `headrace validate --adapter` measures."""

from __future__ import annotations

from pathlib import Path

from headrace.config import Settings
from headrace.model.adapters.lora import load_adapter
from headrace.model.config import ModelConfig
from headrace.model.trusted_files import ModelError

#: Its name in the worker.
ADAPTER = "validated"


def with_adapter(settings: Settings, adapter: Path) -> Settings:
    """The settings of a worker that serves the first model and this adapter."""
    only = settings.only(settings.model_name)
    return only.model_copy(update={"adapters": f"{ADAPTER}={adapter.absolute()}", "adapters_dir": None})


def check_adapter(adapter: Path, config: ModelConfig, settings: Settings) -> None:
    """Raise ModelError if the worker could not load an adapter, or could not be told where it is."""
    if "," in str(adapter.absolute()):
        raise ModelError(f"adapter: got {str(adapter)!r}; expected a directory without a comma in its path")
    load_adapter(adapter, config, allow_shared=settings.allow_shared_model)

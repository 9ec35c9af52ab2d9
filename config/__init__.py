"""Settings and logging, shared by every process of headrace."""

from headrace.config.settings import Settings, SettingsError, load_settings
from headrace.short_names import refuse_submodules as _refuse_submodules

__all__ = ["Settings", "SettingsError", "load_settings"]

_refuse_submodules(__name__)

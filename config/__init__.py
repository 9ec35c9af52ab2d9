"""Settings and logging, shared by every process of headrace."""

from headrace.config.settings import Settings, SettingsError, load_settings

__all__ = ["Settings", "SettingsError", "load_settings"]

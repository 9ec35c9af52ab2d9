"""The version of the project, also where no distribution of it is installed."""

from __future__ import annotations

import functools
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "headrace"
UNKNOWN = "unknown"


@functools.cache
def project_version() -> str:
    """The version of the installed distribution, else that in the pyproject.toml of the clone, else 'unknown'."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return version_of_clone(Path(__file__).resolve().parents[1])


def version_of_clone(folder: Path) -> str:
    """The version that the pyproject.toml in a folder states for this project; 'unknown' if it states none."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text()).get("project", {})
    except (OSError, ValueError):
        return UNKNOWN
    return str(project.get("version", UNKNOWN)) if project.get("name") == DISTRIBUTION else UNKNOWN

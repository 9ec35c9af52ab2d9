"""In a clone of the project `import client` and `celery -A worker worker` work too: the folders are there.

Each module still exists once, as `headrace.client.jobs` for example. Importing a submodule under its short name would
load a second copy of it, whose classes `except` does not catch, so that is an error with the right name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType


class _RefuseSubmodules(MetaPathFinder):
    """Finds nothing, and raises for submodules of one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:  # noqa: ARG002
        """Called by `import`, before the file system is searched."""
        if not fullname.startswith(f"{self.package}."):
            return
        found = find_spec(f"headrace.{fullname}") is not None
        instead = f"import it as headrace.{fullname}" if found else f"its names are in headrace.{self.package}"
        raise ModuleNotFoundError(f"no module {fullname}: {instead}", name=fullname)


def refuse_submodules(name: str) -> None:
    """Called by a package of headrace with its `__name__`: under its short name it has no submodules."""
    if not name.startswith("headrace."):
        sys.meta_path.insert(0, _RefuseSubmodules(name))

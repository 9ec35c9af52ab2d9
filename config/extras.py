"""How to install an optional part of the project. Every error that misses one takes its advice from here."""

from __future__ import annotations

from typing import Literal

Extra = Literal["embedded", "references", "http", "plot", "metrics", "otel"]


def how_to_install(extra: Extra) -> str:
    """The command that installs an extra, and where to run it.

    The project is installed from its clone: the command must not name a package of a registry, whose name may belong to
    somebody else.
    """
    return f"run `pip install '.[{extra}]' -c constraints.txt` in a clone of the project"

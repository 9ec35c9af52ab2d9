"""What `import headrace.client` offers: public names and submodules, and nothing else."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import version
from types import ModuleType

import pytest

import headrace
from headrace import client


def test_the_version_is_that_of_the_distribution() -> None:
    assert client.__version__ == headrace.__version__ == version("headrace")


@pytest.mark.parametrize("name", ["headrace.client", "client"])
def test_all_names_without_an_underscore_are_public_or_submodules(name: str) -> None:
    """In a separate process, because importing a submodule adds it to the package."""
    code = f"import {name} as module; print(*(n for n in vars(module) if not n.startswith('_')))"
    listed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    for other in set(listed) - set(client.__all__):
        assert isinstance(getattr(client, other), ModuleType), f"{other} is neither in __all__ nor a submodule"
    assert set(client.__all__) <= {*listed, "__version__"}


def test_public_names_and_their_methods_are_documented() -> None:
    for name in client.__all__:
        member = getattr(client, name)
        if inspect.isclass(member) or inspect.isfunction(member):
            assert inspect.getdoc(member), name
    for owner in (client.Client, client.AsyncClient, client.Job, client.AsyncJob):
        for name, method in inspect.getmembers(owner, inspect.isfunction):
            assert name.startswith("_") or inspect.getdoc(method), f"{owner.__name__}.{name}"

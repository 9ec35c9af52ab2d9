"""The directions in which the packages may import each other, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "config": {"config"},
    "client": {"client", "config"},
    "model": {"model"},
    "worker": {"worker", "client", "config", "model"},
}
#: The modules of the worker that may know tensors.
TENSORS = {"worker/engine/model_runner.py", "worker/engine/build.py", "worker/fidelity/references/transformers.py"}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_only_downwards(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        wrong = imports(path) & ALLOWED.keys() - ALLOWED[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_torch_is_kept_where_tensors_are() -> None:
    for package in ("config", "client", "worker"):
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            assert "torch" not in imports(path) or name in TENSORS, f"{name} imports torch"


def test_torch_is_pinned_in_one_place() -> None:
    deployment = [path for path in (ROOT / "docker").rglob("*") if path.is_file()]
    pins = [
        f"{path.name}: {line}"
        for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "Makefile", *deployment)
        for line in path.read_text().splitlines()
        if "torch==" in line or "torch>=" in line or "torch~=" in line
    ]
    assert pins == ['pyproject.toml:   "torch==2.13.0",']


#: What turns bytes into objects by running what the bytes say.
UNSAFE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "jsonpickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load"}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_no_pickle_no_yaml_and_no_eval(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not imports(path) & UNSAFE, path
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            told = {word.arg: ast.unparse(word.value) for word in call.keywords}
            harmless = told.get("allow_pickle") == "False"  # a user's own reference file of numpy's
            assert harmless or ast.unparse(call.func) not in UNSAFE_CALLS, f"{path}:{call.lineno}"

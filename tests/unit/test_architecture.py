"""The structure of the code, read from its sources: allowed imports, and retired names."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("client", "config", "model", "worker")

#: A module imports only from floors below its own, or from its own folder. The longest matching name counts.
FLOORS = {
    "worker.cli": 7,
    "worker": 6,
    "worker.fidelity": 6,
    "client.http": 6,
    "worker.jobs": 5,
    "client": 5,
    "worker.observability": 4,
    "client.batch": 4,
    "worker.engine": 3,
    "worker.queue": 3,
    "client.jobs": 3,
    "model": 2,
    "client.wire": 2,
    "worker.redis_server": 4,
    "worker.redis_binary": 3,
    "worker.append_only_file": 3,
    "worker.child_processes": 3,
    "model.kernels": 1,
    "config": 1,
}
#: The worker imports only the wire format of the client, except in these two folders, which are clients.
CLIENTS_IN_WORKER = ("worker.cli", "worker.fidelity")
#: The modules of the worker that may import torch.
TORCH = {
    f"worker.engine.{name}"
    for name in ("model_runner", "draft_model", "input_batch", "build", "fingerprint", "self_test")
}
TORCH |= {"worker.fidelity.references.transformers"}
MAX_LINES = 350


@functools.cache
def modules() -> dict[str, Path]:
    """Every product module by its name without `headrace.`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "demo" not in path.parts:
                found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Everything that a module imports, in functions and for types too; our modules without `headrace.`."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("headrace.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative imports hide where a name comes from"
            base = (node.module or "").removeprefix("headrace.")
            if base == "headrace":
                found |= {alias.name for alias in node.names}
            else:
                found |= {inner if (inner := f"{base}.{alias.name}") in modules() else base for alias in node.names}
    return frozenset(found)


def ours(module: str) -> set[str]:
    """The product modules that a module imports."""
    return {name for name in imports(module) if name in modules() and name != module}


def floor(module: str) -> tuple[int, str]:
    """The floor of a module, and the folder that has this floor."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    folder = next(name for name in names if name in FLOORS)
    return FLOORS[folder], folder


def is_package(module: str) -> bool:
    """Whether it only hands out what its modules define: `client/__init__.py` stands above the folders of client."""
    return modules()[module].name == "__init__.py"


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: {name for name in ours(module) if not is_package(name)} for module in modules()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_modules_import_only_from_floors_below() -> None:
    wrong = []
    for module in modules():
        height, folder = floor(module)
        for name in sorted(ours(module)):
            other_height, other_folder = floor(name)
            if other_folder != folder and other_height >= height:
                wrong.append(f"{module} (floor {height}) imports {name} (floor {other_height})")
    assert not wrong, "\n".join(wrong)


def test_the_worker_knows_only_the_wire_of_the_client() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if module.startswith("worker") and not module.startswith(CLIENTS_IN_WORKER)
        for name in sorted(ours(module))
        if name.startswith("client") and not name.startswith("client.wire")
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_import_only_downwards() -> None:
    allowed = {"config": {"config"}, "model": {"model"}, "client": {"client", "config"}, "worker": set(PACKAGES)}
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in sorted(ours(module))
        if name.split(".")[0] not in allowed[module.split(".")[0]]
    ]
    assert not wrong, "\n".join(wrong)


def test_torch_is_imported_only_where_tensors_are() -> None:
    wrong = [
        module
        for module in modules()
        if not module.startswith("model")
        and module not in TORCH
        and {n.split(".")[0] for n in imports(module)} & {"torch"}
    ]
    assert not wrong, f"they import torch: {wrong}"


def test_kernels_know_nothing_else_of_the_model() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if module.startswith("model.kernels")
        for name in sorted(ours(module))
        if not name.startswith("model.kernels")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_product_file_is_long() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in modules().items()}
    assert not {module: lines for module, lines in lengths.items() if lines > MAX_LINES}


#: Modules and classes that were renamed or split. A name that comes back means that a change was merged the wrong way.
RETIRED_MODULES = """
client.aio client.batch_input client.batch_output client.bulk client.checkpoints client.errors client.http.batch_state
client.http.completions client.http.connections client.http.files client.http.gateway client.http.guard
client.http.parts client.http.storage client.http.traced client.job client.keys client.records client.schema
client.signing client.status client.stream client.tracing client.transport client.watch
model.cache model.chain model.files model.floats model.graphs model.int8 model.largest model.machine_code model.native
model.passes model.tiles model.trace model.vectors
worker.access worker.assembly worker.backend worker.batch worker.broker worker.causes worker.checkpoints
worker.consumer worker.drafts worker.embedded worker.errors worker.events worker.gate worker.limits worker.memory
worker.metrics worker.models worker.monitor worker.offline worker.pair worker.picture worker.pool worker.probation
worker.probes worker.references worker.runner worker.scheduler worker.sequence worker.service worker.slots worker.store
worker.tracing worker.turns worker.validate worker.writer
""".split()  # noqa: SIM905
RETIRED_CLASSES = """
BatchIndex EventWriter Gateway Generation Guard Kind MemoryStore Models Monitor News Overview Parts Passes Probation
Reader RowReader Runner Streamed Trace Traced Turns Watch Writer
""".split()  # noqa: SIM905


def test_retired_modules_do_not_come_back() -> None:
    assert not [module for module in RETIRED_MODULES if module in modules()]


def test_retired_classes_do_not_come_back() -> None:
    wrong = [
        f"{module}.{node.name}"
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name in RETIRED_CLASSES
    ]
    assert not wrong


def test_torch_is_pinned_in_one_place() -> None:
    deployment = [path for path in (ROOT / "docker").rglob("*") if path.is_file()]
    pins = [
        f"{path.name}: {line}"
        for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "Makefile", *deployment)
        for line in path.read_text().splitlines()
        if "torch==" in line or "torch~=" in line
    ]
    assert pins == ["constraints.txt: torch==2.13.0"]


#: Functions that can execute code while they decode bytes.
UNSAFE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "jsonpickle"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load"}
#: The program of the child process that reads pickled checkpoints; no module imports it.
UNPICKLES = "model.convert.unpickle"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_pickle_no_yaml_and_no_eval(package: str) -> None:
    for module, path in modules().items():
        if module.split(".")[0] != package:
            continue
        assert not {name.split(".")[0] for name in imports(module)} & UNSAFE, module
        assert not any(name.endswith(UNPICKLES) for name in imports(module)), module
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            told = {word.arg: ast.unparse(word.value) for word in call.keywords}
            harmless = told.get("allow_pickle") == "False"  # a user's own reference file of numpy's
            if module == UNPICKLES:
                harmless |= told.get("weights_only") == "True" and ast.unparse(call.func) == "torch.load"
            assert harmless or ast.unparse(call.func) not in UNSAFE_CALLS, f"{path}:{call.lineno}"

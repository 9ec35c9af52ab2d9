"""Every failure a user can meet: a code, a class, what to do about it in docs/client.md, and a test that meets it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from headrace import client
from headrace.client import HeadraceError, JobCancelled, JobExpired, JobFailed
from headrace.client.wire.errors import JobError

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+) \|$", (ROOT / "docs" / "client.md").read_text(), re.MULTILINE)
#: The calls that give a job's failure its code, and which argument that is.
FAILING = {"JobFailed": 0, "_fail": 1}


def classes(base: type[HeadraceError] = HeadraceError) -> set[type[HeadraceError]]:
    """Those that a user can meet; the worker has one more for itself."""
    ours = [child for child in base.__subclasses__() if child.__module__ == "headrace.client.wire.errors"]
    return {found for child in ours for found in classes(child)} or {base}


def codes_in_sources() -> set[str]:
    """The codes of job failures, read from the calls that make them."""
    found = set()
    for package in ("client", "worker"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", None))
                if isinstance(node, ast.Call) and name in FAILING and len(node.args) > FAILING[name]:
                    code = node.args[FAILING[name]]
                    found |= {code.value} if isinstance(code, ast.Constant) else set()
    return found  # type: ignore[return-value]


def test_the_table_has_every_code_and_nothing_else() -> None:
    own = {kind.code for kind in classes() if kind is not JobFailed} | {client.ResultTimeout.code}
    assert codes_in_sources() >= {"internal_error", "nan_logits", "context_length_exceeded", "max_attempts"}
    assert [code for code, _, _ in ROWS] == list(dict.fromkeys(code for code, _, _ in ROWS))
    assert {code for code, _, _ in ROWS} == own | codes_in_sources()


def test_the_classes_it_names_are_exported_and_have_the_code() -> None:
    for code, names, advice in ROWS:
        assert advice
        for name in re.findall(r"`(\w+)`", names):
            kind = getattr(client, name)
            assert kind is JobFailed or kind.code == code


def test_every_code_is_met_by_a_test() -> None:
    tests = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    for code, names, _ in ROWS:
        kinds = [name for name in re.findall(r"`(\w+)`", names) if name != "JobFailed"]
        met = f'"{code}"', *(f"raises({name}" for name in kinds)
        assert any(mark in text for mark in met for text in tests), code


def test_every_job_error_takes_a_job() -> None:
    for kind in (JobFailed, JobCancelled, JobExpired):
        error: JobError = kind()
        assert error.job is None
        assert error.about("a job").job == "a job"

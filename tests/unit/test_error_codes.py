"""Every failure a user can meet has a code, a class, advice in `client.error_codes`, and a test that meets it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from headrace import client
from headrace.client import HeadraceError, JobCancelled, JobExpired, JobFailed
from headrace.client.error_codes import ERRORS, JOB_FAILURES
from headrace.client.wire.errors import JobError

ROOT = Path(__file__).parents[2]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
#: The calls that give a job's failure its code, and which argument that is.
FAILING = {"JobFailed": 0, "fail": 1}


def classes(base: type[HeadraceError] = HeadraceError) -> dict[str, type[HeadraceError]]:
    """The classes that a user can meet, by their codes; the worker has one more for itself."""
    found = {}
    for kind in base.__subclasses__():
        if kind.__module__.startswith("headrace.client."):
            own = {kind.code: kind} if "code" in vars(kind) else {}
            found |= own | classes(kind)
    return found


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


def test_every_code_has_advice_and_no_other_has() -> None:
    assert codes_in_sources() >= {"internal_error", "nan_logits", "context_length_exceeded", "max_attempts"}
    assert ERRORS.keys() == classes().keys()
    assert JOB_FAILURES.keys() == codes_in_sources()
    assert all(ERRORS.values())
    assert all(JOB_FAILURES.values())


def test_the_classes_are_exported() -> None:
    assert {kind.__name__ for kind in classes().values()} <= set(client.__all__)


@pytest.mark.parametrize("code", [*ERRORS, *JOB_FAILURES])
def test_every_code_is_met_by_a_test(code: str) -> None:
    kind = classes().get(code)
    assert f'"{code}"' in TESTS or (kind is not None and f"raises({kind.__name__}" in TESTS)


def test_every_job_error_takes_a_job() -> None:
    for kind in (JobFailed, JobCancelled, JobExpired):
        error: JobError = kind()
        assert error.job is None
        assert error.about("a job").job == "a job"

"""Fixtures that every kind of test may use."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings as hypothesis_settings

from headrace.worker.redis_server import EmbeddedRedis
from tests import instruction_sets

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

# Importing all tests makes millions of objects, and none of them is garbage.
gc.disable()

hypothesis_settings.register_profile("quick", max_examples=30, derandomize=True)
hypothesis_settings.register_profile("full", max_examples=500)
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# A developer's own settings must not reach the tests; and no test may go out to the hub.
TEST_MODELS = os.environ.pop("HEADRACE_TEST_MODELS", None)
if TEST_MODELS:
    os.environ["TEST_MODELS_DIRECTORY"] = TEST_MODELS
for _name in [name for name in os.environ if name.startswith("HEADRACE_")]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"
if SHARED := "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that wait for each other by spinning take the cores from the tests beside them. Those of several threads
    # ask for them; workers have one too (tests/integration/processes.py).
    os.environ |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the files (`pytest -n`), begin with those that wait or last most."""
    instruction_sets.note_sets(items)
    if SHARED:
        longest = {item.path for item in items if "own_server" in item.fixturenames}  # type: ignore[attr-defined]
        folders = ("integration", "chaos", "zoo")
        items.sort(key=lambda item: (item.path not in longest, item.path.parent.name not in folders))


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but without a look at what the tests and their libraries consist of."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this CPU cannot run."""
    instruction_sets.skip_if_missing(item)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which instruction sets ran, which libraries' errors are large, and whether OpenAI's weights were tested."""
    ran = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    if line := instruction_sets.summary(ran, terminalreporter.getreports("skipped")):
        terminalreporter.write_line(line)
    for report in ran:
        for name, value in getattr(report, "user_properties", []):
            if name == "library_error":
                terminalreporter.write_line(f"a library's own error is over a checkpoint's tolerance: {value}")
    skipped = [report for report in terminalreporter.getreports("skipped") if "openai_weights" in report.keywords]
    if skipped:
        terminalreporter.write_line(f"OpenAI's weights were not at hand: {len(skipped)} tests of them did not run")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real Redis server of our own, for the whole session. It fails, and never skips, where there is no server."""
    with EmbeddedRedis.ephemeral() as server:
        yield server.url


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """OpenTelemetry, as a program sets it up, for one test: what is exported."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # `set_tracer_provider` takes one for each process, and other tests are to have none.
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter

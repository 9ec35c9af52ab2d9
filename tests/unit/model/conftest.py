from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headrace.model import Decoder, load_model


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: threads that wait for each other are slow while other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """Tests may set the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo() -> Decoder:
    """The bundled model, read once. Tests must not change its weights."""
    return load_model("demo", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small GPT-2 of random weights, as transformers writes it."""
    from tests.unit.model.references import random_reference, saved  # transformers takes seconds

    return saved(random_reference(), tmp_path_factory.mktemp("original"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of a model directory that a test may change."""
    return shutil.copytree(original, tmp_path / "model")

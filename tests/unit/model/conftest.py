from __future__ import annotations

import pytest

from model import GPT2, load_model


@pytest.fixture(scope="session")
def demo() -> GPT2:
    """The bundled model, read once. Tests leave its weights alone."""
    return load_model("demo", device="cpu", dtype="float32")

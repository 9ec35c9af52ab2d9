"""What works without torch, and the error messages where a package is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.patience import PATIENCE_S


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


def test_counting_tokens_loads_no_torch() -> None:
    run(
        "import sys, headrace.model, headrace.client.batch, headrace.worker.cli; "
        "from headrace.model import load_tokenizer; "
        "assert load_tokenizer('demo').encode('Hello.') == [15496, 13]; "
        "assert 'torch' not in sys.modules; "
        "from headrace.model import Decoder; "
        "assert Decoder.__module__ == 'headrace.model.decoder' and 'torch' in sys.modules"
    )


@pytest.mark.parametrize(
    ("package", "use", "error"),
    [
        ("tiktoken", "headrace.model.load_tokenizer('demo')", "ModelError"),
        ("huggingface_hub", "headrace.model.hub.find_model('gpt2')", "ModelError"),
        ("torch", "headrace.model.load_model", "ImportError"),
        ("torch", "headrace.model.Decoder", "ImportError"),
    ],
)
def test_a_package_that_is_missing_is_named_in_one_sentence(package: str, use: str, error: str) -> None:
    """The module itself is imported all the same: a base install has none of these packages."""
    run(
        f"import sys; sys.modules[{package!r}] = None\n"
        "import headrace.model, headrace.model.hub, headrace.model.tokenizer\n"
        "from headrace.model import ModelError\n"
        "try:\n"
        f"    {use}\n"
        f"except {error} as error:\n"
        f"    assert 'the package {package} is not installed' in str(error), error\n"
        "    assert \"pip install '.[worker]'\" in str(error) and '\\n' not in str(error), error\n"
        "else:\n"
        "    raise SystemExit('nothing was raised')\n"
    )

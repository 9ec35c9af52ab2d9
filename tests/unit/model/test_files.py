"""What can be known of a model without torch."""

from __future__ import annotations

import subprocess
import sys

from tests.patience import PATIENCE_S


def test_counting_tokens_loads_no_torch() -> None:
    code = (
        "import sys, headrace.worker.cli; from headrace.model import load_tokenizer; "
        "assert load_tokenizer('demo').encode('Hello.') == [15496, 13]; "
        "assert 'torch' not in sys.modules; "
        "from headrace.model import GPT2; assert GPT2.__module__ == 'headrace.model.gpt2' and 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr

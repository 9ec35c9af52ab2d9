"""What `headrace validate` compares, before any job runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.config import Settings
from headrace.worker.fidelity.validate import Validation, ValidationError
from tests.zoo import weights


def test_a_model_without_a_tokenizer_is_compared_on_token_ids(tmp_path: Path) -> None:
    weights.gpt2(tmp_path, 96, n_layer=1)
    settings = Settings(model=str(tmp_path), dtype="float32")
    cases = Validation(settings, ["transformers"], ()).cases
    assert cases[0].tokens == [byte % 96 for byte in b"Hello."]
    assert len(cases[-1].tokens) == 63
    assert all(token < 96 for case in cases for token in case.tokens)
    with pytest.raises(ValidationError, match=r"the prompt 'Hi' is text\..*prompts must be token ids"):
        Validation(settings, ["transformers"], ["Hi"])


def test_a_gguf_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValidationError, match=r"model\.gguf: the references read directories.*headrace convert"):
        Validation(Settings(model=str(tmp_path / "model.gguf")), [], ())

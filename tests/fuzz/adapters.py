"""Fuzz targets: LoRA adapters from untrusted sources."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import strategies as st

from headrace.model.adapters.lora import Adapter, load_adapter
from headrace.model.config import ModelConfig
from headrace.model.trusted_files import ModelError
from tests.fuzz.files import CONFIG, ENTRIES, HUGE, folder, safetensors
from tests.fuzz.harness import Target, check_message
from tests.fuzz.values import ANY_TEXT, JSON, NUMBERS, objects

BASE = ModelConfig(**CONFIG)
MODULE = "base_model.model.transformer.h.0.attn.c_attn"
SHAPES = {f"{MODULE}.lora_A.weight": (2, 4), f"{MODULE}.lora_B.weight": (12, 2)}
HEADER: dict[str, Any] = {}
SIZE = 0
for _name, _shape in SHAPES.items():
    HEADER[_name] = {
        "dtype": "F32",
        "shape": list(_shape),
        "data_offsets": [SIZE, SIZE := SIZE + 4 * _shape[0] * _shape[1]],
    }

NAMES = st.sampled_from([*SHAPES, f"{MODULE}.bias", f"{MODULE}.lora_C.weight", "base_model.model.", "h.0."]) | ANY_TEXT
HEADERS = st.one_of(
    st.just(HEADER),
    st.dictionaries(NAMES, ENTRIES | JSON, max_size=2).map(lambda invalid: {**HEADER, **invalid}),
    JSON,
)
WEIGHTS = st.builds(
    lambda data, cut: data[: len(data) - cut],
    st.builds(
        safetensors,
        HEADERS,
        st.sampled_from([np.ones(SIZE // 4, np.float32).tobytes(), b"\xff" * SIZE, bytes(SIZE + 4), b""]),
        st.sampled_from([None, None, None, 0, 10, 10**9, 2**64 - 1]),
    ),
    st.sampled_from([0, 0, 0, 1, 7, 100]),
)
PATTERNS = st.sampled_from(
    ["c_attn", ".*", "(?:\\w|\\w\\w|\\.|.)+[0-9]", "(", "(?P<a>x)(?P<a>y)", "\\1", "[", "a{99999}", "(?i)"]
)
NAMED = st.lists(PATTERNS | ANY_TEXT, max_size=3) | PATTERNS | ANY_TEXT | JSON
GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"]}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "peft_type": st.just("LORA") | JSON,
    "r": st.just(2) | HUGE | NUMBERS,
    "lora_alpha": st.just(4) | NUMBERS,
    "target_modules": st.just(["c_attn"]) | NAMED,
    "exclude_modules": NAMED,
    "layers_to_transform": st.just([0]) | HUGE | JSON,
    "layers_pattern": NAMED,
    "rank_pattern": st.dictionaries(PATTERNS | ANY_TEXT, st.just(2) | NUMBERS, max_size=2) | JSON,
    "alpha_pattern": st.dictionaries(PATTERNS | ANY_TEXT, NUMBERS, max_size=2) | JSON,
    "use_rslora": st.booleans() | JSON,
    "bias": st.sampled_from(["none", "all", "lora_only"]) | JSON,
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa"]) | JSON,
    "modules_to_save": JSON,
}
CONFIGS = st.one_of(
    st.just(GOOD).map(json.dumps).map(str.encode),
    objects(FIELDS, needed=("peft_type", "r", "target_modules")).map(json.dumps).map(str.encode),
    JSON.map(json.dumps).map(str.encode),
    st.sampled_from([b"[" * 100_000, b"\xff\xfe{", b"{}" + b" " * 2**21, b"9" * 5_000]),
)


def check_adapter(case: tuple[bytes, bytes]) -> None:
    """An adapter is loaded, or refused with a ModelError that names its directory."""
    config, weights = case
    with folder({"adapter_config.json": config, "adapter_model.safetensors": weights}) as path:
        try:
            assert isinstance(load_adapter(path, BASE), Adapter)
        except ModelError as error:
            check_message(str(error), str(path))


TARGETS = [Target("adapter", st.tuples(CONFIGS, WEIGHTS), check_adapter, full_cases=5_000)]

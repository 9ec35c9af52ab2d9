"""Fuzz targets: model directories, vocabularies and tensor files from untrusted sources."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from headrace.client.wire.activations import CHECKPOINTS
from headrace.client.wire.comparison import compare
from headrace.model import Decoder, ModelError, load_model
from headrace.model.config import ModelConfig
from headrace.model.families import FAMILIES
from headrace.model.gguf_file import tokenizer_json
from headrace.model.weights import expected_shapes
from headrace.worker.fidelity.tensor_files import read_tensors
from tests.fuzz.harness import Target, check_message
from tests.fuzz.values import ANY_TEXT, JSON, NUMBERS, objects

CONFIG: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 4, "n_positions": 8, "vocab_size": 8}
SHAPES = expected_shapes(ModelConfig(**CONFIG))
HUGE = st.sampled_from([0, 1, 2, 3, 1_000, 999_999, 1_000_000, 1_000_001, 2**31, 2**63, 10**400])


@contextlib.contextmanager
def folder(files: dict[str, bytes]) -> Iterator[Path]:
    """A temporary directory with these files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        yield Path(name)


def safetensors(header: Any, data: bytes, claimed: int | None) -> bytes:
    """A file in the safetensors format. `claimed` replaces the true length of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) if claimed is None else claimed) % 2**64) + text + data


def good_header() -> tuple[dict[str, Any], int]:
    """The header of a model that fits `CONFIG`, and the size of its tensors in bytes."""
    header, at = {}, 0
    for name, shape in SHAPES.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header, at


HEADER, SIZE = good_header()
ENTRIES = objects(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "C64", "X"]),
        "shape": st.lists(st.sampled_from([0, 1, 4, 8, 2**31, 2**63, 2**64 - 1, -1]), max_size=5),
        "data_offsets": st.lists(
            st.sampled_from([0, 1, 16, SIZE, SIZE + 1, 2**40, 2**64 - 1, -1]), min_size=2, max_size=2
        ),
    }
)
NAMES = (
    st.sampled_from(
        [
            *SHAPES,
            *(f"transformer.{name}" for name in SHAPES),
            *(f"module._orig_mod.{name}" for name in SHAPES),
            "lm_head.weight",
            "v_head.summary.weight",
            "h.0.attn.c_attn.lora_A.weight",
            "h.0.attn.bias",
            "h.01.ln_1.bias",
            "h.9999999999.ln_1.bias",
            "__metadata__",
        ]
    )
    | ANY_TEXT
)
HEADERS = st.one_of(
    st.just(HEADER),
    st.dictionaries(NAMES, ENTRIES | JSON, max_size=2).map(lambda invalid: {**HEADER, **invalid}),
    st.sets(st.sampled_from(sorted(SHAPES)), max_size=2).map(
        lambda gone: {n: e for n, e in HEADER.items() if n not in gone}
    ),
    JSON,
    st.binary(max_size=60),
)
WEIGHTS = st.builds(
    lambda data, cut: data[: len(data) - cut],
    st.builds(
        safetensors,
        HEADERS,
        st.sampled_from([bytes(SIZE), bytes(SIZE + 4), b"", b"\xff" * SIZE]),
        st.sampled_from([None, None, None, 0, 1, 10, 10**6, 10**9, 2**63, 2**64 - 1]),
    ),
    st.sampled_from([0, 0, 0, 1, 7, 100, 700]),
)
CONFIG_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **{name: st.just(value) | HUGE for name, value in CONFIG.items()},
    "n_inner": st.sampled_from([None, 16, 1_000_000]),
    "layer_norm_epsilon": st.just(1e-5) | NUMBERS,
    "model_type": st.sampled_from(["gpt2", "gpt2", "gpt2", *FAMILIES]) | JSON,
    "activation_function": st.sampled_from(["gelu_new", "relu", "mish"]),
    "tie_word_embeddings": st.booleans(),
    "scale_attn_weights": st.booleans(),
    "num_hidden_layers": st.just(CONFIG["n_layer"]) | HUGE,
    "add_cross_attention": st.booleans(),
    "quantization_config": st.sampled_from([None, {}, {"quant_method": "gptq"}]),
    "auto_map": JSON,
    "pruned_heads": JSON,
}
CONFIGS = st.one_of(
    st.just(json.dumps(CONFIG).encode()),
    objects(CONFIG_FIELDS, needed=tuple(CONFIG)).map(json.dumps).map(str.encode),
    JSON.map(json.dumps).map(str.encode),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{", b"\x00", b"{}" + b" " * 2**21, b"9" * 5_000]),
    st.binary(max_size=30),
)


def check_model(case: tuple[bytes, bytes]) -> None:
    """A directory is loaded as a model, or refused with a ModelError that names the directory."""
    config, weights = case
    with folder({"config.json": config, "model.safetensors": weights}) as path:
        _load(path)


def _load(path: Path) -> None:
    try:
        assert isinstance(load_model(path, device="cpu", dtype="float32"), Decoder)
    except ModelError as error:
        check_message(str(error), str(path))


SHARD_NAMES = st.one_of(
    st.sampled_from(
        [
            "a.safetensors",
            "b.safetensors",
            "../a.safetensors",
            "/etc/passwd",
            "..",
            ".",
            "",
            "a\0b",
            "x" * 5_000,
            "./a.safetensors",
            "config.json",
            "model.safetensors.index.json",
            "~/.bashrc",
        ]
    ),
    ANY_TEXT,
    JSON,
)
INDEXES = st.one_of(
    st.dictionaries(NAMES, st.just("a.safetensors"), max_size=3).map(lambda m: {"weight_map": m}),
    st.dictionaries(NAMES, SHARD_NAMES, max_size=4).map(lambda m: {"weight_map": m}),
    objects({"weight_map": JSON | st.dictionaries(ANY_TEXT, JSON, max_size=3), "metadata": JSON}),
    JSON,
)


def check_index(case: tuple[Any, bytes, bytes]) -> None:
    """The shards of an index are loaded from its own directory, or the index is refused with a ModelError."""
    index, first, second = case
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors.index.json": json.dumps(index).encode()}
    with folder({**files, "a.safetensors": first, "b.safetensors": second}) as path:
        _load(path)


TENSOR_NAMES = st.sampled_from(
    sorted({name for _, names, _ in CHECKPOINTS.values() for name in names})
) | ANY_TEXT.filter(lambda name: name.isprintable())
ARRAYS = st.builds(
    lambda dtype, shape: np.ones(shape, dtype),
    st.sampled_from(["<f4", "<f8", "<f2", "<i8", "?", "<c8", "S3", "U3", "<M8[s]", "V4"]),
    st.sampled_from([(), (0,), (3,), (2, 4), (2, 2, 2)]),
)


def npy(array: np.ndarray) -> bytes:
    """An array in numpy's format."""
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=False)
    return out.getvalue()


def npy_with_header(dtype: str, shape: str, version: int) -> bytes:
    """A file in numpy's format whose header does not match its content."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", len(header))
        + header
        + bytes(64)
    )


NPY = st.one_of(
    ARRAYS.map(npy),
    st.builds(
        npy_with_header,
        st.sampled_from(["<f4", "<f8", "|O", "S0", "<U999999999", "zz"]),
        st.sampled_from(
            [
                "(2,)",
                "(10**9,)",
                "(1099511627776,)",
                "(-1,)",
                "(9223372036854775807, 2)",
                "()",
                "(",
                "(1.5,)",
                "((1,),)",
            ]
        ),
        st.sampled_from([1, 2, 3]),
    ),
    st.binary(max_size=40),
    st.builds(lambda array, cut: npy(array)[:cut], ARRAYS, st.integers(0, 140)),
)


def archive(members: list[tuple[str, bytes]], method: int, cut: int, flip: int) -> bytes:
    """A zip file, truncated by `cut` bytes, with the byte at `-flip` inverted."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in dict(members).items():
            file.writestr(name, data)
    data = bytearray(out.getvalue())
    if flip < len(data):
        data[-flip] ^= 0xFF
    return bytes(data[: len(data) - cut])


TENSOR_FILES = st.one_of(
    st.tuples(st.just("logits.npy"), NPY),
    st.tuples(
        st.just("a.npz"),
        st.builds(
            archive,
            st.lists(st.tuples(TENSOR_NAMES.map(lambda n: n.replace("\0", "") + ".npy"), NPY), max_size=2),
            st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]),
            st.sampled_from([0, 0, 0, 1, 30]),
            st.integers(1, 150) | st.just(10**6),
        ),
    ),
    st.tuples(
        st.just("a.npz"),
        st.just(archive([("logits.npy", npy_with_header("<f4", "(536870912,)", 1) + bytes(2**22))], 8, 0, 10**6)),
    ),
    st.tuples(
        st.just("a.safetensors"),
        st.builds(
            safetensors,
            st.dictionaries(TENSOR_NAMES, ENTRIES, max_size=3) | JSON,
            st.just(bytes(64)),
            st.sampled_from([None, 10**9]),
        ),
    ),
    st.tuples(st.sampled_from(["a.txt", "a.npz", "a.npy", "a.safetensors"]), st.binary(max_size=40)),
)
CAPTURED = {name: np.ones((2, 4), np.float32) for _, names, _ in CHECKPOINTS.values() for name in names} | {
    "cache_rest": np.zeros(())
}


def check_tensors(case: tuple[str, bytes]) -> None:
    """A tensor file can be used as a reference, or is refused with a ValueError that names it."""
    name, data = case
    with folder({name: data}) as path:
        try:
            found = read_tensors(path / name)
        except ValueError as error:
            check_message(str(error), name)
            return
        assert len(compare(CAPTURED, found, reference=name, tolerances={})) == 12


GGUF_COUNTS = st.sampled_from([0, 1, 2, 3, 8, 31, 32, 64, 1_000, 2**20, 2**31, 2**32, 2**60, 2**63, 2**64 - 1])
GGUF_ENTRIES: dict[str, tuple[int, bytes]] = {
    "general.architecture": (8, struct.pack("<Q", 4) + b"gpt2"),
    "gpt2.block_count": (4, struct.pack("<I", 1)),
    "gpt2.embedding_length": (4, struct.pack("<I", 4)),
    "gpt2.context_length": (4, struct.pack("<I", 8)),
    "gpt2.attention.head_count": (4, struct.pack("<I", 2)),
    "gpt2.attention.layer_norm_epsilon": (6, struct.pack("<f", 1e-5)),
}
GGUF_VALUES = st.one_of(
    st.tuples(st.integers(0, 14), GGUF_COUNTS.map(lambda n: struct.pack("<Q", n))),
    st.tuples(st.just(9), st.tuples(st.integers(0, 14), GGUF_COUNTS).map(lambda a: struct.pack("<IQ", *a))),
    st.tuples(st.just(8), st.binary(max_size=12).map(lambda b: struct.pack("<Q", len(b)) + b)),
)
GGUF_NAMES = st.sampled_from(
    [
        *("token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias", "output.weight"),
        *("blk.0.attn_qkv.weight", "blk.0.ffn_up.weight", "blk.99999999.ffn_up.bias", "wte.weight", "", "x" * 5_000),
    ]
)
GGUF_TENSORS = st.lists(
    st.tuples(
        GGUF_NAMES,
        st.lists(st.sampled_from([0, 1, 4, 8, 256]) | GGUF_COUNTS, max_size=5),
        st.integers(0, 45),
        GGUF_COUNTS,
    ),
    max_size=4,
)


def gguf_file(
    counts: tuple[int, int], changed: dict[str, tuple[int, bytes]], tensors: list[Any], version: int, data: bytes
) -> bytes:
    """A file in the GGUF format. `counts` are added to the true numbers of tensors and metadata entries."""
    entries = GGUF_ENTRIES | changed
    numbers = [(true + more) % 2**64 for true, more in zip((len(tensors), len(entries)), counts, strict=True)]
    out = b"GGUF" + struct.pack("<IQQ", version, *numbers)
    for name, (code, value) in entries.items():
        out += struct.pack("<Q", len(name.encode())) + name.encode() + struct.pack("<I", code) + value
    for name, dims, code, offset in tensors:
        out += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", code, offset)
    return out + bytes(-len(out) % 32) + data


GGUF_FILES = st.builds(
    gguf_file,
    st.tuples(*[st.just(0) | GGUF_COUNTS] * 2),
    st.dictionaries(
        st.sampled_from([*GGUF_ENTRIES, "general.alignment", "general.type", "split.count", "tokenizer.ggml.tokens"]),
        GGUF_VALUES,
        max_size=2,
    ),
    GGUF_TENSORS,
    st.sampled_from([3, 3, 3, 2, 1, 0, 2**24]),
    st.sampled_from([b"", bytes(64), bytes(4096), b"\xff" * 4096]),
) | st.binary(max_size=60)


def check_gguf(data: bytes) -> None:
    """A GGUF file is loaded, or refused with a ModelError that names it; so is its tokenizer."""
    with folder({"m.gguf": data}) as path:
        _load(path / "m.gguf")
        try:
            assert isinstance(tokenizer_json(path / "m.gguf"), dict)
        except ModelError as error:
            check_message(str(error), str(path))


TARGETS = [
    Target("gguf", GGUF_FILES, check_gguf, full_cases=12_000),
    Target("model", st.tuples(CONFIGS, WEIGHTS), check_model, full_cases=12_000),
    Target("index", st.tuples(INDEXES, WEIGHTS, WEIGHTS), check_index, full_cases=6_000),
    Target("tensors", TENSOR_FILES, check_tensors, full_cases=7_000),
]

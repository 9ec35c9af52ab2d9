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
from headrace.model import Decoder, ModelError, load_model, load_tokenizer
from headrace.model.config import ModelConfig
from headrace.model.tokenizer import END_OF_TEXT, byte_alphabet
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
            "lm_head.weight",
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
    "model_type": st.just("gpt2"),
    "activation_function": st.sampled_from(["gelu_new", "relu"]),
    "tie_word_embeddings": st.booleans(),
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


BYTES = byte_alphabet()
TOKENS = st.sampled_from(["ab", "bc", "abc", "Ġa", END_OF_TEXT, "a", "ð", "\ud800", "", " ", "a b", "é"]) | ANY_TEXT
VOCABULARY = {char: i for i, char in enumerate(BYTES)} | {"ab": 256, "abc": 257}
VOCABULARIES = st.one_of(
    st.just(VOCABULARY),
    st.dictionaries(TOKENS, st.integers(255, 262) | JSON, max_size=4).map(lambda more: {**VOCABULARY, **more}),
    st.dictionaries(TOKENS, st.integers(258, 262) | st.sampled_from([2**31 - 1, 2**31, 2**40]), max_size=4).map(
        lambda more: {**VOCABULARY, **more}
    ),
    st.sampled_from([3, 20_000]).map(lambda n: {**VOCABULARY, **{f"<{i}>": 258 + i for i in range(n)}}),
    JSON,
)
MERGES = st.lists(
    st.sampled_from(
        ["a b", "ab c", "b c", "a bc", "c ab", "ab ab", "#version: 0.2", "", "a", "a b c", " ", "é x", "\ud800 a"]
    )
    | ANY_TEXT,
    max_size=5,
) | st.just(["a b", "ab c"])
ADDED = st.none() | JSON | st.lists(objects({"content": TOKENS, "id": st.integers(250, 270) | JSON}), max_size=3)
VOCABULARY_FILES = st.one_of(
    st.tuples(VOCABULARIES, MERGES).map(
        lambda v: {
            "vocab.json": json.dumps(v[0]).encode(),
            "merges.txt": "\n".join(v[1]).encode(errors="surrogatepass"),
        }
    ),
    st.tuples(st.binary(max_size=20) | st.just(b"[" * 100_000), st.binary(max_size=20)).map(
        lambda v: {"vocab.json": v[0], "merges.txt": v[1]}
    ),
    st.tuples(
        VOCABULARIES, MERGES.map(lambda m: [x.split(" ") for x in m]) | MERGES | st.lists(JSON, max_size=3), ADDED
    ).map(
        lambda v: {
            "tokenizer.json": json.dumps(
                {"model": {"type": "BPE", "vocab": v[0], "merges": v[1]}, "added_tokens": v[2]}
            ).encode()
        }
    ),
    JSON.map(lambda v: {"tokenizer.json": json.dumps(v).encode()}),
)
SAMPLES = ("", "abc abcab", " \u00e9\U0001f600 <1>", "a" * 300 + " " * 300)


def check_vocabulary(files: dict[str, bytes]) -> None:
    """A vocabulary round-trips every text, or is refused with a ModelError that names its directory."""
    with folder(files) as path:
        try:
            tokenizer = load_tokenizer(path)
        except ModelError as error:
            check_message(str(error), str(path))
            return
        for text in SAMPLES:
            assert tokenizer.decode(tokenizer.encode(text)) == text


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


TARGETS = [
    Target("model", st.tuples(CONFIGS, WEIGHTS), check_model, full_cases=12_000),
    Target("index", st.tuples(INDEXES, WEIGHTS, WEIGHTS), check_index, full_cases=6_000),
    Target("vocabulary", VOCABULARY_FILES, check_vocabulary, full_cases=6_000, test_cases=20),
    Target("tensors", TENSOR_FILES, check_tensors, full_cases=7_000),
]

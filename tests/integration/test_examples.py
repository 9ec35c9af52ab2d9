"""The scripts of examples/ run as a user runs them, against a real worker."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from headrace.client import Client
from headrace.model.hub import find_model
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

#: For `datasets`, which writes to a cache in the home directory and asks a hub for updates.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture
def environment(worker: object, redis_url: str, tmp_path: Path) -> dict[str, str]:
    return {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "hf"), "HEADRACE_REDIS_URL": redis_url}


def run(name: str, *arguments: str, env: dict[str, str]) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bulk_over_a_file_resumes(environment: dict[str, str], tmp_path: Path) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    lines = [{"custom_id": name, "prompt": name} for name in ("Alice", "Bob", "Carol")]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = run("bulk_over_a_file.py", str(source), str(target), env=environment)
    assert first.startswith("0 rows were done before, 3 were computed, 0 failed\n")
    assert sorted(line.split()[0] for line in first.splitlines()[1:]) == ["Alice", "Bob", "Carol"]
    target.write_text("".join(target.read_text().splitlines(keepends=True)[:2]))
    again = run("bulk_over_a_file.py", str(source), str(target), env=environment)
    assert again.startswith("2 rows were done before, 1 were computed, 0 failed\n")
    assert sorted(again.splitlines()[1:]) == sorted(first.splitlines()[1:])


def test_columns_of_datasets_pandas_and_pyarrow_give_the_same_texts(environment: dict[str, str]) -> None:
    printed = run("columns.py", env=environment)
    assert "['prompt', 'text'] 3" in printed
    assert "'prompt': 'The old house'" in printed


def test_the_likeliest_answers_are_a_column(environment: dict[str, str]) -> None:
    printed = run("choose_an_answer.py", env=environment)
    assert printed.splitlines()[0].split() == ["review", "mood"]


def test_a_seed_reproduces_the_samples(environment: dict[str, str]) -> None:
    printed = run("samples_with_a_seed.py", env=environment)
    assert printed.count("\n") == 6
    assert "the same again with seed" in printed


def test_two_models_are_compared(environment: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(find_model("demo"), other := tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("h.0.mlp.c_proj.bias"))
    weights[name] = weights[name] + 0.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    printed = run("compare_two_models.py", "demo", str(other), env=environment)
    differences = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert all(float(differences[name]) == 0 for name in ("embeddings", "ln_1", "q", "k", "v", "scores", "attn"))
    assert float(differences["mlp"]) == pytest.approx(0.5, abs=1e-3)
    assert all(float(differences[name]) > 0 for name in ("block_0", "logits"))


@pytest.fixture
def service(environment: dict[str, str]) -> Iterator[int]:
    """The port of the asyncio service."""
    command = [sys.executable, str(EXAMPLES / "async_service.py"), "0"]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline().split()[-1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_service_answers_many_at_once_and_survives_disconnects(service: int, client: Client) -> None:
    expected = client.submit("The river", max_tokens=200, temperature=0).result(timeout=PATIENCE_S).text
    connections = [socket.create_connection(("127.0.0.1", service), timeout=PATIENCE_S) for _ in range(3)]
    for connection in connections:
        connection.sendall(b"The river\n")
    assert connections[0].recv(1)
    connections[0].close()
    for connection in connections[1:]:
        with connection, connection.makefile("rb") as answer:
            assert answer.read().decode() == expected

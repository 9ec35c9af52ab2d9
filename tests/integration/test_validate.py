"""`headrace validate` as a user runs it: tables, files of other programs, pictures, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.model import load_model
from headrace.model.kernels.gemm_int8 import int8_works
from tests.adapter_files import write_adapter
from tests.patience import PATIENCE_S


def validate(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_COLOR": "1"}
    command = [sys.executable, "-m", "headrace.worker.cli", "validate", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of another implementation for "Hello.", here of the plain forward pass."""
    path = tmp_path_factory.mktemp("dump") / "other.npz"
    traced = load_model("demo", device="cpu", dtype="float32").trace(torch.tensor([[15496, 13]]))
    np.savez(path, **{name: tensor[0].numpy() for name, tensor in traced.items()})
    return path


def test_the_bundled_model_passes_and_the_difference_is_drawn(tmp_path: Path, dump: Path) -> None:
    picture = tmp_path / "difference.png"
    references = ["--reference", "transformers", "--reference", str(dump)]
    done = validate(*references, "--prompt", "Hello.", "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in ("first layer norm", "tokens end to end", "prompt ids, text with"))
    for subject in ("headrace", "transformers 5", str(dump)):
        assert f"{subject} measured against float64" in " ".join(
            done.stdout.replace(f"{subject}.23.0", subject).split()
        )
    assert "FAILED" not in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_adapter_is_measured_against_float64_and_peft(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "tone", 1, rank=8, std=0.1)
    done = validate("--adapter", str(adapter), "--reference", "transformers", "--prompt", "Hello.", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    ours, theirs = json.loads(done.stdout)
    assert "/adapter-" in ours["fingerprint"]
    assert "peft" in theirs["subject"]
    assert all(row["ok"] for each in (ours, theirs) for row in each["rows"] if row["compared"])


def test_a_dump_with_a_mistake_fails_with_the_cause_and_the_next_command(dump: Path, tmp_path: Path) -> None:
    with np.load(dump) as archive:
        tensors = {name: archive[name] for name in archive.files}
    wrong = tmp_path / "unscaled.npz"
    np.savez(wrong, **{**tensors, "scores": tensors["scores"] * 8})
    done = validate("--reference", str(wrong), "--prompt", "Hello.")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "checkpoint 4 fails first: the scores are not scaled" in done.stdout
    assert "next: headrace validate" in done.stdout


def test_other_precisions_have_tolerances_of_their_own_and_say_what_they_cost() -> None:
    """int8 where this CPU has kernels for it, otherwise bfloat16."""
    dtype = "int8" if int8_works("cpu") else "bfloat16"
    done = validate("--reference", "transformers", "--dtype", dtype, "--json", "--prompt", "Once upon a time")
    assert done.returncode == 0, done.stdout + done.stderr
    report, library = json.loads(done.stdout)
    assert (report["subject"], report["reference"], report["judged"]) == ("headrace", "float64", True)
    assert (library["judged"], library["loss"]) == (False, None)
    assert report["ok"]
    assert [row["number"] for row in report["rows"]] == list(range(13))
    text = report["text"]
    assert (text["name"], text["ok"], text["texts"], text["eos_token_ids"]) == ("text", True, 1, [50256])
    assert library["text"] is None
    rows = {row["number"]: row for row in report["rows"]}
    assert rows[8]["tolerance"] > 1e-2
    assert 0 < rows[8]["max_abs"] <= rows[8]["tolerance"]
    assert dtype in report["fingerprint"].split("/")
    assert report["loss"]["positions"] == 4
    assert 0 < report["loss"]["divergence"] < (0.005 if dtype == "bfloat16" else 0.05)

"""Comparing the results of this machine with the digests that were made on another one."""

from __future__ import annotations

import contextlib
import datetime
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from headrace.model.kernels import isa
from headrace.model.kernels.gemm_bf16_amx import bf16_amx_works
from headrace.worker.engine.fingerprint import NUMERICS
from tests.numerics.jobs import SUBJECTS, Subject, digests

FILE = Path(__file__).parent / "digests.json"


def committed() -> dict[str, Any]:
    """The digests of each model, with the machine that made them."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def renew() -> list[str]:
    """Make the digests again that differ on this machine's best instruction set, and those that are missing.

    The others keep the name of the machine that made them. Returns the names of the models whose digests are new.
    """
    kept, models = committed()["models"], {}
    for subject in SUBJECTS:
        found = {kind: digests(subject, kind) for kind in subject.precisions}
        old = kept.get(subject.name, {})
        models[subject.name] = old if old.get("digests") == found else {"machine": machine(), "digests": found}
    FILE.write_text(json.dumps({"numerics": NUMERICS, "models": models}, indent=1) + "\n")
    return [name for name in models if models[name] != kept.get(name)]


def machine() -> dict[str, str]:
    """The CPU, its instruction set, the commit and the day."""
    lines = (line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in lines}
    name = f"{cpu['model name']}, family {cpu['cpu family']}, model {cpu['model']}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"cpu": name, "rung": isa.chosen().name, "commit": commit.strip(), "date": day}


@contextlib.contextmanager
def rung(name: str) -> Iterator[None]:
    """Compute with a lower instruction set inside the block."""
    isa.use(name)
    bf16_amx_works.cache_clear()  # whether the matrix unit works was found for another instruction set
    try:
        yield
    finally:
        isa.use(isa.AUTO)
        bf16_amx_works.cache_clear()


def compare(
    subjects: Sequence[Subject] = SUBJECTS,
    rungs: Sequence[str] = (),
    report: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """What differs from the committed digests: a sentence for each result. `rungs`: all of this machine by default."""
    kept, differing = committed(), []
    if kept["numerics"] != NUMERICS:
        return [
            f"the digests are of numerics-{kept['numerics']}, and this code is numerics-{NUMERICS}: make them again"
        ]
    for name in rungs or [each.name for each in isa.available()]:
        for subject in subjects:
            for precision in subject.precisions:
                with rung(name):
                    found = digests(subject, precision)
                wanted = kept["models"][subject.name]["digests"][precision]
                wrong = [job for job in {**wanted, **found} if wanted.get(job) != found.get(job)]
                differing += [f"{subject.name}, {precision}, {name}: {job} has other bits" for job in wrong]
                alike = len(found) - len(wrong)
                report(
                    f"{name}, {torch.get_num_threads()} threads, {subject.name}, {precision}: {alike} of {len(found)}"
                )
    return differing

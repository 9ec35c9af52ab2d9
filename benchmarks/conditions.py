"""The conditions of a measurement: versions, processor, threads, date, commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from headrace.model.kernels import isa

_PACKAGES = ("headrace", "torch", "transformers", "ctranslate2", "llama-cpp-python", "gguf", "numpy")


def conditions(threads: int) -> dict[str, object]:
    """The conditions as JSON values; None for what cannot be determined."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "threads": threads,
        "rung": isa.chosen().name,
        "cpu": _cpuinfo("model name"),
        "cpu_flags": (_cpuinfo("flags") or "").split(),
    }


def commit() -> str | None:
    """The commit of the sources, with `+` if tracked files differ from it; None outside of a repository."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo(field: str) -> str | None:
    """A field of the first processor, on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == field), None)

"""Converts pickled checkpoints of PyTorch, which only a child process of limited means reads (unpickle.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.model.hub import MAX_INDEX_BYTES, read_json, short_repr, shorten
from headrace.model.trusted_files import ModelError, open_file

#: A command -> the command that is started instead, for example one that ends with this process.
Wrap = Callable[[list[str]], list[str]]
#: Size limit of what the child reports.
MAX_REPORT_BYTES = 2**20


def shards(folder: Path, index: Path) -> list[Path]:
    """The pickled files that an index names. Raises ModelError if one is not in the directory."""
    names = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: weight_map must map tensor names to file names")
    for name in set(names.values()):
        if Path(name).name != name or not os.path.isfile(folder / name):
            raise ModelError(f"{index}: it names {short_repr(name)}, which is not a file in {folder}")
    return [folder / name for name in sorted(set(names.values()))]


def convert_pickled(path: Path, out: Path, wrap: Wrap) -> dict[str, Any]:
    """Write the tensors of one checkpoint to a safetensors file, in a child process.

    Returns:
        notes: sentences about what was left out; head_differs; model_args: of nanoGPT, else None.

    Raises:
        ModelError: the file is refused, or the process ended for lack of memory or time.
    """
    with open_file(path) as file:
        os.set_inheritable(descriptor := file.fileno(), True)
        size = os.fstat(descriptor).st_size
        command = [sys.executable, "-P", "-B", "-m", "headrace.model.convert.unpickle"]
        with subprocess.Popen(  # noqa: S603
            wrap([*command, str(descriptor), str(size), str(out)]),
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        ) as child:
            try:
                said, complaint = child.communicate(timeout=600 + size / 2**22)
            except subprocess.TimeoutExpired:
                raise ModelError(f"{path}: reading it took more than {600 + size // 2**22} s") from None
            finally:
                child.kill()
    return _report(path, child.returncode, said[:MAX_REPORT_BYTES], complaint.decode(errors="replace"))


def _report(path: Path, code: int, said: bytes, complaint: str) -> dict[str, Any]:
    try:
        report = json.loads(said)
    except ValueError:
        report = None
    if not isinstance(report, dict):
        last = complaint.strip().rsplit("\n", 1)[-1]
        ended = signal.Signals(-code).name if -code in set(signal.Signals) else f"code {code}"
        raise ModelError(
            f"{path}: the process that reads it ended with {ended}"
            + (" after its limit of processor time" if code == -signal.SIGXCPU else "")
            + (f" ({shorten(last)})" if last else "")
            + "; the file is broken or not a checkpoint, or the machine has too little memory"
        )
    if "refused" in report:
        raise ModelError(f"{path}: {report['refused']}")
    return report

"""Writes what tinygrad and Candle compute for the bundled model: `python -m tests.golden.make_golden`.

One file a library, `<library>.safetensors`, with tensors named `<case>.<tensor>`. Of the logits only the first row and
the last are kept (`first_logits`, `last_logits`), and the first for one case alone: all rows would be megabytes.
Run it when the bundled weights change, and look at the difference before keeping it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from headrace.worker.fidelity.references import Reference, load_reference

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "model" / "demo"
LIBRARIES = ("tinygrad", "candle")
#: "Hello.", the test case of all checkpoints, and "The quick brown".
CASES = {"hello": [15496, 13], "quick": [464, 2068, 7586]}
SMALL = ("embeddings", "ln_1", "q", "k", "v", "scores", "attn", "mlp", "block_0", "hidden", "next_token")


def record(reference: Reference) -> dict[str, NDArray[np.float32]]:
    """The tensors of one file."""
    kept: dict[str, NDArray[np.float32]] = {}
    for case, token_ids in CASES.items():
        trace = reference.trace(token_ids)
        tensors = {name: trace[name] for name in (*SMALL, "last_logits")}
        if case == "hello":
            tensors["first_logits"] = trace["logits"][0]
        kept |= {f"{case}.{name}": tensor.copy(order="C") for name, tensor in tensors.items()}
    return kept


def weights_sha256() -> str:
    """SHA-256 of the bundled weights."""
    return hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Rewrite the files."""
    for name in LIBRARIES:
        reference = load_reference(name, DEMO)
        about = {"library": reference.name, "weights_sha256": weights_sha256(), "cases": json.dumps(CASES)}
        save_file(record(reference), HERE / f"{name}.safetensors", metadata=about)


if __name__ == "__main__":
    main()

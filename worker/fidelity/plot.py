"""Plot how the error of an implementation grows, by layer (rows) and position (columns)."""

from __future__ import annotations

import numpy as np


def draw_difference(found: np.ndarray, exact: np.ndarray, subject: str, path: str) -> None:
    """Write a PNG with log10 of the largest error at each layer and position.

    Args:
        found: the residual stream of the tested implementation [n_layer + 1, T, E].
        exact: the same in float64.
        subject: the implementation's name, for the title.
        path: the file to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    gap = np.abs(found.astype(np.float64) - exact.astype(np.float64)).max(axis=-1)  # [n_layer + 1, T]
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.3 * len(gap)), layout="constrained")
    image = axes.imshow(
        np.log10(np.maximum(gap, 1e-9)), aspect="auto", cmap="viridis", vmin=-8, vmax=0, interpolation="nearest"
    )
    axes.set_yticks(range(len(gap)), ["embeddings", *(f"block {i}" for i in range(len(gap) - 1))])
    axes.set_xlabel("position")
    axes.set_title(f"{subject}: largest error of the residual stream, against float64")
    figure.colorbar(image, label="log10 of the error")
    figure.savefig(path, dpi=120)
    plt.close(figure)

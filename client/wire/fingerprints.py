"""What the fingerprints of several workers of one model say: whether they serve the same model, and round alike."""

from __future__ import annotations

from collections.abc import Mapping

#: The parts of a fingerprint that identify a model. The others identify software, machine and number type.
MODEL_PARTS = ("weights-", "config-", "vocabulary-", "ends-", "prompts-")


def model_of(fingerprint: str, kinds: tuple[str, ...] = MODEL_PARTS) -> str:
    """The parts of a fingerprint that identify the model; empty if the model is not loaded."""
    return "/".join(part for part in fingerprint.split("/") if part.startswith(kinds))


def different_models(fingerprints: Mapping[str, str]) -> dict[str, list[str]]:
    """The models that workers serve under one name: what tells each from the others, and its workers.

    Empty if they serve the same one. Otherwise a job has another answer on another worker.

    Args:
        fingerprints: those of workers that serve the same name, by the worker's name; empty ones are ignored.
    """
    models: dict[str, list[str]] = {}
    told = [fingerprint for fingerprint in fingerprints.values() if model_of(fingerprint)]
    # Workers of earlier versions do not tell every part. What one of them does not tell is not compared.
    kinds = tuple(kind for kind in MODEL_PARTS if all(model_of(fingerprint, (kind,)) for fingerprint in told))
    for worker, fingerprint in sorted(fingerprints.items()):
        if model := model_of(fingerprint, kinds):
            models.setdefault(model, []).append(worker)
    if len(models) < 2:
        return {}
    shared = set.intersection(*(set(model.split("/")) for model in models))
    return {"/".join(p for p in model.split("/") if p not in shared): names for model, names in models.items()}

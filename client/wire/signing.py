"""Signatures of requests: only clients with the key can submit, even where others can write to Redis.

A signature is an HMAC-SHA-256 over the job id, the model of the queue, and the request exactly as it is sent, including
the schema version. It is sent in the request under `SIGNATURE`. Without a key nothing is added.

The job's record has a mark as well: a message that someone without the key sends under the id of a signed job does not
make that job fail.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from typing import Any

#: The field of the request for the signature; no parameter has this name.
SIGNATURE = "signature"

#: Signed text begins with this, so that signatures which the same key makes for other purposes are not valid here.
_PURPOSE = "headrace job 1"
_MARK_PURPOSE = "headrace record 1"


def sign(key: bytes, job_id: str, model: str, wire: Mapping[str, Any]) -> dict[str, Any]:
    """The request with its signature, which is valid for this job only."""
    return {**wire, SIGNATURE: _digest(key, _signed_text(job_id, model, wire))}


def verified(keys: Iterable[bytes], job_id: str, model: str, wire: Any) -> bool:
    """Whether the request has a valid signature by one of the keys, for this job and this model's queue."""
    given = wire.get(SIGNATURE) if isinstance(wire, dict) else None
    if not isinstance(given, str) or not given.isascii():
        return False
    try:
        text = _signed_text(job_id, model, wire)
    except (TypeError, ValueError, RecursionError):  # contains what no client sends, such as NaN or deep nesting
        return False
    return any(hmac.compare_digest(_digest(key, text), given) for key in keys)


def mark(key: bytes, job_id: str) -> str:
    """The mark in a job's record that shows that its submitter has the key."""
    return _digest(key, json.dumps([_MARK_PURPOSE, job_id]).encode())


def marked(keys: Iterable[bytes], job_id: str, given: str | None) -> bool:
    """Whether the mark in a job's record was made with one of the keys."""
    if given is None or not given.isascii():
        return False
    return any(hmac.compare_digest(mark(key, job_id), given) for key in keys)


def unsigned(wire: Any) -> Any:
    """The request without its signature."""
    return {name: value for name, value in wire.items() if name != SIGNATURE} if isinstance(wire, dict) else wire


def _signed_text(job_id: str, model: str, wire: Mapping[str, Any]) -> bytes:
    """The canonical form of a request: JSON in ASCII, with sorted names and without spaces."""
    signed = [_PURPOSE, job_id, model, unsigned(wire)]
    return json.dumps(signed, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(key: bytes, text: bytes) -> str:
    return hmac.new(key, text, hashlib.sha256).hexdigest()

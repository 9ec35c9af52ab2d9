"""Signatures of jobs: who holds the key may submit, whoever else can write to Redis.

A signature is an HMAC-SHA-256 over the job's id, the model whose queue it goes to, and the request exactly as it is
sent, schema version included. It travels in the request's wire form under `SIGNATURE`. Without a key nothing is added.

A job's record is marked as well: a job that somebody with the key has submitted is not failed for what others send.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from typing import Any

#: The field of a request on the wire that holds its signature; no parameter has this name.
SIGNATURE = "signature"

#: What is signed begins with this, so that a key used elsewhere too signs nothing that could pass here.
_PURPOSE = "headrace job 1"
_MARK_PURPOSE = "headrace record 1"


def sign(key: bytes, job_id: str, model: str, wire: Mapping[str, Any]) -> dict[str, Any]:
    """The request with its signature, to be sent for this job and no other."""
    return {**wire, SIGNATURE: _digest(key, _signed_text(job_id, model, wire))}


def verified(keys: Iterable[bytes], job_id: str, model: str, wire: Any) -> bool:
    """Whether the request was signed with one of the keys for this job and this model's queue."""
    given = wire.get(SIGNATURE) if isinstance(wire, dict) else None
    if not isinstance(given, str) or not given.isascii():
        return False
    try:
        text = _signed_text(job_id, model, wire)
    except (TypeError, ValueError, RecursionError):  # holds what no client of ours sends: a NaN, a date, a deep nest
        return False
    return any(hmac.compare_digest(_digest(key, text), given) for key in keys)


def mark(key: bytes, job_id: str) -> str:
    """What the record of a job says if its submitter has the key."""
    return _digest(key, json.dumps([_MARK_PURPOSE, job_id]).encode())


def marked(keys: Iterable[bytes], job_id: str, given: str | None) -> bool:
    """Whether a job's record was written by somebody with one of the keys."""
    if given is None or not given.isascii():
        return False
    return any(hmac.compare_digest(mark(key, job_id), given) for key in keys)


def unsigned(wire: Any) -> Any:
    """The request without its signature."""
    return {name: value for name, value in wire.items() if name != SIGNATURE} if isinstance(wire, dict) else wire


def _signed_text(job_id: str, model: str, wire: Mapping[str, Any]) -> bytes:
    """One text for one request, on both sides: JSON with sorted names and no spaces, in ASCII."""
    signed = [_PURPOSE, job_id, model, unsigned(wire)]
    return json.dumps(signed, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(key: bytes, text: bytes) -> str:
    return hmac.new(key, text, hashlib.sha256).hexdigest()

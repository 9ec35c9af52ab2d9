"""A job that has been checked and not been submitted."""

from __future__ import annotations

import functools
import json
import time
import uuid
from typing import Any

from headrace.client.wire import keys
from headrace.client.wire.clock import RedisClock
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.signing import mark, sign

#: Bytes that the deadline and the signature add to a request, at most.
_ADDED_BYTES = 160


class PreparedJob:
    """A job whose request has been checked and which has not been submitted.

    Attributes:
        id: the job id.
        model: the model whose queue the job goes to.
        named: what the caller called it, for example by its hub id.
        digest: identifies the request, for a job id that the caller chose; else empty.
        timeout_s: seconds from now until the job expires; None means never.
        mark: shows in the job's record that its submitter has the key; None without a key.
    """

    def __init__(
        self,
        job_id: str,
        model: str,
        request: GenerateRequest,
        *,
        digest: str,
        key: bytes | None,
        timeout_s: float | None,
        clock: RedisClock,
        fields: dict[str, Any] | None = None,
        named: str | None = None,
    ) -> None:
        self.id, self.model, self.request, self.digest = job_id, model, request, digest
        self.named = named or model
        self.timeout_s = timeout_s
        self.mark = None if key is None else mark(key, job_id)
        self._fields = request.to_wire() if fields is None else fields
        self._key, self._clock, self._prepared_at = key, clock, time.monotonic()

    def like(self, job_id: str | None, request: GenerateRequest, digest: str) -> PreparedJob:
        """Another job, whose request has another prompt and seed; the parameters are not converted again."""
        job = PreparedJob(
            job_id or uuid.uuid4().hex,
            self.model,
            request,
            digest=digest,
            key=self._key,
            timeout_s=self.timeout_s,
            clock=self._clock,
            named=self.named,
            fields={**self._fields, "prompt": request.prompt, "seed": request.seed},
        )
        job.__dict__["size"] = self._size_without_prompt + len(json.dumps(request.prompt))
        job.__dict__["_size_without_prompt"] = self._size_without_prompt
        return job

    @functools.cached_property
    def wire(self) -> dict[str, Any]:
        """The request as it is sent, with its signature if there is a key.

        Read it when Redis' clock is known: the deadline is by that clock, which workers use too.
        """
        wire = self._fields
        if self.timeout_s is not None:
            left_s = self.timeout_s - (time.monotonic() - self._prepared_at)
            wire = {**wire, "expires_at": self._clock.now() + left_s}
        return wire if self._key is None else sign(self._key, self.id, self.model, wire)

    @functools.cached_property
    def size(self) -> int:
        """Bytes of the request as JSON, or a few more."""
        return len(json.dumps(self._fields)) + _ADDED_BYTES

    @functools.cached_property
    def _size_without_prompt(self) -> int:
        return self.size - len(json.dumps(self.request.prompt))

    @property
    def urgency(self) -> int:
        """Celery's number of the priority: 0 is the most urgent."""
        return keys.PRIORITIES[self.request.priority]

    def record(self) -> dict[Any, Any]:
        """The initial fields of the job's record."""
        record = {"state": "queued", "model": self.model, "submitted_at": f"{self._clock.now():.6f}"}
        if self.request.adapter is not None:
            record["adapter"] = self.request.adapter
        return record if self.mark is None else {**record, "mark": self.mark}

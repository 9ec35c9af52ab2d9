"""A job that has been checked and not been submitted."""

from __future__ import annotations

import functools
import json
import time
import uuid
from typing import Any

from headrace.client.wire import keys
from headrace.client.wire.requests import GenerateRequest
from headrace.client.wire.signing import mark, sign


class PreparedJob:
    """A job whose request has been checked and which has not been submitted.

    Attributes:
        id: the job id.
        model: the model whose queue the job goes to.
        digest: identifies the request, for a job id that the caller chose; else empty.
        wire: the request as it is sent, with its signature if there is a key.
        mark: shows in the job's record that its submitter has the key; None without a key.
    """

    def __init__(
        self,
        job_id: str,
        model: str,
        request: GenerateRequest,
        digest: str,
        key: bytes | None,
        wire: dict[str, Any] | None = None,
    ) -> None:
        self.id, self.model, self.request, self.digest = job_id, model, request, digest
        self.wire = self._unsigned = request.to_wire() if wire is None else wire
        self._key = key
        self.mark: str | None = None
        if key is not None:
            self.wire = sign(key, job_id, model, self.wire)
            self.mark = mark(key, job_id)

    def like(self, job_id: str | None, request: GenerateRequest, digest: str) -> PreparedJob:
        """Another job, whose request has another prompt and seed; the parameters are not converted again."""
        wire = {**self._unsigned, "prompt": request.prompt, "seed": request.seed}
        job = PreparedJob(job_id or uuid.uuid4().hex, self.model, request, digest, self._key, wire)
        job.__dict__["size"] = self._size_without_prompt + len(json.dumps(request.prompt))
        job.__dict__["_size_without_prompt"] = self._size_without_prompt
        return job

    @functools.cached_property
    def size(self) -> int:
        """Bytes of the request as JSON, to a few bytes."""
        return len(json.dumps(self.wire))

    @functools.cached_property
    def _size_without_prompt(self) -> int:
        return self.size - len(json.dumps(self.request.prompt))

    @property
    def urgency(self) -> int:
        """Celery's number of the priority: 0 is the most urgent."""
        return keys.PRIORITIES[self.request.priority]

    def record(self) -> dict[Any, Any]:
        """The initial fields of the job's record."""
        record = {"state": "queued", "model": self.model, "submitted_at": f"{time.time():.6f}"}
        return record if self.mark is None else {**record, "mark": self.mark}

"""The status page at `/`, files of this package without external resources, and the data of `/status.json`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from pathlib import Path
from typing import Any

from starlette.responses import Response

from headrace.client.http.auth import PAGE_FILES
from headrace.client.http.errors import ApiError
from headrace.client.http.jobs import JobRunner
from headrace.client.jobs.status import Status

#: Seconds between samples of the throughput; workers report their numbers at the same interval.
SAMPLE_INTERVAL_S = 2.0
#: Seconds of throughput that the chart shows.
CHART_SPAN_S = 600.0

_FOLDER = Path(__file__).parent
_HTML = (_FOLDER / "page.html").read_text()
_FILES = {path: (_FOLDER / path.removeprefix("/")).read_text() for path in PAGE_FILES}

HEADERS = {
    # The page may use its own files and send requests to this server; nothing else.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page() -> Response:
    """The HTML page. It contains no data, so it needs no key; its script fetches `/status.json` with one."""
    return Response(_HTML, media_type="text/html", headers=HEADERS)


def page_file(path: str) -> Response:
    """A style sheet or a script of the page, one of PAGE_FILES."""
    name = path.rstrip("/")
    return Response(_FILES[name], media_type=PAGE_FILES[name], headers=HEADERS)


class StatusReporter:
    """The data of `/status.json`: the current status, and the throughput of the last `CHART_SPAN_S` seconds.

    An open page costs Redis nothing: it shows the samples that are taken anyway.
    """

    def __init__(self, jobs: JobRunner) -> None:
        self._jobs = jobs
        self._rates: deque[tuple[float, float]] = deque(maxlen=round(CHART_SPAN_S / SAMPLE_INTERVAL_S))
        self._sample: tuple[float, Status] | None = None

    async def sample_forever(self) -> None:
        """Record the throughput periodically, until cancelled."""
        while True:
            self._sample = None
            with contextlib.suppress(ApiError):
                status = await self._jobs.status()
                self._sample = time.monotonic(), status
                rate = sum(worker.tokens_per_s for worker in status.workers)
                self._rates.append((round(status.at, 1), round(rate, 1)))
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    async def latest(self) -> Status:
        """The last sample, or the status now if there is none of the last seconds. Raises ApiError."""
        if self._sample is not None and time.monotonic() - self._sample[0] < 2 * SAMPLE_INTERVAL_S:
            return self._sample[1]
        return await self._jobs.status()

    async def report(self) -> dict[str, Any]:
        """Workers with their slots, queues, and (time, tokens per second) samples, by Redis' clock. Raises ApiError."""
        status = await self.latest()
        fields = status.model_dump(mode="json", exclude={"at", "redis"})
        return {"now": round(status.at, 1), **fields, "rates": list(self._rates)}

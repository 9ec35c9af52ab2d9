"""The status page at `/`, one HTML file without external resources, and the data of `/status.json`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
from collections import deque
from pathlib import Path
from typing import Any

from starlette.responses import Response

from headrace.client.http.errors import ApiError
from headrace.client.http.jobs import JobRunner

#: Seconds between samples of the throughput; workers report their numbers at the same interval.
SAMPLE_INTERVAL_S = 2.0
#: Seconds of throughput that the chart shows.
CHART_SPAN_S = 600.0

_HTML = (Path(__file__).parent / "page.html").read_text()


def _content_security_policy(html: str) -> str:
    """Allow the page its own script and styles, and requests to this server; nothing else."""

    def digest(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


HEADERS = {
    "content-security-policy": _content_security_policy(_HTML),
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def page() -> Response:
    """The HTML page. It contains no data, so it needs no key; its script fetches `/status.json` with one."""
    return Response(_HTML, media_type="text/html", headers=HEADERS)


class StatusReporter:
    """The data of `/status.json`: the current status, and the throughput of the last `CHART_SPAN_S` seconds."""

    def __init__(self, jobs: JobRunner) -> None:
        self._jobs = jobs
        self._rates: deque[tuple[float, float]] = deque(maxlen=round(CHART_SPAN_S / SAMPLE_INTERVAL_S))

    async def sample_forever(self) -> None:
        """Record the throughput periodically, until cancelled."""
        while True:
            with contextlib.suppress(ApiError):
                status = await self._jobs.status()
                rate = sum(worker.tokens_per_s for worker in status.workers)
                self._rates.append((round(status.at, 1), round(rate, 1)))
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    async def report(self) -> dict[str, Any]:
        """Workers with their slots, queues, and (time, tokens per second) samples, by Redis' clock. Raises ApiError."""
        status = await self._jobs.status()
        fields = status.model_dump(mode="json", exclude={"at", "redis"})
        return {"now": round(status.at, 1), **fields, "rates": list(self._rates)}

"""The page at `/`: what goes on, at a glance, and a prompt to try. One file that fetches nothing from elsewhere."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

from starlette.responses import Response

from client.aio import AsyncClient
from client.errors import MillraceError
from client.http.errors import translate
from client.status import Status

#: How often the workers are looked at: as often as they say what they do.
LOOK_S = 2.0
#: The chart goes back so far.
CHART_S = 600.0

_HTML = (Path(__file__).parent / "page.html").read_text()


def _policy(html: str) -> str:
    """What a browser may do with the page: run its own script, show its own styles, ask this server."""

    def digest(tag: str) -> str:
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


HEADERS = {"content-security-policy": _policy(_HTML), "x-content-type-options": "nosniff", "cache-control": "no-cache"}


def page() -> Response:
    """The page itself; it holds nothing that is anybody's, so that it needs no key."""
    return Response(_HTML, media_type="text/html", headers=HEADERS)


class Overview:
    """What `/status.json` tells, looked up in the background however many look at the page."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._status: Status | None = None
        self._fault: MillraceError | None = None
        self._rates: deque[tuple[float, float]] = deque(maxlen=round(CHART_S / LOOK_S))

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        try:
            self._status, self._fault = await self._client.status(), None
        except MillraceError as error:
            self._fault = error
            return
        rate = sum(worker.tokens_per_s for worker in self._status.workers)
        self._rates.append((round(time.time(), 1), round(rate, 1)))

    async def tell(self) -> dict[str, Any]:
        """Workers with their slots, queues, and tokens per second of the last ten minutes. Raises ApiError."""
        if self._status is None and self._fault is None:
            await self._look()
        if self._fault is not None or self._status is None:
            raise translate(self._fault or MillraceError("nothing is known yet"))
        return {"now": round(time.time(), 1), **self._status.model_dump(mode="json"), "rates": list(self._rates)}

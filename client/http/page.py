"""The page at `/`: what goes on, at a glance, and a prompt to try. One file that fetches nothing from elsewhere."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

from starlette.responses import Response

from headrace.client.http.errors import ApiError
from headrace.client.http.jobs import Gateway

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
    """What `/status.json` tells: the status, and tokens per second of the last minutes, noted whoever looks."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._rates: deque[tuple[float, float]] = deque(maxlen=round(CHART_S / LOOK_S))

    async def watch(self) -> None:
        """Note the rate again and again, until cancelled."""
        while True:
            with contextlib.suppress(ApiError):
                rate = sum(worker.tokens_per_s for worker in (await self._gateway.status()).workers)
                self._rates.append((round(time.time(), 1), round(rate, 1)))
            await asyncio.sleep(LOOK_S)

    async def tell(self) -> dict[str, Any]:
        """Workers with their slots, queues, and rates. Raises ApiError."""
        status = (await self._gateway.status()).model_dump(mode="json")
        return {"now": round(time.time(), 1), **status, "rates": list(self._rates)}

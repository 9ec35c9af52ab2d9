"""JSON for responses and events, encoded in a way that cannot fail."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.responses import JSONResponse


class JsonResponse(JSONResponse):
    """Starlette's response, for any content: see `encode_json`."""

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return encode_json(content, ensure_ascii=False).encode("utf-8", "replace")


def encode_json(content: Any, *, ensure_ascii: bool = True) -> str:
    """Content as JSON on one line. JSON has neither infinity nor NaN: they become null."""
    try:
        return json.dumps(content, ensure_ascii=ensure_ascii, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_finite(content), ensure_ascii=ensure_ascii, allow_nan=False, separators=(",", ":"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value

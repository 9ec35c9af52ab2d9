"""What of a result depends on when and where it was computed; everything else must not."""

from __future__ import annotations

from typing import Any

#: For pydantic's `exclude`. How much of a prompt was in a prefix cache depends on what else the worker has computed.
VARYING: dict[str, Any] = {"id": True, "timings": True, "usage": {"prompt_tokens_details": True}}

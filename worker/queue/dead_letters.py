"""The dead letter list in Redis: messages that were refused because they cannot be read, each with the reason."""

from __future__ import annotations

import json
import time
from typing import Any

from headrace.client.wire import keys


def dead_letter(connection: Any, queue: str, message: bytes, reason: str) -> None:
    """Append a refused message to the dead letter list. Raises redis.RedisError."""
    text = message[: keys.DEAD_TEXT_BYTES].decode(errors="replace")
    entry = {"reason": reason, "at": time.time(), "queue": queue, "bytes": len(message), "message": text}
    pipe = connection.pipeline()
    pipe.lpush(keys.dead(), json.dumps(entry))
    pipe.ltrim(keys.dead(), 0, keys.DEAD_ENTRIES - 1)
    pipe.expire(keys.dead(), keys.DEAD_TTL_S)
    pipe.execute()

"""Fixtures that every kind of test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from worker.embedded import EmbeddedRedis

# A developer's own settings must not reach the tests; and no test may go out to the hub.
for _name in [name for name in os.environ if name.startswith("MILLRACE_")]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real Redis server of our own, for the whole session. It fails, and never skips, where there is no server."""
    with EmbeddedRedis.ephemeral() as server:
        yield server.url

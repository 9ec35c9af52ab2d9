"""A Redis database that a test may flush."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from headrace.client.wire.redis import connect


@pytest.fixture
def url(redis_url: str) -> Iterator[str]:
    """A database of this test, which is empty at its end."""
    own = redis_url.replace("db=0", "db=12")
    yield own
    with connect(own) as connection:
        connection.flushdb()


@pytest.fixture
def connection(url: str) -> Iterator[redis.Redis]:
    with connect(url) as made:
        yield made

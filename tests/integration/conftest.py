"""A real worker process on a real Redis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from celery import Celery

from headrace.client import Client
from headrace.config import Settings, load_settings
from headrace.worker.celery import make_app
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess

Reference = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="session")
def settings(redis_url: str) -> Settings:
    return load_settings(redis_url=redis_url)


@pytest.fixture(scope="session")
def worker(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """`celery -A worker worker` with no flags, ready, forked from a warm process."""
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with WorkerProcess(log, HEADRACE_REDIS_URL=redis_url) as process:
        process.wait_ready()
        yield process


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings=settings) as made:
        yield made


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    """A Redis for the tests of one file, which may fill it, stop it or leave data in it."""
    with EmbeddedRedis.ephemeral() as own:
        yield own


@pytest.fixture
def own_server() -> Iterator[EmbeddedRedis]:
    """A Redis that the test may kill."""
    with EmbeddedRedis.ephemeral() as own:
        yield own


@pytest.fixture
def own_client(own_server: EmbeddedRedis) -> Iterator[Client]:
    with Client(redis_url=own_server.url) as made:
        yield made


@pytest.fixture
def app(server: EmbeddedRedis) -> Iterator[Celery]:
    """A Celery app that can send any message to the workers of the same file."""
    made = make_app(load_settings(redis_url=server.url))
    yield made
    made.close()


@pytest.fixture(scope="session")
def reference() -> Reference:
    """Computes greedy tokens after a prompt with transformers' `generate` on the bundled weights, in float64."""
    import torch
    from transformers import GPT2LMHeadModel

    from headrace.model.hub import DEMO

    gpt2 = GPT2LMHeadModel.from_pretrained(Path(DEMO), dtype=torch.float64).eval()

    def generate(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = gpt2.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=50256)
        return out[0, len(prompt) :].tolist()

    return generate

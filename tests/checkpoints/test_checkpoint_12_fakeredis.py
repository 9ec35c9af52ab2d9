"""Checkpoint 12 end to end without any Redis server: client, queue, worker and back over fakeredis.

fakeredis speaks the protocol on a TCP port of its own, and the worker runs in a thread of this process, with the same
pool, consumer and engine as `celery -A worker worker`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from celery.contrib.testing.worker import start_worker
from fakeredis import TcpFakeServer

from headrace.client import Client
from headrace.config import Settings, load_settings
from headrace.model import load_tokenizer
from headrace.worker.celery import make_app
from headrace.worker.jobs.pool import EnginePool
from tests.integration.conftest import Reference
from tests.integration.conftest import reference as reference  # the fixture
from tests.patience import PATIENCE_S


@pytest.fixture(scope="module")
def fake_settings() -> Iterator[Settings]:
    """Settings that point at a fakeredis server."""
    server = TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    server.daemon_threads = True  # or closing would wait for clients that stay
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield load_settings(redis_url=f"redis://127.0.0.1:{server.server_address[1]}/0", slots=8)
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def client(fake_settings: Settings) -> Iterator[Client]:
    app = make_app(fake_settings)
    with (
        start_worker(app, pool=EnginePool, concurrency=10, perform_ping_check=False, shutdown_timeout=30),
        Client(settings=fake_settings) as made,
    ):
        yield made
    app.close()


def test_hello_gives_the_ten_tokens_that_transformers_gives(client: Client, reference: Reference) -> None:
    result = client.submit("Hello.", max_tokens=10, temperature=0).result(timeout=PATIENCE_S)
    assert load_tokenizer("demo").encode("Hello.") == [15496, 13]
    assert result.choices[0].token_ids == reference([15496, 13], 10)
    assert result.text == load_tokenizer("demo").decode(reference([15496, 13], 10))
    assert result.text == '\n\n"I am not going to see,"'


def test_jobs_together_over_fakeredis_equal_transformers(client: Client, reference: Reference) -> None:
    prompts = ["The quick brown", "Once upon a time", "What is the answer to life, the universe, and everything?"]
    jobs = client.submit_many(prompts, max_tokens=10, temperature=0, ignore_eos=True)
    for prompt, job in zip(prompts, jobs, strict=True):
        assert job.result(PATIENCE_S).choices[0].token_ids == reference(load_tokenizer("demo").encode(prompt), 10)

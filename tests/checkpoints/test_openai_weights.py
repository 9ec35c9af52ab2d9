"""OpenAI's own weights give the texts that the specification names, through client, queue and worker.

They are looked for in the directory HEADRACE_TEST_MODELS (as <directory>/gpt2-medium) and in the local hub cache, and
never replaced by something that looks like them; the test summary says when they were not at hand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.client import Client
from headrace.model import ModelError
from headrace.model.hub import find_model
from headrace.model.weights import read_config
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.openai_weights


def gpt2_medium() -> Path | None:
    """Where the weights are, if they are at hand."""
    given = os.environ.get("TEST_MODELS_DIRECTORY")
    if given and (Path(given) / "gpt2-medium" / "config.json").exists():
        return Path(given) / "gpt2-medium"
    try:
        return find_model("gpt2-medium")
    except ModelError:
        return None


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = gpt2_medium()
    if folder is None:
        pytest.skip(
            "gpt2-medium is not at hand: set HEADRACE_TEST_MODELS or `hf download openai-community/gpt2-medium`"
        )
    assert read_config(folder / "config.json").n_layer == 24
    log = tmp_path_factory.mktemp("medium") / "worker.log"
    environment = {"HEADRACE_MODEL": str(folder), "HEADRACE_SERVED_NAME": "gpt2-medium"}
    with (
        EmbeddedRedis.ephemeral() as server,
        WorkerProcess(log, HEADRACE_REDIS_URL=server.url, **environment) as worker,
    ):
        worker.wait_ready()
        with Client(redis_url=server.url, model="gpt2-medium") as made:
            yield made


def test_hello(client: Client) -> None:
    result = client.submit("Hello.", max_tokens=10, temperature=0, echo=True).result(PATIENCE_S)
    assert result.text == "Hello. I'm a little late to the party, but"
    assert result.choices[0].token_ids == [15496, 13, 314, 1101, 257, 1310, 2739, 284, 262, 2151, 11, 475]


def test_the_answer(client: Client) -> None:
    prompt = "What is the answer to life, the universe, and everything?"
    result = client.submit(prompt, max_tokens=10, temperature=0).result(PATIENCE_S)
    assert result.text == "\n\nThe answer is that we are all one"

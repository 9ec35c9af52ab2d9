"""Several models: a worker of two, workers of one each, and models that are loaded and unloaded while jobs run."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from headrace.client import Client, InvalidRequest, Job
from headrace.client.wire import keys
from headrace.client.wire.requests import parse_request
from headrace.client.wire.results import Result
from headrace.config import load_settings
from headrace.worker.cli import main
from headrace.worker.engine.build import load_engine
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, paced, wait_until, worker_on
from tests.integration.servers import free_port
from tests.integration.test_probes import Probed
from tests.patience import PATIENCE_S
from tests.varying import VARYING

#: Several kinds of requests. Each is submitted twice, once for each model.
JOBS: list[dict[str, Any]] = [
    {
        "prompt": "The river " * (1 + number % 3) + str(number),
        "max_tokens": 30 + number,
        "temperature": 0.9 * (number % 2),
        "seed": number,
        "logprobs": 2,
        "ignore_eos": True,
    }
    for number in range(8)
]

Answers = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random weights, written by transformers."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(7)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=256)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Answers:
    """The results of the jobs if their model is the only one, computed one by one."""
    answers = {}
    for name, model in {"demo": "demo", "tiny": str(tiny)}.items():
        with load_engine(load_settings(model=model, threads=1)) as engine:
            answers[name] = [substance(engine.submit(parse_request(job)).result(PATIENCE_S)) for job in JOBS]
    return answers


def substance(result: Result) -> dict[str, Any]:
    return result.model_dump(exclude=VARYING)


def submit(client: Client, count: int) -> dict[str, list[Job]]:
    """Submit the first jobs, alternately for the two models."""
    mixed = client.submit_many([{**job, "model": name} for job in JOBS[:count] for name in ("demo", "tiny")])
    return {"demo": mixed[::2], "tiny": mixed[1::2]}


def answers_of(jobs: dict[str, list[Job]]) -> Answers:
    return {name: [substance(job.result(PATIENCE_S)) for job in mine] for name, mine in jobs.items()}


@pytest.fixture(scope="module")
def probed() -> Probed:
    return Probed(free_port())


@pytest.fixture(scope="module")
def both(
    server: EmbeddedRedis, tiny: Path, probed: Probed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WorkerProcess]:
    """A worker of both models that unloads one that is idle for two seconds."""
    log = tmp_path_factory.mktemp("both") / "worker.log"
    settings = {
        "HEADRACE_MODEL": f"demo,tiny={tiny}",
        "HEADRACE_IDLE_UNLOAD_S": "2",
        "HEADRACE_METRICS_PORT": probed.base.rpartition(":")[2],
    }
    with worker_on(server, log, **settings) as worker:
        worker.wait_ready()
        yield worker


@pytest.fixture
def client(server: EmbeddedRedis) -> Iterator[Client]:
    with Client(redis_url=server.url) as made:
        yield made


def count(worker: WorkerProcess, event: str, name: str) -> int:
    """How often the log contains an event of a model."""
    return len([line for line in worker.events(event) if line["model"] == name])


def test_a_job_gives_the_same_bits_whether_its_model_is_served_alone_or_beside_another(
    both: WorkerProcess, client: Client, alone: Answers
) -> None:
    assert count(both, "model.loaded", "tiny") == 0, "models that may be unloaded are loaded for their first job"
    assert answers_of(submit(client, len(JOBS))) == alone
    assert {result["model"] for result in alone["tiny"]} == {"tiny"}
    assert alone["demo"][0]["choices"][0]["token_ids"] != alone["tiny"][0]["choices"][0]["token_ids"]


def test_an_idle_model_is_unloaded_and_comes_back_for_the_next_job(
    both: WorkerProcess, client: Client, alone: Answers, probed: Probed
) -> None:
    first = client.submit(**JOBS[0], model="tiny").result(PATIENCE_S)

    for name in ("demo", "tiny"):
        wait_until(lambda name=name: count(both, "model.unloaded", name) == count(both, "model.loaded", name))
    wait_until(lambda: not any(worker.loaded for worker in client.status().workers))
    assert client.status().serves("tiny"), "it takes jobs all the same"
    assert probed.samples()["headrace_model_loaded"] == 0
    assert probed.get("/readyz") == (200, "ok\n")
    before = count(both, "model.loaded", "tiny")
    again = client.submit(**JOBS[0], model="tiny").result(PATIENCE_S)
    assert substance(again) == substance(first) == alone["tiny"][0]
    assert count(both, "model.loaded", "tiny") == before + 1
    text = probed.get("/metrics")[1]
    for model in ("demo", "tiny"):
        ended = re.search(rf'request_success_total{{finished_reason="length",model_name="{model}"}} (\d+)', text)
        assert ended
        assert int(ended[1]) >= 8


def test_an_unknown_model_is_refused_with_the_list_of_those_that_are_served(
    both: WorkerProcess,
    client: Client,
    server: EmbeddedRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InvalidRequest, match=r"model: got 'tyni'; expected one that is served: demo, tiny"):
        client.submit("Hello.", model="tyni")
    monkeypatch.setenv("HEADRACE_REDIS_URL", server.url)
    refused = CliRunner().invoke(main, ["generate", "Hello.", "--model", "tyni"])
    assert refused.exit_code == 3
    assert "no worker serves headrace.tyni" in refused.stderr
    assert f"start one with `HEADRACE_REDIS_URL='{server.url}' headrace up --model tyni`" in refused.stderr
    assert "Served there: demo, tiny" in refused.stderr
    done = CliRunner().invoke(main, ["generate", "Hello.", "--model", "tiny", "--max-tokens", "3", "--json"])
    assert '"model":"tiny"' in done.stdout
    assert CliRunner().invoke(main, ["status"], env={"HEADRACE_MODEL": "demo,tiny=/there"}).exit_code == 0
    assert CliRunner().invoke(main, ["status"], env={"HEADRACE_MODEL": "demo,tyni"}).exit_code == 3


def test_models_are_swapped_while_jobs_run_and_none_is_lost(
    own_server: EmbeddedRedis, own_client: Client, tiny: Path, alone: Answers, tmp_path: Path
) -> None:
    slow = {"HEADRACE_DRAFT_TOKENS": "0", "HEADRACE_SOFT_SHUTDOWN_S": "0"}

    def worker_of(model: str, log: str) -> WorkerProcess:
        return worker_on(own_server, tmp_path / log, patch=paced(0.03), HEADRACE_MODEL=model, **slow)

    def unfinished(name: str) -> int:
        return sum(job.status() in ("queued", "running") for job in jobs[name])

    with worker_of(f"demo,tiny={tiny}", "both.log") as first:
        first.wait_ready()
        jobs = submit(own_client, 4)
        wait_until(lambda: any(job.status() == "running" for job in jobs["demo"]))
        wait_until(lambda: any(job.status() == "running" for job in jobs["tiny"]))
        first.kill()
    assert min(unfinished("demo"), unfinished("tiny")) > 0, "it was killed in the middle"
    with worker_of(f"tiny={tiny}", "tiny.log") as second:
        second.wait_ready()
        mine = answers_of({"tiny": jobs["tiny"]})
        assert unfinished("demo"), "no worker serves their model, so they wait"
        late = [own_client.submit(**job, model="tiny") for job in JOBS + JOBS]
        wait_until(lambda: any(job.status() == "succeeded" for job in late))  # four at a time
        jobs["tiny"] += late
        second.signal(signal.SIGQUIT)  # running jobs are returned too
        assert second.wait() == 0
    assert unfinished("tiny")
    with worker_of("demo", "demo.log") as third:
        third.wait_ready()
        mine |= answers_of({"demo": jobs["demo"]})
        assert unfinished("tiny")
        own_client.submit(**JOBS[0], model="tiny")  # served within a day: it is known, and waits
    with worker_of(f"demo,tiny={tiny}", "again.log") as last:
        last.wait_ready()
        mine |= answers_of({"late": late})
        wait_until(lambda: not own_client.status().delivered)
    expected = {"demo": alone["demo"][:4], "tiny": alone["tiny"][:4], "late": alone["tiny"] * 2}
    assert mine == expected
    for name in ("demo", "tiny"):
        assert sum(map(own_client._redis.llen, keys.queue_lists(name))) == 0  # type: ignore[arg-type]

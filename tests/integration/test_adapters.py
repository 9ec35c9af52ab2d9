"""LoRA adapters from every way in, to a real worker with a directory of them."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from celery import Celery
from click.testing import CliRunner

from headrace.client import AsyncClient, Client, JobFailed
from headrace.client.wire import keys
from headrace.client.wire.celery import TASK_NAME
from headrace.worker.cli import main
from headrace.worker.redis_server import EmbeddedRedis
from tests.adapter_files import write_adapter
from tests.integration.http_server import HttpServer, events_of
from tests.integration.processes import WorkerProcess, wait_until, worker_on
from tests.patience import PATIENCE_S

PROMPT = "The river ran"
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the worker: two adapters, and one whose file is cut short."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "tone", 1)
    write_adapter(folder / "style", 2, rank=8, fan_in_fan_out=True)  # PEFT warns otherwise
    file = write_adapter(folder / "broken", 3) / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    return folder


@pytest.fixture(scope="module")
def worker(server: EmbeddedRedis, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    with worker_on(server, log, HEADRACE_ADAPTERS_DIR=str(adapters)) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def http(
    worker: WorkerProcess, server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpServer]:
    with HttpServer(tmp_path_factory.mktemp("http"), server.url) as process:
        yield process


@pytest.fixture
def api(http: HttpServer) -> Iterator[openai.OpenAI]:
    with http.openai() as made:
        yield made


@pytest.fixture
def client(worker: WorkerProcess, server: EmbeddedRedis) -> Iterator[Client]:
    with Client(redis_url=server.url) as made:
        yield made


@pytest.fixture(scope="module")
def texts(worker: WorkerProcess, server: EmbeddedRedis) -> dict[str | None, str]:
    """The text of each adapter, and of the model itself."""
    with Client(redis_url=server.url) as client:
        names = [None, "tone", "style"]
        jobs = client.submit_many([{"prompt": PROMPT, "adapter": name} for name in names], **GREEDY)
        found = {name: job.result(PATIENCE_S).text for name, job in zip(names, jobs, strict=True)}
    assert len(set(found.values())) == 3
    return found


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_the_tokens_are_those_of_peft(client: Client, adapters: Path) -> None:
    import peft
    import torch
    from transformers import GPT2LMHeadModel

    from headrace.model.hub import DEMO

    result = client.submit(PROMPT, adapter="style", logprobs=0, **GREEDY).result(PATIENCE_S)
    base = GPT2LMHeadModel.from_pretrained(Path(DEMO), dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(base, str(adapters / "style"), autocast_adapter_dtype=False).double().eval()
    ids = client.tokenize(PROMPT).tokens + result.choices[0].token_ids
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    start = len(ids) - GREEDY["max_tokens"]
    assert scores[start - 1 : -1].argmax(-1).tolist() == ids[start:]
    ours = [each.logprob for each in result.choices[0].logprobs or ()]
    theirs = [scores[at - 1, ids[at]].item() for at in range(start, len(ids))]
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_every_way_in_gives_the_same_text(
    client: Client, server: EmbeddedRedis, texts: dict[str | None, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts["tone"]

    async def asked() -> str:
        async with AsyncClient(redis_url=server.url) as other:
            return (await (await other.submit(PROMPT, adapter="tone", **GREEDY)).result(PATIENCE_S)).text

    assert asyncio.run(asked()) == expected
    job = client.submit(PROMPT, adapter="tone", stream=True, **GREEDY)
    assert "".join(event.text for event in job.stream(PATIENCE_S)) == expected
    assert [each.text for each in client.map([PROMPT] * 2, adapter="tone", **GREEDY)] == [expected] * 2
    monkeypatch.setenv("HEADRACE_REDIS_URL", server.url)
    options = ["--adapter", "tone", "--max-tokens", "12", "--temperature", "0", "--ignore-eos", "--json"]
    shown = CliRunner().invoke(main, ["generate", PROMPT, *options])
    assert json.loads(shown.stdout)["choices"][0]["text"] == expected
    table = tmp_path / "rows.csv"
    table.write_text(f"prompt,adapter\n{PROMPT},tone\n{PROMPT},\n")
    params = [f"-p{name}={json.dumps(value)}" for name, value in GREEDY.items()]
    out = tmp_path / "out.csv"
    done = CliRunner().invoke(main, ["batch", "-i", str(table), "-o", str(out), "--params-columns", "adapter", *params])
    assert done.exit_code == 0, done.output
    with out.open(newline="") as file:
        written = {row["custom_id"]: row["text"] for row in csv.DictReader(file)}
    assert written == {"row-1": expected, "row-2": texts[None]}


def test_scores_are_those_of_the_adapter(client: Client) -> None:
    plain, adapted = (
        client.score(PROMPT, " down to the sea", adapter=name, timeout=PATIENCE_S).logprob for name in (None, "tone")
    )
    assert plain != adapted
    scores = client.score_many([(PROMPT, " down to the sea")] * 2, adapter="tone")
    assert [each.logprob for each in scores] == [adapted] * 2


def test_streams_and_batches_over_http_name_the_adapter(
    http: HttpServer, api: openai.OpenAI, texts: dict[str | None, str]
) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    chunks = list(api.completions.create(model="tone", stream=True, **asked))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks) == texts["tone"]
    assert {chunk.model for chunk in chunks} == {"tone"}
    with (
        http.http() as plain,
        plain.stream("POST", "/execute", json={"prompt": PROMPT, "adapter": "style", **GREEDY}) as live,
    ):
        (_, started), *_, (name, ended) = events_of(live)
    assert json.loads(started)["model"] == "demo"
    assert json.loads(started)["adapter"] == json.loads(ended)["adapter"] == "style"
    assert (name, json.loads(ended)["choices"][0]["text"]) == ("end", texts["style"])
    bodies = [{"model": "tone"}, {"model": "demo"}, {"model": "demo", "adapter": "style"}, {"adapter": "broken"}]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {"prompt": PROMPT, **GREEDY, **body}}
        for i, body in enumerate(bodies)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = api.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch")
    batch = api.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    wait_until(lambda: api.batches.retrieve(batch.id).status in ("completed", "failed"))
    done = api.batches.retrieve(batch.id)
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 3, 1)  # type: ignore[union-attr]
    rows = [json.loads(line) for line in api.files.content(done.output_file_id or "").text.splitlines()]
    found = {row["custom_id"]: row["response"]["body"] for row in rows}
    assert [found[i]["model"] for i in "012"] == ["tone", "demo", "style"]
    assert [found[i]["choices"][0]["text"] for i in "012"] == [texts["tone"], texts[None], texts["style"]]


def test_a_broken_adapter_fails_its_jobs_alone(client: Client, http: HttpServer, texts: dict[str | None, str]) -> None:
    jobs = client.submit_many(
        [{"prompt": PROMPT, "adapter": name} for name in ("broken", "tone", "broken", None)], **GREEDY
    )
    for job in jobs[::2]:
        with pytest.raises(
            JobFailed, match=r"adapter 'broken' cannot be loaded: .*not a complete safetensors file"
        ) as failed:
            job.result(PATIENCE_S)
        assert failed.value.code == "adapter_failed"
    assert [job.result(PATIENCE_S).text for job in jobs[1::2]] == [texts["tone"], texts[None]]
    with http.http() as plain:
        answer = plain.post("/v1/completions", json={"prompt": PROMPT, "model": "broken"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "adapter_failed")
    assert str(Path.cwd().anchor + "tmp") not in answer.text, "paths of the worker are nobody else's affair"


@pytest.mark.parametrize(("name", "code"), [("nobody", "adapter_not_found"), ("../tone", "invalid_request")])
def test_a_name_that_another_program_sends_is_refused_by_the_worker(
    app: Celery, client: Client, name: str, code: str
) -> None:
    sent = app.send_task(
        TASK_NAME, args=[{"schema_version": 1, "prompt": "a", "adapter": name}], queue=keys.queue("demo")
    )
    wait_until(lambda: client._redis.exists(keys.result(sent.id)))
    with pytest.raises(JobFailed) as failed:
        client.job(sent.id).result(PATIENCE_S)
    assert failed.value.code == code
    if code == "adapter_not_found":
        assert "broken, style, tone" in failed.value.message


def test_what_runs_on_each_is_shown(client: Client, api: openai.OpenAI, server: EmbeddedRedis, adapters: Path) -> None:
    client.submit(PROMPT, adapter="style", **GREEDY).result(PATIENCE_S)

    def seen() -> dict[str, Any]:
        (record,) = client.status().workers
        return {each.name: each for each in record.adapters or ()}

    wait_until(lambda: seen()["style"].jobs)
    assert (seen()["style"].loaded, seen()["style"].rank) == (True, 8)
    assert seen()["style"].tokens % GREEDY["max_tokens"] == 0
    assert (seen()["broken"].loaded, seen()["broken"].jobs) == (False, 0)
    assert {model.id for model in api.models.list()} == {"demo", "tone", "style", "broken"}
    shutil.copytree(adapters / "tone", adapters / "later")  # while the worker runs
    wait_until(lambda: "later" in seen())
    assert client.submit(PROMPT, adapter="later", **GREEDY).result(PATIENCE_S).adapter == "later"
    wait_until(lambda: "later" in {model.id for model in api.models.list()})
    assert api.models.retrieve("later").to_dict()["parent"] == "demo"

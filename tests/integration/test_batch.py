"""Bulk: files and iterables in, results out, through a real Redis and a real worker."""

from __future__ import annotations

import functools
import gzip
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from headrace.client import Client, InvalidBatch, InvalidRequest, JobFailed, OutputRefused
from headrace.client.batch import window
from headrace.client.batch.items import BatchItem
from headrace.client.batch.window import Window
from headrace.client.wire import keys
from headrace.config import load_settings
from headrace.worker.cli import main
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.conftest import Reference
from tests.integration.processes import WorkerProcess, wait_until
from tests.patience import PATIENCE_S

HEADRACE = [sys.executable, "-m", "headrace.worker.cli", "batch"]
pytestmark = pytest.mark.usefixtures("worker")


def lines_of(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def texts_of(path: Path) -> dict[str, str]:
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in lines_of(path)}


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"custom_id": f"p{i}", "prompt": f"The river {i}", "max_tokens": 2 + i % 3} for i in range(count)]


def batch(redis_url: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "HEADRACE_REDIS_URL": redis_url}
    return subprocess.run([*HEADRACE, *arguments], env=environment, capture_output=True, timeout=PATIENCE_S, **options)


def test_rows_give_the_same_results_as_one_by_one(client: Client, tmp_path: Path, reference: Reference) -> None:
    rows = [{"custom_id": "greedy", "prompt": [15496, 13], "temperature": 0, "max_tokens": 6}, *prompts(40)]
    report = client.batch(iter(rows), tmp_path / "out.jsonl")
    assert (report.rows, report.succeeded, report.failed, report.left) == (41, 41, 0, 0)
    found = {row["custom_id"]: row["response"]["body"] for row in lines_of(tmp_path / "out.jsonl")}
    assert len(found) == 41
    assert report.completion_tokens == sum(body["usage"]["completion_tokens"] for body in found.values())
    with_tokenizer = client.submit([15496, 13], temperature=0, max_tokens=6).result(PATIENCE_S)
    assert with_tokenizer.choices[0].token_ids == reference([15496, 13], 6)
    assert found["greedy"]["choices"][0]["text"] == with_tokenizer.text
    one = found["p7"]
    assert (
        client.submit("The river 7", max_tokens=3, seed=one["seed"]).result(PATIENCE_S).text
        == one["choices"][0]["text"]
    )


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_resume_computes_what_is_missing_and_nothing_else(client: Client, tmp_path: Path, name: str) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / name
    client.batch(prompts(30), whole)
    client.batch(prompts(30), out)
    before = lines_of(out)
    data = out.read_bytes()
    dice = random.Random(1)
    for _ in range(3):
        out.write_bytes(data[: dice.randrange(len(data))])
        report = client.batch(prompts(30), out, resume=True)
        rows = lines_of(out)
        assert sorted(row["custom_id"] for row in rows) == sorted(f"p{i}" for i in range(30))
        assert texts_of(out) == texts_of(whole)
        assert rows[: report.before] == before[: report.before]
        assert report.before + report.succeeded == 30
    assert client.batch(prompts(30), out, resume=True).succeeded == 0
    assert not (tmp_path / f"{name}.run").exists()


def test_a_resumed_run_finds_the_jobs_of_the_one_that_died(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    class Killed(BaseException):
        pass

    def die(report: Any) -> None:
        if report.succeeded:
            raise Killed

    with pytest.raises(Killed):
        client.batch(prompts(30), out, on_progress=die)
    run = json.loads((tmp_path / "out.jsonl.run").read_text())["run"]
    client.batch(prompts(30), out, resume=True)
    named = {row["response"]["request_id"] for row in lines_of(out)}
    assert {job_id.split(".")[0] for job_id in named} == {run}
    assert len(named) == 30


def test_only_failures_are_computed_again(client: Client, tmp_path: Path) -> None:
    out, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    rows = [*prompts(3), {"custom_id": "long", "prompt": "a", "max_tokens": 5000}]
    report = client.batch(rows, out, errors=errors)
    assert report.failures == {"context_length_exceeded": 1}
    assert [row["custom_id"] for row in lines_of(errors)] == ["long"]
    with pytest.raises(OutputRefused, match="exists"):
        client.batch(rows, out, errors=errors)
    report = client.batch(rows, out, errors=errors, resume=True)
    assert (report.before, report.failed_before) == (4, 1)
    report = client.batch(rows, out, errors=errors, retry_errors=True)
    assert (report.before, report.failed) == (3, 1)
    assert [row["custom_id"] for row in lines_of(errors)] == ["long"]
    transient = {"id": "batch_req_", "custom_id": "p3", "response": None, "error": {"code": "cancelled", "message": ""}}
    with out.open("a") as file:
        file.write(json.dumps(transient) + "\n")
    report = client.batch(prompts(4), out, retry_errors=True)
    assert (report.before, report.succeeded) == (3, 1)
    assert set(texts_of(out)) == {"p0", "p1", "p2", "p3"}


def test_an_output_of_another_input_is_refused(client: Client, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    client.batch(prompts(2), out)
    before = out.read_bytes()
    with pytest.raises(InvalidBatch, match="another request"):
        client.batch(prompts(3), out, resume=True, params={"temperature": 0})
    assert out.read_bytes() == before
    other = [{"custom_id": "other", "prompt": "a"}]
    with pytest.raises(OutputRefused, match=r"belongs to another run: .* none of its 2 requests.*--overwrite"):
        client.batch(other, out, resume=True)
    assert out.read_bytes() == before
    assert client.batch(prompts(3), out, overwrite=True, params={"temperature": 0}).succeeded == 3


def test_with_ordered_rows_are_written_in_order(client: Client, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "max_tokens": 200 if i == 0 else 1, "ignore_eos": True} for i in range(40)]
    client.batch(rows, tmp_path / "out.jsonl", ordered=True, max_inflight=16)
    assert [row["custom_id"] for row in lines_of(tmp_path / "out.jsonl")] == [f"row-{i}" for i in range(1, 41)]
    client.batch(rows, tmp_path / "other.jsonl", max_inflight=16)
    assert lines_of(tmp_path / "other.jsonl")[0]["custom_id"] != "row-1"


def test_a_queue_that_is_full_is_waited_for(redis_url: str, tmp_path: Path) -> None:
    with Client(settings=load_settings(redis_url=redis_url, max_queue=3)) as narrow:
        assert narrow.batch(prompts(40), tmp_path / "out.jsonl").succeeded == 40


def test_jobs_that_redis_lost_are_queued_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "RESUBMIT_S", 0.1)
    with EmbeddedRedis.ephemeral() as server, Client(redis_url=server.url) as client:
        row = BatchItem(1, "a", {"prompt": "a"}, "")
        counts: list[int] = []

        class Enough(Exception):
            pass

        def tick() -> None:
            counts.append(client.status().queues[0].bulk + client.status().queues[0].normal)
            if counts.count(1) == 1:
                client._redis.flushdb()  # like a restart of Redis without its file
            elif counts.count(1) > 2:
                raise Enough

        under_test: Window[BatchItem] = Window(client, tick=tick)
        with pytest.raises(Enough):
            list(under_test.run([(row, client.submitter.prepare({"prompt": "a", "id": "a"}))]))
        assert counts[0] == 1
        assert set(counts) <= {0, 1}  # and never twice


class Scalar:
    """A value as a pyarrow array returns it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def as_py(self) -> Any:
        return self._value


def test_map_returns_results_in_order_and_reads_within_its_window(client: Client) -> None:
    read = []

    def column() -> Iterator[Any]:
        for number in range(60):
            read.append(number)
            yield Scalar(f"The river {number}") if number % 2 else f"The river {number}"

    given = 0
    for number, result in enumerate(client.map(column(), max_inflight=10, max_tokens=2, temperature=0)):
        given += 1
        assert len(read) - number <= 10 + 1
        if number in (0, 33):
            assert (
                result.text == client.submit(f"The river {number}", max_tokens=2, temperature=0).result(PATIENCE_S).text
            )
    assert given == 60


class Column:
    """A column of a table: it has a length, can be indexed, and can be iterated repeatedly."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, place: int) -> Any:
        return self._values[place]


def test_columns_of_tables_are_accepted(client: Client, tmp_path: Path) -> None:
    import numpy as np

    texts = ["Hello.", "The river"]
    columns = {
        "datasets": Column(texts),
        "pandas": Column(np.array(texts, dtype=object)),
        "pyarrow": Column([Scalar(text) for text in texts]),
        "numpy": np.array(texts),
        "tokens": np.array([[15496, 13], [464, 7850]]),
    }
    options = {"max_tokens": 3, "temperature": 0}
    expected = [client.submit(text, **options).result(PATIENCE_S).text for text in texts]
    for name, column in columns.items():
        assert [result.text for result in client.map(column, **options)] == expected, name
        client.batch(column, tmp_path / name, params=options)
        assert list(texts_of(tmp_path / name).values()) in (expected, expected[::-1]), name


def test_map_raises_at_the_prompt_that_fails(client: Client) -> None:
    rows: list[Any] = ["a", {"prompt": "b", "max_tokens": 5000}, {"prompt": "c", "top_p": 7}, "d"]
    results = client.map(rows, max_tokens=1)
    assert next(results).text is not None
    with pytest.raises(JobFailed, match="context_length_exceeded"):
        next(results)
    found = list(client.map(rows, max_tokens=1, return_exceptions=True))
    assert isinstance(found[1], JobFailed)
    assert isinstance(found[2], InvalidRequest)
    assert found[2].field == "prompts[2].top_p"
    assert found[3].usage.completion_tokens == 1
    for wrong in ("text", {"prompt": "a"}, 7):
        with pytest.raises(InvalidRequest, match="prompts"):
            client.map(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="max_inflight"):
        client.map(["a"], max_inflight=0)


def test_jobs_that_map_leaves_behind_are_cancelled(client: Client) -> None:
    long = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "priority": "bulk"}
    results = client.map([{"prompt": "a", "max_tokens": 1}, *[long] * 300])
    next(results)
    results.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + PATIENCE_S
    while client.status().queues[0].bulk or client.status().delivered:
        assert time.monotonic() < deadline, client.status()
        time.sleep(0.05)


def test_jobs_that_redis_lost_do_not_prevent_cancelling_the_others(redis_url: str) -> None:
    class Enough(Exception):
        pass

    def tick() -> None:
        raise Enough

    ids = [f"left-behind:{number}" for number in range(3)]
    with Client(redis_url=redis_url, model="left-behind") as own:
        under_test: Window[str] = Window(own, tick=tick)
        with pytest.raises(Enough):
            list(under_test.run((name, own.submitter.prepare({"prompt": "a", "id": name})) for name in ids))
        own._redis.delete(keys.job(ids[1]))
        under_test.drop()
        assert [bool(own._redis.exists(keys.cancel(name))) for name in ids] == [True, False, True]


# --- the command ---------------------------------------------------------------------------------------------------


def test_standard_input_goes_to_standard_output(redis_url: str) -> None:
    lines = gzip.compress(b"Hello.\n\nThe river\n")
    done = batch(
        redis_url, "-i", "-", "-o", "-", "--text", "--ordered", "-p", "max_tokens=3", "-p", "stop=x", input=lines
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["custom_id"] for row in rows] == ["row-1", "row-3"]
    assert rows[0]["response"]["body"]["usage"]["completion_tokens"] <= 3
    said = done.stderr.decode()
    assert "Rows: 2 computed, 0 failed; 2 in the input" in said
    assert "Generation: " in said


def test_the_exit_code_is_that_of_the_result(redis_url: str, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", str(tmp_path / "out.jsonl")
    source.write_text('{"prompt": "a", "max_tokens": 5000}\n{"prompt": "b"}\n')
    done = batch(redis_url, "-i", str(source), "-o", out, "--json")
    assert done.returncode == 1
    summary = json.loads(done.stdout)
    assert summary["failures"] == {"context_length_exceeded": 1}
    assert (summary["rows"], summary["succeeded"], summary["left"]) == (2, 1, 0)
    assert "1 context_length_exceeded; see" in done.stderr.decode()
    done = batch(redis_url, "-i", str(source), "-o", out)
    assert done.returncode == 2
    assert "--resume" in done.stderr.decode()


def test_every_fault_is_listed_and_nothing_is_queued(client: Client, redis_url: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b", "top_p": 7}\nHello.\n{"prompt": "c", "model": "gpt-5"}\n')
    done = batch(redis_url, "-i", str(source), "-o", str(tmp_path / "out.jsonl"))
    assert done.returncode == 2
    said = done.stderr.decode()
    for part in (
        "line 2: top_p: got 7",
        "line 3: line: got invalid",
        "line 4: model: got 'gpt-5'; expected one that",
    ):
        assert part in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
    assert client.status().queues[0].total == 0


def test_a_dry_run_counts_and_estimates_and_writes_nothing(redis_url: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [{"prompt": [1] * (i % 7 + 1), "max_tokens": 3} for i in range(300)] + [{"prompt": "a", "max_tokens": 5000}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = batch(redis_url, "-i", str(source), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["rows"] == 301
    assert said["prompt_tokens"] == sum(i % 7 + 1 for i in range(300)) + 1
    assert said["longest_prompt"] == 7
    assert said["most_new_tokens"] == 900
    assert said["too_long"] == 1
    assert said["rows_measured"] == 128
    assert said["seconds"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_waiting_behind_jobs_of_others_is_said_once(
    client: Client, redis_url: str, tmp_path: Path, worker: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (window, importlib.import_module("headrace.worker.cli.generate")):
        monkeypatch.setattr(module, "NOTICE_S", 0.1)
    monkeypatch.setenv("HEADRACE_REDIS_URL", redis_url)
    told: list[str] = []
    with worker.slowly(), ThreadPoolExecutor(1) as thread:
        client.submit_many(["Hello."] * 150, max_tokens=10, ignore_eos=True)
        running = thread.submit(client.batch, prompts(3), tmp_path / "out.jsonl", notify=told.append)
        done = CliRunner().invoke(main, ["generate", "Hi", "--max-tokens", "2"])
        assert running.result(PATIENCE_S).succeeded == 3
    lines = [*told, *(line for line in done.stderr.splitlines() if "behind" in line)]
    counts = [re.fullmatch(r"waiting behind (\d+) jobs of others", line) for line in lines]
    assert [found is not None and 20 <= int(found[1]) <= 154 for found in counts] == [True, True], lines


def test_ctrl_c_leaves_jobs_queued_or_cancels_them_and_loses_nothing(
    redis_url: str, tmp_path: Path, worker: WorkerProcess
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in prompts(200)))
    command = [*HEADRACE, "-i", str(source), "-o", str(out), "--max-inflight", "16"]
    shown = f"headrace batch -i {source} -o {out} --max-inflight 16"
    environment = {**os.environ, "HEADRACE_REDIS_URL": redis_url}
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, preexec_fn=heed)
    wait_until(lambda: out.exists() and out.stat().st_size > 0)
    with worker.slowly():
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=PATIENCE_S)[1].decode()
    assert process.returncode == 130
    assert re.search(rf"jobs stay in the queue .*; resume with\n  {re.escape(shown)} --resume\n", said), said
    assert said.endswith(f"to cancel these jobs:\n  {shown} --cancel\n")
    before = len(lines_of(out))
    assert 0 < before < 200
    # On a terminal, where the keyboard sends the signal.
    with worker.slowly():
        for _ in range(3):  # it asks nothing if no job is queued just then
            keyboard, terminal = os.openpty()
            process = subprocess.Popen(
                [*command, "--resume"], env=environment, preexec_fn=functools.partial(os.login_tty, terminal)
            )
            os.close(terminal)
            wait_until(lambda count=before: len(lines_of(out)) > count)  # type: ignore[misc]
            os.write(keyboard, b"\x03")
            try:
                said = read_until(keyboard, "Cancel these jobs?")
                break
            except OSError:  # the process has ended
                os.close(keyboard)
                process.wait(PATIENCE_S)
                before = len(lines_of(out))
        assert f"{shown} --resume" in " ".join(said.split())
        os.write(keyboard, b"y\n")
        assert re.search(r"\b([1-9]|1[0-6]) jobs were cancelled", read_until(keyboard, "were cancelled"))
        assert process.wait(PATIENCE_S) == 130
    os.close(keyboard)
    before = len(lines_of(out))
    again = batch(redis_url, "-i", str(source), "-o", str(out), "--cancel")
    assert b"0 jobs were cancelled" in again.stderr
    done = batch(redis_url, "-i", str(source), "-o", str(out), "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["before"] == before
    assert len(texts_of(out)) == 200


def read_until(keyboard: int, words: str) -> str:
    """What a terminal shows until these words."""
    said = ""
    while words not in said:
        said += os.read(keyboard, 4096).decode(errors="replace")
    return said

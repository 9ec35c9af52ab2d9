"""The commands of the first ten minutes, as real processes without any setting, in any order."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from headrace.client import Client
from headrace.client.wire.redis import answers
from headrace.config.settings import DEFAULT_REDIS_URL
from headrace.model.hub import DEMO
from headrace.model.kernels.object_cache import cache_directory
from headrace.worker.child_processes import die_with_parent
from headrace.worker.cli import main
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, wait_until
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.skipif(
    answers(DEFAULT_REDIS_URL), reason=f"a Redis of this machine answers at {DEFAULT_REDIS_URL}, and would be used"
)

JOB = {"max_tokens": 5, "temperature": 0}
TEXT = '\n\n"I am'


class Process:
    """A command of a user whose home is in `place`."""

    def __init__(self, place: Path, name: str, *command: str, **settings: str) -> None:
        self.out, self.err = (place / f"{name}-{len(list(place.iterdir()))}.{stream}" for stream in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self._process = subprocess.Popen(
                die_with_parent([sys.executable, *command]),
                env={**environment(place), **settings},
                stdout=out,
                stderr=err,
            )

    def said(self) -> str:
        return self.out.read_text() + self.err.read_text()

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.said() or self._process.poll() is not None)
        assert words in self.said(), self.said()

    def end(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(PATIENCE_S)

    def wait(self) -> int:
        return self._process.wait(PATIENCE_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def started(place: Path, name: str, *command: str, **settings: str) -> Iterator[Process]:
    process = Process(place, name, *command, **settings)
    try:
        yield process
    finally:
        process.kill()


def environment(place: Path) -> dict[str, str]:
    """The environment of a new user, with the kernel cache of the other tests."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HEADRACE_", "XDG_"))}
    cache = str(cache_directory().parent)
    return {**kept, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "XDG_CACHE_HOME": cache}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a temporary directory with long names; this process is the same user."""
    place = tmp_path / ("a-long-name-" * 8)
    for name in ("home", "tmp"):
        (place / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(place / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_directory().parent))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    return place


def up(place: Path, **settings: str) -> AbstractContextManager[Process]:
    return started(place, "up", "-m", "headrace.worker.cli", "up", **settings)


def serve(place: Path) -> AbstractContextManager[Process]:
    return started(place, "serve", "-m", "headrace.worker.cli", "serve", "--port", "0")


def run(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headrace.worker.cli", *command],
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def complete(server: Process) -> httpx.Response:
    """A request to a server that was started."""
    server.wait_for("headrace serves")
    (url,) = re.findall(r"headrace serves (http://\S+)/v1 ", server.said())
    return httpx.post(f"{url}/v1/completions", json={"model": "demo", "prompt": "Hello.", **JOB}, timeout=PATIENCE_S)


def test_serve_before_up(place: Path) -> None:
    with serve(place) as server:
        early = complete(server)
        assert early.status_code == 503
        assert "the queue cannot be reached; try again later, or on the server run `headrace up`" in early.text
        with up(place) as worker:
            worker.wait_for("worker.ready")
            # The server remembers for a second or two that there was no worker.
            wait_until(lambda: "no_worker" not in complete(server).text)
            late = complete(server)
            assert late.status_code == 200, late.text
            assert late.json()["choices"][0]["text"] == TEXT
            assert worker.end() == 0


def test_up_before_everything_else(place: Path) -> None:
    """`serve`, `status`, `generate`, `batch` and a second worker use the Redis and the worker of `up`."""
    assert "start it and a worker with `headrace up`, or" in run(place, "status").stderr
    with up(place, HEADRACE_LOG_FORMAT="console", HEADRACE_SLOTS="1") as worker:
        worker.wait_for(' (started here); next, in another terminal: `headrace generate "Hello."`')
        assert re.fullmatch(r"(headrace: loading .*\n)?headrace: ready, model demo, Redis at unix:.*\n", worker.said())
        with serve(place) as server:
            answer = complete(server)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == TEXT
        assert run(place, "status").returncode == 0
        generated = run(place, "generate", "Hello.", "--max-tokens", "5", "--temperature", "0")
        assert (generated.returncode, generated.stdout) == (0, TEXT + "\n")
        assert "starting one" not in generated.stderr
        (place / "in.jsonl").write_text('{"prompt": "Hello."}\n')
        batch = run(place, "batch", "-i", str(place / "in.jsonl"), "-o", str(place / "out.jsonl"))
        assert batch.returncode == 0, batch.stderr
        assert "starting one" not in batch.stderr
        with WorkerProcess(place / "second.log", **environment(place)) as second:
            second.wait_ready()
            assert not second.events("redis.embedded")
            with Client() as client:
                wait_until(lambda: len(client.status().workers) == 2)
                assert client.submit("Hello.", **JOB).result(PATIENCE_S).text == TEXT
        with Client() as client:
            jobs = client.submit_many(["Hello."] * 20, max_tokens=100, ignore_eos=True)
            wait_until(lambda: any(job.status() == "running" for job in jobs))
        assert worker.end() == 0
    assert "stopping; jobs that run are finished first: 1; those that wait return to the queue:" in worker.said()
    assert re.search(r"stopped; .* jobs for demo remain queued: `headrace up` computes them\n$", worker.said())
    assert "shutdown" not in worker.said()
    assert not list((place / "tmp").iterdir())


EARLY = """
    import client, time
    while True:
        try:
            job = client.submit("Hello.", max_tokens=5, temperature=0)
            break
        except client.RedisUnreachable as error:
            print(error, flush=True)
            time.sleep(0.1)
    print(repr(job.result(timeout=60).text))
    result = client.signature("Hello.", max_tokens=5, temperature=0).apply_async()
    print(repr(result.get(timeout=60)["choices"][0]["text"]))
"""


def test_a_script_and_a_worker_before_up(place: Path) -> None:
    """`up` uses the embedded Redis of a worker that runs."""
    (place / "early.py").write_text(textwrap.dedent(EARLY))
    with started(place, "script", str(place / "early.py"), PYTHONPATH=os.getcwd()) as script:
        script.wait_for("cannot be reached")
        with WorkerProcess(place / "first.log", **environment(place)) as first:
            first.wait_for("redis.embedded")
            with up(place) as second:
                assert script.wait() == 0
                assert script.said().splitlines()[-2:] == [repr(TEXT)] * 2
                second.wait_for("worker.ready")
                assert "redis.embedded" not in second.said()
                assert second.end() == 0


def test_two_workers_at_the_same_time(place: Path) -> None:
    """One starts the Redis, and the other waits for it."""
    with (
        WorkerProcess(place / "one.log", **environment(place)) as one,
        WorkerProcess(place / "two.log", **environment(place)) as two,
    ):
        one.wait_ready()
        two.wait_ready()
        assert len(one.events("redis.embedded") + two.events("redis.embedded")) == 1


def test_a_worker_follows_a_redis_that_moves(place: Path) -> None:
    with (
        EmbeddedRedis(socket=place.parent / "one") as server,
        WorkerProcess(place / "worker.log", **environment(place)) as worker,
        Client() as client,
    ):
        worker.wait_ready()
        assert client.submit("Hello.", **JOB).result(PATIENCE_S).text == TEXT
        server.stop()
        with EmbeddedRedis(socket=place.parent / "two"):
            assert client.submit("Hello.", **JOB).result(PATIENCE_S).text == TEXT
            assert worker.alive


def broken(place: Path) -> Path:
    """The bundled model with truncated weights."""
    folder = place / "broken"
    shutil.copytree(DEMO, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return folder


@pytest.mark.parametrize("kind", ["missing", "empty", "no model", "broken"])
def test_a_model_that_cannot_be_loaded_is_reported_in_one_sentence(place: Path, kind: str) -> None:
    model, reason = {
        "missing": (place / "nowhere", "there is no such directory"),
        "empty": (place / "home", "config.json: there is no such file"),
        "no model": (place / "other", "config.json: model_type is 'llama'; the supported families are gpt2"),
        "broken": (place / "broken", "not a complete safetensors file"),
    }[kind]
    if kind == "broken":
        broken(place)
    elif kind == "no model":
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    validated = CliRunner().invoke(main, ["validate", "--model", str(model)])
    assert validated.exit_code == 1
    assert validated.stdout == ""
    (line,) = validated.stderr.splitlines()
    assert line.startswith("headrace: ")
    assert reason in line
    if kind in ("empty", "no model"):
        return  # for a worker they are as "broken": it finds the directory, and loads torch to read it
    with up(place, HEADRACE_MODEL=str(model)) as worker:
        assert worker.wait() not in (0, None)
        assert worker.out.read_text() == ""
        last = worker.err.read_text().splitlines()[-1]
        assert last.startswith("headrace: ")
        assert reason in last
        assert "Traceback" not in worker.said()

"""Prompts, passwords and keys appear only where they must."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import redis

from headrace.client import Client, HeadraceError
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.config import load_settings
from headrace.worker.celery import make_app
from tests.integration.processes import WorkerProcess, wait_until
from tests.integration.servers import redis_on_a_port
from tests.patience import PATIENCE_S

PROMPT, PASSWORD, KEY, WRONG_KEY = (
    "Zanzibar-prompt-4417",
    "Zanzibar-password-9025",
    "Zanzibar-signing-key-3861-and-some-more",
    "Zanzibar-wrong-key-1204-and-some-more-of-it",
)
MARKERS = (PROMPT, PASSWORD, KEY, WRONG_KEY)
LONG = {"max_tokens": 1000, "ignore_eos": True}


def forms(marker: str) -> Iterator[str]:
    """The marker, and its fragments in base64 at each alignment."""
    yield marker
    for shift in range(3):
        code = base64.b64encode(b"x" * shift + marker.encode()).decode()
        yield code[4:-4]
    yield marker.encode().hex()


def assert_clean(text: str, where: str) -> None:
    for marker in MARKERS:
        for form in forms(marker):
            at = text.find(form)
            assert at < 0, f"{where} shows {marker}: {text[max(0, at - 300) : at + 200]}"


class Ear(threading.Thread):
    """Records everything that is published to Celery's events."""

    def __init__(self, connection: redis.Redis) -> None:
        super().__init__(daemon=True)
        self.heard: list[str] = []
        self._listener = connection.pubsub(ignore_subscribe_messages=True)
        self._listener.psubscribe("headrace:/0.celeryev/*")

    def run(self) -> None:
        with contextlib.suppress(redis.RedisError, OSError, ValueError):
            for message in self._listener.listen():
                envelope = json.loads(message["data"])
                self.heard.append(json.dumps({**envelope, "body": base64.b64decode(envelope["body"]).decode()}))


def ended(job: Any, error: io.StringIO) -> None:
    """Wait for a job, and record the text of its error."""
    try:
        job.result(PATIENCE_S)
    except HeadraceError as failure:
        print(repr(failure), failure, file=error)


def everything_that_can_happen(place: str, worker: WorkerProcess, errors: io.StringIO) -> None:
    """Cause success, failures of all kinds, bad signatures, cancelling, lost connections, a full Redis."""
    with Client(settings=load_settings(redis_url=place, signing_key=KEY)) as client:
        print(client.settings, repr(client.settings), file=errors)
        for request in ({"top_p": 7}, {"stop": [""]}, {"max_tokenz": 1}, {"schema_version": 3}):
            with pytest.raises(HeadraceError) as refused:
                client.submit(PROMPT, **request)
            print(refused.value, file=errors)
        jobs = [client.submit(PROMPT, max_tokens=3), *client.submit_many([PROMPT] * 3, max_tokens=3)]
        jobs.append(client.submit(PROMPT + " and on" * 2000))  # longer than the model reads
        jobs += client.submit_many([{"prompt": PROMPT, "stop_token_ids": [60_000]}] * 2)
        jobs.append(client.submit(PROMPT, timeout_s=0.001))
        for job in jobs:
            ended(job, errors)
        connection = connect(place)
        with worker.slowly():
            cancelled = [client.submit(PROMPT, **LONG), *client.submit_many([PROMPT] * 2, **LONG)]
            wait_until(lambda: cancelled[0].status() == "running")
            for job in cancelled:
                job.cancel()
                ended(job, errors)
            middling = {**LONG, "max_tokens": 200}
            running = [client.submit(PROMPT, **middling), *client.submit_many([PROMPT] * 2, **middling)]
            wait_until(lambda: running[0].status() == "running")
            connection.config_set("maxmemory", "1")
            connection.client_kill_filter(_type="normal", skipme=True)
        time.sleep(2)
        connection.config_set("maxmemory", "0")
        for job in running:
            ended(job, errors)
    for key in (None, WRONG_KEY):
        with Client(settings=load_settings(redis_url=place, signing_key=key)) as stranger:
            for job in (stranger.submit(PROMPT), *stranger.submit_many([PROMPT] * 2)):
                ended(job, errors)
            stranger._app.send_task("headrace.generate", args=[{"prompt": PROMPT}], argsrepr="-", compression="zlib")
            stranger._app.send_task("headrace.unheard", args=[{"prompt": PROMPT}], argsrepr="-")
            stranger._app.send_task("headrace.generate", args=[{"prompt": PROMPT}, 2, 3], argsrepr="-")
    with pytest.raises(HeadraceError) as unreachable:
        Client(redis_url=place.replace(place.split(":")[-1], "1/0")).submit(PROMPT)
    print(unreachable.value, repr(unreachable.value), file=errors)


def test_prompts_and_secrets_appear_nowhere_else(tmp_path: Path) -> None:
    errors, spoken = io.StringIO(), io.StringIO()
    log = tmp_path / "worker.log"
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(redis_on_a_port(tmp_path, "--requirepass", PASSWORD))
        place = f"redis://:{PASSWORD}@localhost:{port}/0"
        environment = {"HEADRACE_REDIS_URL": place, "HEADRACE_SIGNING_KEY": KEY, "HEADRACE_LOG_LEVEL": "debug"}
        worker = WorkerProcess(log, "-E", "-l", "DEBUG", HEADRACE_SLOTS="2", **environment)
        with worker, redirect_stderr(spoken):
            worker.wait_ready()
            ear = Ear(connect(place))
            ear.start()
            everything_that_can_happen(place, worker, errors)
            app = make_app(load_settings(redis_url=place))
            with Client(settings=load_settings(redis_url=place, signing_key=KEY)) as client, worker.slowly():
                jobs = [client.submit(PROMPT, **LONG), *client.submit_many([PROMPT] * 8, **LONG)]
                wait_until(lambda: jobs[0].status() == "running")
                inspect = app.control.inspect(timeout=PATIENCE_S, limit=1)
                for ask in (inspect.active, inspect.reserved, inspect.scheduled, inspect.stats, inspect.conf):
                    answer = ask()
                    assert answer, ask
                    assert_clean(json.dumps(answer, default=str), f"inspect {ask.__name__}")
                assert_clean(str(inspect.report()), "inspect report")
                assert_clean(str(inspect.query_task(jobs[0].id)), "inspect query_task")
                assert worker.process is not None
                for process in (worker.process.pid, os.getpid()):
                    assert_clean(Path(f"/proc/{process}/cmdline").read_text(), "the process title")
                for job in jobs:
                    job.cancel()
                    ended(job, errors)
            app.close()
            connection = connect(place)
            records = [name for name in connection.scan_iter(count=1000) if connection.type(name) == "hash"]
            assert any(name.startswith(keys.job("")) for name in records)
            for name in records:
                if not name.startswith((keys.checkpoint(""), keys.unacked())):
                    assert_clean(name + json.dumps(connection.hgetall(name)), name)
            events = "\n".join(ear.heard)
            assert "task-received" in events
            assert "task-failed" in events
            assert_clean(events, "an event")
            stack.close()  # Redis goes away for good
            time.sleep(2)
    for text, where in ((log.read_text(), "the log"), (errors.getvalue(), "an error"), (spoken.getvalue(), "stderr")):
        assert text or where == "stderr"
        assert_clean(text, where)
    assert "bad_signature" in errors.getvalue()
    assert '"level": "debug"' in log.read_text()

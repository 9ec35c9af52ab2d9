"""Untrusted messages are read only as JSON and within size limits."""

from __future__ import annotations

import base64
import bz2
import json
import lzma
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from headrace.client import Client, JobFailed
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.queue.validation import MAX_GROUP_JOBS, MAX_MESSAGE_BYTES
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.processes import WorkerProcess, wait_until
from tests.patience import PATIENCE_S

#: An audit hook that prints every class or function that pickle looks up.
LISTENING = """
import sys
def hear(event, arguments):
    if event == "pickle.find_class":
        print("HEARD", event, *arguments, file=sys.stderr, flush=True)
sys.addaudithook(hear)
"""


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def worker(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    log = tmp_path_factory.mktemp("messages") / "worker.log"
    environment = {"HEADRACE_REDIS_URL": server.url, "HEADRACE_SLOTS": "2", "HEADRACE_LOG_LEVEL": "debug"}
    with WorkerProcess(log, "-E", patch=LISTENING, **environment) as process:
        process.wait_ready()
        yield process


@pytest.fixture
def client(server: EmbeddedRedis, worker: WorkerProcess) -> Iterator[Client]:
    with Client(redis_url=server.url) as made:
        yield made


def put(
    client: Client, body: bytes, content_type: str = "application/json", encoding: str | None = None, **headers: Any
) -> None:
    """Queue a message with any body, as kombu writes it."""
    name = keys.queue_lists("demo")[1]
    delivery = {"exchange": "", "routing_key": name.removeprefix(keys.PREFIX)}
    message = {
        "body": base64.b64encode(body).decode(),
        "content-encoding": encoding or ("binary" if "json" not in content_type else "utf-8"),
        "content-type": content_type,
        "headers": {"lang": "py", "task": "headrace.generate", "id": "stranger", **headers},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": delivery,
            "delivery_tag": "tag-of-a-stranger",
            "correlation_id": "stranger",
        },
    }
    client._redis.lpush(name, json.dumps(message))


def arguments(request: Any) -> bytes:
    return json.dumps([[request], {}, {}]).encode()


def assert_refused(client: Client, worker: WorkerProcess, before: int, reason: str) -> None:
    worker.wait_for("message.refused", count=before + 1)
    assert reason in worker.events("message.refused")[-1]["reason"]
    assert client.submit("Hello.", max_tokens=2).result(PATIENCE_S)
    wait_until(lambda: client._redis.hlen(keys.unacked()) == 0)


@pytest.mark.parametrize(
    "content_type",
    [
        "application/x-python-serialize",
        "application/x-yaml",
        "application/x-msgpack",
        "application/data",
        "text/plain",
        None,
    ],
)
def test_nothing_but_json_is_read_and_nothing_is_unpickled(
    client: Client, worker: WorkerProcess, tmp_path: Path, content_type: str
) -> None:
    before = len(worker.events("message.refused"))
    trap = tmp_path / "it was unpickled"
    put(client, pickle.dumps([[Touch(trap)], {}, {}]), str(content_type) if content_type else "")
    assert_refused(client, worker, before, "only application/json is read")
    assert not trap.exists()


def test_the_pickle_payload_would_create_the_file(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Touch(trap)))
    assert trap.exists()


@pytest.mark.parametrize("where", ["celery.pidbox", "result"])
def test_remote_control_and_results_are_json_too(
    client: Client, worker: WorkerProcess, app: Celery, tmp_path: Path, where: str
) -> None:
    trap = tmp_path / "it was unpickled"
    evil = pickle.dumps({"method": "ping", "arguments": Touch(trap), "status": "SUCCESS", "result": Touch(trap)})
    if where == "celery.pidbox":
        envelope = {
            "body": base64.b64encode(evil).decode(),
            "content-encoding": "binary",
            "content-type": "application/x-python-serialize",
            "headers": {},
            "properties": {"body_encoding": "base64", "delivery_tag": "x", "delivery_info": {"exchange": "x"}},
        }
        before = len(worker.events("message.refused"))
        assert client._redis.publish("headrace:/0.celery.pidbox", json.dumps(envelope)) == 1
        worker.wait_for("message.refused", count=before + 1)
    else:
        connection = connect(client.url, text=False)
        connection.set(keys.result("evil"), evil)
        with pytest.raises(Exception, match=r"decode|utf-8|JSON|Expecting"):
            app.backend.get_task_meta("evil")
    assert app.control.inspect(timeout=PATIENCE_S, limit=1).ping()
    assert not trap.exists()


def test_all_four_serializers_are_json(app: Celery) -> None:
    conf = app.conf
    assert conf.accept_content == conf.result_accept_content == ["json"]
    assert {conf.task_serializer, conf.result_serializer, conf.event_serializer} == {"json"}
    assert list(app.backend.accept) == ["application/json"]
    assert (app.control.mailbox.serializer, app.control.mailbox.accept) == ("json", ["json"])


def test_no_class_is_ever_looked_up_for_pickle_in_a_worker(client: Client, worker: WorkerProcess, app: Celery) -> None:
    """This covers the worker's start, all messages of the tests above, and checkpoints."""
    job = client.submit("Hello.", max_tokens=3, checkpoints="all")
    assert job.result(PATIENCE_S)
    assert job.checkpoints()
    assert app.control.inspect(timeout=PATIENCE_S, limit=1).stats()
    assert "HEARD" not in worker.text()


@pytest.mark.parametrize(("name", "pack"), [("zlib", zlib.compress), ("bzip2", bz2.compress), ("lzma", lzma.compress)])
def test_compressed_messages_are_not_decompressed(client: Client, worker: WorkerProcess, name: str, pack: Any) -> None:
    """A hundred kilobytes may unpack to a hundred megabytes."""
    before = len(worker.events("message.refused"))
    put(client, pack(arguments({"prompt": " " * 10**8})), compression=name, id="compressed")
    assert_refused(client, worker, before, f"its body is compressed ({name}); send it without `compression`")
    wait_until(lambda: client._redis.exists(keys.result("compressed")))
    with pytest.raises(JobFailed, match=f"compressed \\({name}\\)"):
        client.job("compressed").result(1)
    client._redis.delete(keys.result("compressed"), keys.job("compressed"))
    peak = next(line for line in Path(f"/proc/{worker.process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    assert int(peak.split()[1]) < 4 * 2**20, "kilobytes: it never was in memory"


def test_an_encoding_that_decompresses_is_not_used(client: Client, worker: WorkerProcess) -> None:
    """Python decodes `zlib_codec` to any size."""
    before = len(worker.events("message.refused"))
    put(client, zlib.compress(arguments({"prompt": " " * 10**8})), encoding="zlib_codec")
    assert_refused(client, worker, before, "content encoding is 'zlib_codec'; only utf-8 is read")


def test_a_message_that_is_too_large_is_refused_before_it_is_read(client: Client, worker: WorkerProcess) -> None:
    before = len(worker.events("message.refused"))
    put(client, arguments({"prompt": "x" * MAX_MESSAGE_BYTES}))
    assert_refused(client, worker, before, f"at most {MAX_MESSAGE_BYTES} are read")


def test_a_group_that_is_too_large_is_refused(client: Client, worker: WorkerProcess, app: Celery) -> None:
    before = len(worker.events("message.refused"))
    app.send_task("headrace.generate_many", args=[[{"id": f"many:{i}"} for i in range(MAX_GROUP_JOBS + 1)]])
    assert_refused(client, worker, before, f"at most {MAX_GROUP_JOBS} are read")


@pytest.mark.parametrize(
    "headers",
    [
        {"timelimit": 7},
        {"timelimit": ["x", "y", "z"]},
        {"eta": 1e300},
        {"expires": [1]},
        {"retries": "many"},
        {"stamped_headers": 5, "stamps": 3},
    ],
    ids=str,
)
def test_invalid_headers_end_no_worker(client: Client, worker: WorkerProcess, headers: dict[str, Any]) -> None:
    put(client, arguments({"prompt": "x", "max_tokens": 1}), **headers)
    assert client.submit("Hello.", max_tokens=2).result(PATIENCE_S)
    wait_until(lambda: client._redis.hlen(keys.unacked()) == 0)
    assert worker.alive


def test_the_largest_valid_request_is_accepted(client: Client) -> None:
    """A worker must not refuse for its size what the client accepts."""
    from headrace.client.wire.field_values import MAX_BIASES
    from headrace.client.wire.messages import MAX_MESSAGES_BYTES
    from headrace.client.wire.requests import MAX_PROMPT_BYTES, MAX_PROMPT_TOKENS, MAX_STOP_BYTES, TOKEN_IDS

    more = {
        "stop": ["\x01" * MAX_STOP_BYTES] * 16,
        "logit_bias": {TOKEN_IDS - 1 - i: -99.99999999999999 for i in range(MAX_BIASES)},
        "stop_token_ids": [TOKEN_IDS - 1] * 64,
        "id": "x" * 128,
    }
    longest = "\u00e9" * ((MAX_MESSAGES_BYTES - 40) // 2)  # six bytes each on the wire
    chat = {"messages": [{"role": "user", "content": longest}], "chat_template_kwargs": {"a": longest}}
    for source in ({"prompt": "\x01" * MAX_PROMPT_BYTES}, {"prompt": [2**31 - 1] * MAX_PROMPT_TOKENS}, chat):
        wire = client.submitter.prepare({**source, **more}).wire
        assert len(arguments(wire)) < 0.75 * MAX_MESSAGE_BYTES

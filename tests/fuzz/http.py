"""Fuzz target: requests to `headrace serve` from untrusted clients."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import tempfile
from pathlib import Path
from typing import Any, cast

from hypothesis import strategies as st
from starlette.applications import Starlette

from headrace.client import AsyncClient, Client, QueueFull
from headrace.client.http.app import ROUTES, exception_handlers
from headrace.client.http.auth import AccessMiddleware, Limits
from headrace.client.http.batches import Batches
from headrace.client.http.comparison import Comparison
from headrace.client.http.context import AppContext
from headrace.client.http.file_store import FileStore
from headrace.client.http.jobs import JobRunner
from headrace.client.http.page import StatusReporter
from headrace.client.jobs.status import Status, WorkerStatus
from headrace.client.wire.foreign import FOREIGN
from headrace.config import load_settings
from tests.fuzz.harness import LONGEST_MESSAGE, Target
from tests.fuzz.jobs import GOOD
from tests.fuzz.values import ANY_TEXT, JSON, objects

PROMPTS = GOOD["prompt"] | st.lists(GOOD["prompt"], max_size=3)
COMPLETIONS = objects(
    {
        **dict.fromkeys(sorted(FOREIGN), JSON),
        **{name: good for name, good in GOOD.items() if name not in ("schema_version", "expires_at")},
        "prompt": PROMPTS,
        "model": st.sampled_from(["demo", "gpt-5", "a/b"]),
        "stream": st.booleans(),
        "stream_options": st.just({"include_usage": True}),
        "user": st.just("u"),
        "best_of": st.integers(0, 3),
        "max_completion_tokens": JSON | st.integers(0, 4),
        "timeout_s": st.sampled_from([1, 0.5, 1e9]),
        "self": JSON,
        "function": JSON,
        "requests": JSON,
        "args": JSON,
    },
    needed=("prompt",),
)
BATCHES = objects(
    {
        "input_file_id": st.sampled_from(["file-0", "../lock", "\0"]) | ANY_TEXT,
        "endpoint": st.just("/v1/completions"),
        "completion_window": st.just("24h"),
        "metadata": st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=3),
    },
    needed=("input_file_id", "endpoint", "completion_window"),
)
BODIES = COMPLETIONS | BATCHES | JSON | st.binary(max_size=40)
PATHS = st.sampled_from(["/v1/completions", "/execute", "/v1/batches", "/v1/files"])


class FullQueue:
    """A client that checks requests as `AsyncClient` does, and then raises QueueFull."""

    model_name = "demo"

    def __init__(self) -> None:
        self._client = Client(redis_url="redis://localhost:1/0")

    async def models(self) -> set[str]:
        return {"demo"}

    async def status(self) -> Status:
        return Status(workers=[WorkerStatus(name="w", model="demo")], queues=[], delivered=0)

    async def submit_many(self, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            self._client.submitter.prepare(dict(request))
        raise QueueFull("headrace.demo", 1, 1)


@functools.cache
def _app() -> AccessMiddleware:
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # as the server does
    directory = Path(tempfile.mkdtemp())
    files = FileStore(directory)
    client = cast("AsyncClient", FullQueue())
    app = Starlette(routes=ROUTES, exception_handlers=exception_handlers())
    batches = Batches(directory, files, load_settings())
    runner = JobRunner(client, 600)
    app.state.context = AppContext(client, runner, files, batches, StatusReporter(runner), Comparison(client))
    return AccessMiddleware(app, Limits(any_host=True))


def check_body(case: tuple[str, Any]) -> None:
    """A body is refused with an error object, or reaches the queue, which is full. It never causes a 500."""
    path, body = case
    try:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
    except RecursionError:  # the recursion limit depends on the depth of the caller
        content = b"[" * 5_000
    status, answer = asyncio.run(_post(path, content))
    assert status in (400, 404, 413, 429), (status, answer)
    error = json.loads(answer)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= LONGEST_MESSAGE
    if error["param"] is not None:
        assert len(error["param"]) <= 120, error


async def _post(path: str, body: bytes) -> tuple[int, bytes]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    await _app()(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


TARGETS = [Target("http", st.tuples(PATHS, BODIES), check_body, full_cases=6_000, test_cases=60)]

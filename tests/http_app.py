"""The application of `headrace serve` in this process: its real routes and middleware, without a queue or a worker."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple, cast

from headrace.client import AsyncClient, Client, QueueFull
from headrace.client.http.app import make_protected_app
from headrace.client.http.auth import Limits
from headrace.client.http.batches import Batches
from headrace.client.http.comparison import Comparison
from headrace.client.http.context import AppContext
from headrace.client.http.file_store import FileStore
from headrace.client.http.jobs import JobRunner
from headrace.client.http.page import StatusReporter
from headrace.client.jobs.listing import JobPage
from headrace.client.jobs.status import Status, WorkerStatus
from headrace.client.wire.adapters import AdapterStatus
from headrace.client.wire.model_description import ModelDescription
from headrace.config import load_settings


class FullQueue:
    """A client that checks requests as `AsyncClient` does, and then raises QueueFull."""

    def __init__(self, models: tuple[str, ...], adapters: tuple[str, ...] = ()) -> None:
        """The adapters are named `model/adapter`."""
        self.model_name, self._models = models[0], models
        self._adapters = {
            model: {each.split("/")[1] for each in adapters if each.startswith(f"{model}/")} for model in models
        }
        self._client = Client(redis_url="redis://localhost:1/0")
        self.url = self._client.url

    async def models(self) -> set[str]:
        return set(self._models)

    async def adapters(self) -> dict[str, set[str]]:
        return self._adapters

    async def status(self) -> Status:
        """Two workers of `demo` say what they read; an older worker of any other model does not."""
        said = [ModelDescription(max_context=context) for context in (1024, 512)]
        workers = [
            WorkerStatus(
                name=f"w{i}@{model}",
                model=model,
                description=description,
                adapters=[AdapterStatus(name=name) for name in sorted(self._adapters[model])],
            )
            for model in sorted(self._models)
            for i, description in enumerate(said if model == "demo" else [None])
        ]
        return Status(workers=workers, queues=[], delivered=0)

    async def job_page(self, **_: Any) -> JobPage:
        return JobPage([], "", 0.0)

    async def job_counts(self, _: str) -> dict[str, int]:
        return {}

    async def find_job(self, *_: str) -> None:
        return None

    async def submit_many(self, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            self._client.submitter.prepare(dict(request))
        raise QueueFull("headrace.demo", 1, 1)

    async def tokenize(self, **fields: Any) -> None:
        await self.submit_many([fields])

    async def detokenize(self, token_ids: list[int], model: str, *, skip_special_tokens: bool = False) -> None:
        await self.submit_many([{"prompt": token_ids, "model": model, "skip_special_tokens": skip_special_tokens}])


_full_queue = functools.cache(FullQueue)


class _NoThreads:
    """An executor that starts nothing: accepted batches wait."""

    def submit(self, *_: object) -> None:
        """Do nothing."""

    def shutdown(self, **_: object) -> None:
        """Do nothing."""


class Answer(NamedTuple):
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class HttpApp:
    """The application with its files in `directory`. Batches are accepted and not computed."""

    def __init__(
        self,
        directory: Path,
        limits: Limits | None = None,
        models: tuple[str, ...] = ("demo",),
        adapters: tuple[str, ...] = (),
    ) -> None:
        logging.getLogger("python_multipart").setLevel(logging.ERROR)  # as the server does
        self.files = FileStore(directory)
        client = cast("AsyncClient", _full_queue(models, adapters))
        runner, self.batches = JobRunner(client, 600), Batches(directory, self.files, load_settings())
        self.batches._threads = cast("Any", _NoThreads())
        app, self._asgi = make_protected_app(limits or Limits(any_host=True))
        app.state.context = self.context = AppContext(
            client, runner, self.files, self.batches, StatusReporter(runner), Comparison(client)
        )

    def close(self) -> None:
        """Release the directory."""
        self.files.close()

    def ask(
        self, method: str, path: str, body: Any = b"", query: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        """Send one request; a body that is not bytes is sent as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return asyncio.run(self._ask(method, path, content, query, {"host": "localhost", **(headers or {})}))

    def upload(self, content: bytes = b"{}\n", filename: str = "in.jsonl", purpose: str = "batch") -> Answer:
        """Upload a file."""
        disposition = 'Content-Disposition: form-data; name="'
        parts = [
            f'--x\r\n{disposition}purpose"\r\n\r\n{purpose}\r\n',
            f'--x\r\n{disposition}file"; filename="{filename}"\r\n\r\n',
        ]
        body = "".join(parts).encode("utf-8", "surrogatepass") + content + b"\r\n--x--\r\n"
        return self.ask("POST", "/v1/files", body, headers={"content-type": "multipart/form-data; boundary=x"})

    async def _ask(self, method: str, path: str, body: bytes, query: bytes, headers: dict[str, str]) -> Answer:
        sent: list[Any] = []

        asked = asyncio.Event()

        async def receive() -> Any:
            if asked.is_set():
                await asyncio.Event().wait()  # the client stays connected
            asked.set()
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        raw = [(name.lower().encode(), value.encode("utf-8", "surrogatepass")) for name, value in headers.items()]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query,
            "headers": raw,
            "scheme": "http",
        }
        await self._asgi(scope, receive, send)
        found = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent))

"""How fast `headrace serve` answers `/health` while hostile clients keep it busy.

    python -m benchmarks.hostile [--requests 16] [--idle 1000] [--seconds 5]

Starts an embedded Redis and a server, no worker. Measured are the seconds for `/health`, asked ten times a second over
a new connection each time: in peace; while requests with 1,024 prompts, or with as large parameters as the server
accepts, are sent at the same time; while bodies that are slow to parse are sent; and while idle connections are open.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.http_server import HttpServer

BIAS = {str(token): 1.5 for token in range(1_024)}
STOP = ["x" * 1_000] * 16
BODIES: dict[str, bytes] = {
    "1,024 prompts, large parameters": json.dumps(
        {"prompt": ["a"] * 1_024, "logit_bias": BIAS, "stop": STOP, "max_tokens": 1}
    ).encode(),
    "as many as are accepted": json.dumps(
        {"prompt": ["a"] * 240, "logit_bias": BIAS, "stop": STOP, "max_tokens": 1}
    ).encode(),
    "1,024 prompts of token ids": json.dumps({"prompt": [list(range(600))] * 1_024, "max_tokens": 1}).encode(),
    "a million lists": b'{"prompt":[' + b"[]," * 1_000_000 + b"[]]}",
    "a million texts": b'{"prompt":[' + b'"",' * 1_000_000 + b'""]}',
}


async def ask(port: int, method: str, path: str, body: bytes = b"") -> tuple[bytes, float]:
    """The status line and the seconds of a request."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = await reader.read()
        return answer.split(b"\r\n")[0], time.perf_counter() - began
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def watched(port: int, name: str) -> AsyncIterator[None]:
    """Ask for `/health` during the block, and print the percentiles."""
    found: list[tuple[bytes, float]] = []

    async def watch() -> None:
        while True:
            asking.append(asyncio.create_task(ask(port, "GET", "/health")))
            asking[-1].add_done_callback(lambda task: found.append(task.result()))
            await asyncio.sleep(0.1)

    asking: list[asyncio.Task[Any]] = []
    watching = asyncio.create_task(watch())
    began = time.perf_counter()
    yield
    took = time.perf_counter() - began
    watching.cancel()
    await asyncio.gather(*asking)
    seconds = sorted(each for _, each in found)
    p99 = seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]
    median, p99, longest = (1e3 * each for each in (statistics.median(seconds), p99, seconds[-1]))
    print(f"{name:36} {took:6.2f} s; /health: {len(seconds):4} answers, ", end="")
    print(f"median {median:6.1f} ms, 99 % {p99:6.1f} ms, longest {longest:6.1f} ms", flush=True)


async def measure(port: int, requests: int, idle: int, seconds: float) -> None:
    """All measurements on one server."""
    async with watched(port, "in peace"):
        await asyncio.sleep(seconds)
    for name, body in BODIES.items():
        async with watched(port, f"{requests} x {name}"):
            began, statuses = time.perf_counter(), set()
            while time.perf_counter() - began < seconds:
                answers = await asyncio.gather(*(ask(port, "POST", "/v1/completions", body) for _ in range(requests)))
                statuses |= {status for status, _ in answers}
        print(" " * 36, *sorted(status.decode() for status in statuses))
    held = []
    async with watched(port, f"{idle} idle connections"):
        for number in range(idle):
            held.append(await asyncio.open_connection("127.0.0.1", port))
            held[-1][1].write(b"POST /v1/completions HTTP/1.1\r\n" if number % 2 else b"")
        await asyncio.sleep(seconds)
    for _, writer in held:
        writer.close()


def pretend_to_serve(url: str) -> None:
    """Write the record of a worker, so that the server accepts jobs. They wait until their time limit has passed."""
    with connect(url) as connection:
        connection.zadd(keys.workers(), {"pretended": time.time()})
        connection.hset(keys.worker("pretended"), mapping={"model": "demo", "beat_at": time.time()})


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--idle", type=int, default=1_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, EmbeddedRedis.ephemeral() as redis:
        pretend_to_serve(redis.url)
        with HttpServer(Path(directory), redis.url, "--timeout", "2") as server:
            port = int(server.url.rpartition(":")[2])
            asyncio.run(measure(port, given.requests, given.idle, given.seconds))
            print(f"log: {len(server.said())} bytes")


if __name__ == "__main__":
    main()

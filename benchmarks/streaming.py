"""Benchmark the cost of streaming: 64 sequences with and without streaming their text to Redis, alternately.

Starts its own Redis on this machine, whose work is part of the cost. Each pair of rounds gives a ratio; the median and
the interquartile range of the ratios are reported. `--jobs` instead counts the connections to Redis while one
AsyncClient waits for that many jobs, and measures the share of a core that waiting takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
import uuid
from pathlib import Path

from benchmarks.models import random_model
from headrace.client import AsyncClient
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.client.wire.requests import GenerateRequest, parse_request
from headrace.config import load_settings
from headrace.worker.engine.build import load_engine
from headrace.worker.engine.engine import Engine
from headrace.worker.jobs.redis_store import RedisStore
from headrace.worker.jobs.stream_writer import STREAM_INTERVAL_S, StreamWriter
from headrace.worker.redis_server import EmbeddedRedis

ROWS = 64


def requests(new_tokens: int) -> list[GenerateRequest]:
    """Prompts of 16 tokens."""
    rng = random.Random(1)
    fields = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return [parse_request({"prompt": [rng.randrange(50000) for _ in range(16)], **fields}) for _ in range(ROWS)]


def round_s(engine: Engine, events: StreamWriter | None, asked: list[GenerateRequest]) -> float:
    """Seconds for all requests, which are streamed if `events` is given."""
    started = time.perf_counter()
    futures = []
    for request in asked:
        job_id = uuid.uuid4().hex
        on_text = events.begin(job_id) if events else None
        future = engine.submit(request, job_id=job_id, on_text=on_text, text_every_s=STREAM_INTERVAL_S)
        if events:
            future.add_done_callback(lambda _, name=job_id: events.end([name]))  # type: ignore[misc]
        futures.append(future)
    for future in futures:
        future.result()
    return time.perf_counter() - started


def measure(model: str, dtype: str, new_tokens: int, pairs: int) -> dict[str, float | str]:
    """Tokens per second without streaming, and what streaming costs, in percent of it."""
    asked = requests(new_tokens)
    with (
        EmbeddedRedis.ephemeral() as server,
        load_engine(load_settings(model=model, dtype=dtype, device="cpu")) as engine,
    ):
        events = StreamWriter(RedisStore(connect(server.url), result_ttl_s=600, checkpoint_ttl_s=600, events_ttl_s=60))
        for warm in (None, events):
            round_s(engine, warm, asked)
        costs, plain = [], []
        for pair in range(pairs):
            order = (None, events) if pair % 2 else (events, None)
            took = {which is not None: round_s(engine, which, asked) for which in order}
            plain.append(took[False])
            costs.append(100 * (took[True] / took[False] - 1))
        events.stop()
    quarters = statistics.quantiles(costs, n=4)
    return {
        "model": model,
        "dtype": dtype,
        "tokens_per_s": round(ROWS * new_tokens / statistics.median(plain)),
        "cost_percent": round(statistics.median(costs), 2),
        "middle_half_from": round(quarters[0], 2),
        "middle_half_to": round(quarters[2], 2),
        "pairs": pairs,
    }


async def outstanding(url: str, count: int, seconds: float) -> dict[str, float]:
    """Measure one AsyncClient that waits for `count` jobs without a worker."""
    connection = connect(url)
    async with AsyncClient(redis_url=url) as client:
        started = time.perf_counter()
        jobs = await client.submit_many(["Hello."] * count, max_tokens=1)
        submitted = time.perf_counter() - started
        waiting = [asyncio.create_task(job.wait()) for job in jobs]
        await asyncio.sleep(1)
        cpu, clock = time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        share = (time.process_time() - cpu) / (time.perf_counter() - clock)
        connections = len(connection.client_list()) - 1
        started = time.perf_counter()
        pipe = connection.pipeline(transaction=False)
        for job in jobs:
            pipe.set(keys.result(job.id), '{"status": "REVOKED", "result": null}')
        pipe.execute()
        stored = time.perf_counter()
        await asyncio.gather(*waiting)
        return {
            "jobs": count,
            "connections": connections,
            "submit_s": round(submitted, 2),
            "core_percent": round(100 * share, 1),
            "all_seen_s": round(time.perf_counter() - stored, 2),
        }


def main() -> None:
    """Read the command line, measure, print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo", help="a model, or 124M for its shape with random weights")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=0, help="instead measure a client that waits for this many jobs")
    given = parser.parse_args()
    if given.jobs:
        with EmbeddedRedis.ephemeral() as server:
            print(json.dumps(asyncio.run(outstanding(server.url, given.jobs, 5))))
        return
    model = given.model
    if model == "124M":
        model = str(random_model("124M", Path(tempfile.gettempdir()) / "headrace-124M"))
    print(json.dumps(measure(model, given.dtype, given.tokens, given.pairs)))


if __name__ == "__main__":
    main()

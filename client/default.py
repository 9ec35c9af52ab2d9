"""The functions of `headrace.client`: they call one client, which is made from the environment at the first call."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from celery import Signature

from headrace.client.batch.run import BatchReport
from headrace.client.batch.scores import Score
from headrace.client.client import Client
from headrace.client.jobs.handle import Job
from headrace.client.jobs.status import Status
from headrace.client.wire.results import Tokenized
from headrace.config.directories import redis_dir
from headrace.config.settings import PREFIX


def default_client() -> Client:
    """The client that the functions of this module use, made from the environment.

    The same object is returned until a `HEADRACE_*` variable or the data directory changes.
    """
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith(PREFIX)))
    return _client_for(settings, redis_dir())


@functools.lru_cache(maxsize=1)
def _client_for(settings: tuple[tuple[str, str], ...], directory: Path) -> Client:  # noqa: ARG001  # the cache's key
    return Client()


def submit(prompt: str | Sequence[int] | None = None, **params: Any) -> Job:
    """Queue one prompt; see `Client.submit`."""
    return default_client().submit(prompt, **params)


def submit_many(requests: Iterable[str | Sequence[int] | Mapping[str, Any]], **params: Any) -> list[Job]:
    """Queue many prompts; see `Client.submit_many`."""
    return default_client().submit_many(requests, **params)


def batch(source: str | Path | IO[bytes] | Iterable[Any], output: str | Path, **options: Any) -> BatchReport:
    """Compute all requests of a file or an iterable and write the results to a file; see `Client.batch`."""
    return default_client().batch(source, output, **options)


def map(prompts: Iterable[Any], **params: Any) -> Iterator[Any]:  # noqa: A001  # reads as `client.map`
    """Yield the results of prompts in their order; see `Client.map`."""
    return default_client().map(prompts, **params)


def job(job_id: str) -> Job:
    """A handle on a job, wherever it was submitted; see `Client.job`."""
    return default_client().job(job_id)


def as_completed(jobs: Iterable[Job], timeout: float | None = None) -> Iterator[Job]:
    """Yield the jobs as they end; see `Client.as_completed`."""
    return default_client().as_completed(jobs, timeout)


def signature(prompt: str | Sequence[int] | None = None, **params: Any) -> Signature:
    """A job as a Celery signature; see `Client.signature`."""
    return default_client().signature(prompt, **params)


def score(prompt: str | Sequence[int], continuation: str | Sequence[int], **params: Any) -> Score:
    """The log probability of a continuation after a prompt; see `Client.score`."""
    return default_client().score(prompt, continuation, **params)


def score_many(pairs: Iterable[Any], **params: Any) -> Iterator[Score]:
    """Yield the scores of pairs of prompt and continuation; see `Client.score_many`."""
    return default_client().score_many(pairs, **params)


def choose(prompts: Any, answers: Sequence[str], **params: Any) -> Any:
    """The likeliest of the given answers after a prompt, or after each of many; see `Client.choose`."""
    return default_client().choose(prompts, answers, **params)


def cancel(jobs: Iterable[str | Job]) -> list[bool]:
    """Cancel many jobs; see `Client.cancel`. `Job.cancel` cancels one."""
    return default_client().cancel(jobs)


def tokenize(prompt: str | Sequence[int] | None = None, **params: Any) -> Tokenized:
    """The token ids of a prompt or of messages; see `Client.tokenize`."""
    return default_client().tokenize(prompt, **params)


def detokenize(token_ids: Sequence[int], **params: Any) -> str:
    """The text of token ids; see `Client.detokenize`."""
    return default_client().detokenize(token_ids, **params)


def status() -> Status:
    """Queues, workers and slots; see `Client.status`."""
    return default_client().status()

"""`Client`: submit jobs, wait for them, cancel them, read the status.

`client.jobs.submission` publishes and `client.jobs.reading` polls, over one connection for any number of jobs.
`AsyncClient` offers the same for asyncio.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import redis
from celery import Celery, Signature

from headrace.client.batch.columns import Columns
from headrace.client.batch.map import map_prompts
from headrace.client.batch.run import Batch, BatchReport
from headrace.client.batch.window import MAX_INFLIGHT
from headrace.client.job_verbs import JobVerbs
from headrace.client.jobs.handle import Job, by_id, check_same_redis, job_in_errors
from headrace.client.jobs.listing import JobLister
from headrace.client.jobs.own_fields import check_model
from headrace.client.jobs.prepared import PreparedJob
from headrace.client.jobs.purging import Purger
from headrace.client.jobs.reading import JobReader
from headrace.client.jobs.status import Status
from headrace.client.jobs.submission import Submitter
from headrace.client.jobs.tokens import TIMEOUT_S, detokenize_job, tokenize_job, tokenized
from headrace.client.scoring import ScoringVerbs
from headrace.client.wire import keys
from headrace.client.wire.celery import TASK_NAME, producer_app, results_app
from headrace.client.wire.errors import InvalidRequest, RedisRefused, RedisUnreachable
from headrace.client.wire.redis import connect, resolve_url
from headrace.client.wire.results import Tokenized
from headrace.client.wire.start_advice import note_client
from headrace.client.wire.values import without_gaps
from headrace.config import Settings, load_settings


class Client(ScoringVerbs, JobVerbs):
    """Submits jobs to one Redis and reads their results. Use it as a context manager, or call `close`.

    Args:
        redis_url: HEADRACE_REDIS_URL if not given, else the embedded server of this user's data directory, else
            localhost. Each new connection looks for the embedded server, so it may start after the client.
        model: the served name of the model of jobs that name none; the first of HEADRACE_MODEL if not given.
        settings: all settings at once, instead of the environment.

    Attributes:
        settings: the settings in use.
        url: the URL of the Redis in use; `embedded://...` if the client looks for the server at each connection.
        model_name: the model of jobs that name none.
        submitter: checks and submits jobs; `submit` uses it.
        reader: polls and cancels jobs; `Job` uses it.
        lister: lists jobs.
        purger: ends all jobs of a model.

    Raises:
        SettingsError: a setting is unknown or its value is not valid.
        InvalidRequest: `model` cannot be the name of a model.
    """

    def __init__(
        self, *, redis_url: str | None = None, model: str | None = None, settings: Settings | None = None
    ) -> None:
        settings = settings or load_settings()
        if redis_url is not None:
            settings = load_settings(**{**settings.model_dump(), "redis_url": redis_url})
        self.settings = settings
        self.url = resolve_url(settings)
        self.model_name = check_model(model) if model is not None else settings.model_name
        note_client(self.url, settings, self.model_name)
        self._redis, self._app = connect(self.url), producer_app(settings, self.url)
        self.submitter = Submitter(settings, self.url, self._redis, self._app, model_name=self.model_name)
        self.reader = JobReader(self.url, self._redis, model_name=self.model_name, result_ttl_s=settings.result_ttl_s)
        self.lister = JobLister(self.url, self._redis)
        self.purger = Purger(self.url, self._redis, self.lister, self.reader.canceller)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Submitted jobs continue."""
        self._redis.close()
        self._app.close()
        if "celery_app" in self.__dict__:
            self.celery_app.close()

    def submit(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        id: str | None = None,  # noqa: A002
        **params: Any,
    ) -> Job:
        """Queue one prompt, or the messages of a chat.

        Args:
            prompt: text, or token ids. The empty text means the end-of-text token.
            messages: in place of a prompt, such as `[{"role": "user", "content": "Hello"}]`. The worker renders them
                with the model's chat template.
            id: a job id of your choice. Submitting the same request with the same id again returns the same job.
            params: sampling parameters (`client.SamplingParams`), `priority`, `model`, `adapter` (the name of a LoRA
                adapter of the model), `stream` (True if `Job.stream` is to yield the text while it is generated),
                `checkpoints`, and `timeout_s`, the number of seconds after which the job expires.

        Raises:
            InvalidRequest: a parameter is wrong, or live workers have other models or adapters than it names; nothing
                was queued.
            QueueFull: the queue is full; nothing was queued.
            RedisUnreachable: Redis does not answer; nothing was queued, unless only the answer was lost.
            RedisRefused: Redis answers with an error; nothing was queued.
            RedisUnsuitable: Redis would lose the job, for example because it evicts keys; nothing was queued.
        """
        return self._submit([self.submitter.prepare({"prompt": prompt, "messages": messages, "id": id, **params})])[0]

    def submit_many(self, requests: Iterable[str | Sequence[int] | Mapping[str, Any]], **params: Any) -> list[Job]:
        """Queue many prompts: each is a text, token ids, or a mapping of `prompt` or `messages` and own parameters.

        All requests are checked before the first is queued. Up to 16 jobs share one message; each has its own id, state
        and result, and can be cancelled separately. Those with the highest priority are sent first.

        Args:
            requests: the prompts.
            params: defaults for requests that do not set the parameter.

        Raises:
            InvalidRequest: a request is wrong, in a field such as `requests[3].top_p`, or there are none; nothing was
                queued.
            QueueFull: the queue does not accept that many jobs; nothing was queued.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error; `accepted` has the jobs
                that were queued before, by their index in `requests`.
        """
        if isinstance(requests, (str, Mapping)) or not isinstance(requests, Iterable):
            raise InvalidRequest("requests", f"a {type(requests).__name__}", "a list of prompts; use submit for one")
        prepared: list[PreparedJob] = []
        own = (request if isinstance(request, Mapping) else {"prompt": request} for request in requests)
        try:
            for job in self.submitter.prepare_all({**params, **without_gaps(fields)} for fields in own):
                prepared.append(job)
        except InvalidRequest as error:
            raise InvalidRequest(f"requests[{len(prepared)}].{error.field}", error.value, error.expected) from None
        if not prepared:
            raise InvalidRequest("requests", "an empty list", "at least one prompt")
        return self._submit(prepared)

    def _submit(self, prepared: list[PreparedJob]) -> list[Job]:
        with job_in_errors(self.job):
            self.submitter.check_models(prepared)
            self.submitter.submit(prepared)
        return [Job(job.id, self.reader, accepted=True) for job in prepared]

    def batch(
        self,
        source: str | Path | IO[bytes] | Iterable[Any],
        output: str | Path,
        *,
        text: bool = False,
        limit: int | None = None,
        params: Mapping[str, Any] | None = None,
        format: str | None = None,  # noqa: A002 - the name of the option
        columns: Columns | None = None,
        shard: tuple[int, int] = (0, 1),
        skip_invalid: bool = False,
        **options: Any,
    ) -> BatchReport:
        """Compute all requests of a file or an iterable and write the results to a file, as `headrace batch` does.

        Args:
            source: a path (JSON lines, gzipped or not; with `text` each line is a prompt; or a table), a data frame, or
                an iterable of prompts, token ids and mappings with `prompt` or `messages`, parameters and `custom_id`.
            output: a path or URL. By its extension it has JSON lines in the format of the OpenAI Batch API, each
                written when its request is done, or flat rows as CSV, TSV, Parquet or Arrow; `.gz` is gzipped.
            limit: process only this many requests.
            params: defaults for requests that do not set the parameter.
            format: the format of the source, if its name does not tell.
            columns: which columns of a table are what.
            shard: (i, n): only the rows whose number modulo n is i.
            skip_invalid: write faulty rows as failed ones, and compute the others.
            options: those of `client.batch.run.Batch.run`, for example errors, output_format and resume.

        Raises:
            InvalidBatch: requests are wrong, or the output has other requests under the same custom ids; nothing was
                queued.
            OutputRefused: the output must not or cannot be written.
        """
        models: set[str] | None = None
        adapters: dict[str, set[str]] = {}
        with contextlib.suppress(RedisUnreachable, RedisRefused):  # the batch itself waits for Redis
            served = self.submitter.models.served()
            models = self.models() if served and served.now else None
            adapters = self.adapters()
        given: dict[str, Any] = {"text": text, "limit": limit, "format": format, "columns": columns, "shard": shard}
        batch = Batch(self, source, params, models=models, adapters=adapters, skip_invalid=skip_invalid, **given)
        return batch.run(output, **options)

    def map(
        self,
        prompts: Iterable[Any],
        *,
        max_inflight: int = MAX_INFLIGHT,
        return_exceptions: bool = False,
        **params: Any,
    ) -> Iterator[Any]:
        """Yield the results of prompts in their order. Reads at most `max_inflight` prompts ahead.

        Args:
            prompts: texts, token ids, or mappings with `prompt` or `messages` and their own parameters, also in the
                types of pyarrow, numpy and pandas: for example a column of a table, a data set, or a generator.
            return_exceptions: yield errors in place of results, instead of raising the first one.
            params: defaults for prompts that do not set the parameter.

        Raises:
            InvalidRequest, JobFailed, JobExpired, ...: when the wrong or failed prompt is reached. All unfinished jobs
                are cancelled then, as they are when the iterator is closed.
        """
        return map_prompts(self, prompts, params, max_inflight=max_inflight, return_exceptions=return_exceptions)

    def job(self, job_id: str) -> Job:
        """A handle on a job, wherever it was submitted. Sends nothing to Redis."""
        return Job(job_id, self.reader)

    def as_completed(self, jobs: Iterable[Job], timeout: float | None = None) -> Iterator[Job]:
        """Yield the jobs as they end, including those that fail. `job.result()` then returns or raises at once.

        Raises:
            ResultTimeout: some have not ended after `timeout` seconds in all.
            UnknownJob, JobLost, RedisUnreachable: as for `Job.result`. After JobLost, call it again with the others.
        """
        waiting = by_id(jobs)
        check_same_redis(waiting.values(), self.url)
        for job in [job for job in waiting.values() if job.outcome is not None]:
            yield waiting.pop(job.id)
        accepted = {job_id for job_id, job in waiting.items() if job.accepted}
        with job_in_errors(lambda job_id: waiting.get(job_id) or self.job(job_id)):
            for updates in self.reader.updates(waiting, timeout, accepted=accepted):
                for job_id, outcome in updates.outcomes.items():
                    waiting[job_id].outcome = outcome
                    yield waiting.pop(job_id)

    def signature(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        id: str | None = None,  # noqa: A002
        **params: Any,
    ) -> Signature:
        """A job as a Celery signature, for `group`, `chord` and `chain`; docs/client.md has examples.

        Takes and checks the same arguments as `submit`, and queues nothing. `timeout_s` starts now, by Redis' clock.
        The signature is immutable: in a chain it does not receive the result of the task before it. The task returns a
        `client.Result` as JSON.
        """
        job = self.submitter.prepare({"prompt": prompt, "messages": messages, "id": id, **params})
        if job.timeout_s is not None:
            with contextlib.suppress(redis.RedisError):  # then the deadline is by the clock of this machine
                self.submitter.server.measure()
        return self.celery_app.signature(
            TASK_NAME,
            args=(job.wire,),
            immutable=True,
            task_id=job.id,
            queue=keys.queue(job.model),
            priority=job.urgency,
            argsrepr="<redacted>",
            kwargsrepr="{}",
            headers={"model": job.model},  # a worker refuses it in the queue of another model
        )

    @functools.cached_property
    def celery_app(self) -> Celery:
        """A Celery app on the same Redis, for `signature`, for `AsyncResult(id, app=...)`, and for your own tasks."""
        return results_app(self.settings, self.url)

    def tokenize(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = TIMEOUT_S,
        **params: Any,
    ) -> Tokenized:
        """The token ids of a prompt or of messages, as a worker that serves the model makes them.

        Args:
            prompt: text; token ids are returned as they are, with their names.
            messages: in place of a prompt; see `submit`.
            timeout: seconds to wait for the answer, in which the job also expires; None waits for ever.
            params: `model`, `add_special_tokens`, `parse_special_tokens`, and for messages `add_generation_prompt`,
                `continue_final_message` and `chat_template_kwargs`.

        Raises:
            InvalidRequest, QueueFull, RedisUnreachable, RedisRefused, RedisUnsuitable: as for `submit`.
            ResultTimeout, JobError: as for `Job.result`.
        """
        fields = {"prompt": prompt, "messages": messages, **params}
        return tokenized(self._submit([tokenize_job(self.submitter, fields, timeout)])[0].result(timeout))

    def detokenize(self, token_ids: Sequence[int], *, timeout: float | None = TIMEOUT_S, **params: Any) -> str:
        """The text of token ids, as a worker that serves the model decodes them; errors are those of `tokenize`.

        Args:
            token_ids: 1 to 16,384 ids.
            timeout: seconds to wait for the answer.
            params: `model`, and `skip_special_tokens`, False by default.
        """
        fields = {"skip_special_tokens": False, **params}
        return self._submit([detokenize_job(self.submitter, token_ids, fields, timeout)])[0].result(timeout).text

    def status(self) -> Status:
        """The current status: queues, workers and slots. Raises RedisUnreachable."""
        return self.reader.status()

    def models(self) -> set[str]:
        """The models that jobs may name: those of its settings, and those served now or within the last day.

        While there is no live worker, jobs may name any model. Raises RedisUnreachable.
        """
        return self.submitter.models.names()

    def adapters(self) -> dict[str, set[str]]:
        """The names of the LoRA adapters of each model, those that workers have now or had within the last day.

        A model is missing if no worker says what it has. Raises RedisUnreachable.
        """
        return self.submitter.models.adapters()

"""The client: checks, publishes, polls. One connection however many jobs wait, and no channel for each of them.

Jobs submitted together share messages, for a message costs more than a short job; all else of a job is its own.
What waiting is, `client.jobs.polling` says; `client.async_client` is the other face of the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, cast, overload

import redis
from celery import Celery, Signature
from kombu.exceptions import OperationalError

from headrace.client.batch.run import MAX_INFLIGHT, Batch, BatchReport, map_prompts
from headrace.client.jobs.handle import Handle, Job
from headrace.client.jobs.polling import LAST_POLL_S, News, Watch
from headrace.client.jobs.status import Served, Status, count_queued, read_served, read_status
from headrace.client.wire import keys
from headrace.client.wire.embedded_redis import current_url
from headrace.client.wire.errors import (
    InvalidRequest,
    NoCheckpoints,
    NoWorker,
    QueueFull,
    RedisRefused,
    RedisUnreachable,
    ResultTimeout,
    UnknownJob,
    UnreadableRecord,
)
from headrace.client.wire.redis import connect, explain, producer_app, queue, resolve_url, results_app
from headrace.client.wire.requests import (
    CHECKPOINT_TENSORS,
    GROUP_TASK_NAME,
    JOBS_HEADER,
    TASK_NAME,
    GenerateRequest,
    State,
    is_job_id,
    parse_request,
)
from headrace.client.wire.results import Outcome, parse_outcome
from headrace.client.wire.signing import mark, sign
from headrace.client.wire.tracing import sending
from headrace.config import Settings, load_settings
from headrace.config.settings import redact_url, slug

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("headrace.client")

#: Job records written, or jobs cancelled, in one request.
RECORD_JOBS = 512
#: What one message holds at most: few jobs, so that several workers share a flood and a lost message costs little.
GROUP_JOBS, GROUP_BYTES = 16, 65_536
#: How often a wait without end says that nobody serves the queue.
REMIND_S = 30.0
#: How long it is taken for true which models are served.
SERVED_S = 1.0


class Client:
    """Submits jobs to one Redis and reads what became of them. Use it as a context manager, or call `close`.

    Args:
        redis_url: HEADRACE_REDIS_URL if not given, else the embedded server of this user's data directory, else
            localhost. Which of the two is looked up for each new connection, so the server may start after the client.
        model: the model whose queue jobs go to that name none; the first of HEADRACE_MODEL if not given.
        settings: all settings at once, instead of the environment.

    Raises:
        SettingsError: a setting is unknown or has a value it cannot have.
    """

    def __init__(
        self, *, redis_url: str | None = None, model: str | None = None, settings: Settings | None = None
    ) -> None:
        settings = settings or load_settings()
        if redis_url is not None:
            settings = load_settings(**{**settings.model_dump(), "redis_url": redis_url})
        self.settings = settings
        self.url = resolve_url(settings)
        self.model_name = slug(model) if model is not None else settings.model_name
        self._own_models = {self.model_name, *settings.models}
        self._served: Served | None = None
        self._served_at = -SERVED_S
        self._redis = connect(self.url)
        self._app = producer_app(settings, self.url)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Jobs go on."""
        self._redis.close()
        self._app.close()
        if "celery_app" in self.__dict__:
            self.celery_app.close()

    def submit(self, prompt: str | Sequence[int], *, id: str | None = None, **params: Any) -> Job:  # noqa: A002
        """Queue one prompt.

        Args:
            prompt: text, or token ids. The empty text stands for the end-of-text token.
            id: a name of your own for the job; submitting the same request again under it gives the same job.
            params: sampling parameters (client.wire.requests.SamplingParams), `priority`, `model`, `stream` (True if
                `Job.stream` is to give the text as it comes), and `timeout_s`, the seconds after which nobody wants
                the result any more.

        Raises:
            InvalidRequest: a parameter is wrong, or there are workers and none of them serves the model that it names,
                nor has for a day; nothing was queued.
            QueueFull: the queue takes no more; nothing was queued.
            RedisUnreachable: Redis does not answer; nothing was accepted, so far as is known.
            RedisRefused: Redis answers with an error; nothing was accepted.
        """
        draft = self._prepare({"prompt": prompt, "id": id, **params})
        self._check_served([draft])
        return self._queue([draft])[0]

    def submit_many(self, requests: Iterable[str | Sequence[int] | Mapping[str, Any]], **params: Any) -> list[Job]:
        """Queue many prompts: each a text, token ids, or a mapping with `prompt` and parameters of its own.

        All are checked before the first is queued. `params` hold for those that do not say otherwise. Up to GROUP_JOBS
        of them travel in one message; each has an id, a state and a result of its own, and is cancelled alone. The
        urgent ones are sent first.

        Raises:
            InvalidRequest: one is wrong, `requests[3].top_p` say, or there are none; nothing was queued.
            QueueFull: the queue does not take that many; nothing was queued.
            RedisUnreachable, RedisRefused: Redis does not answer, or with an error; `accepted` holds the jobs that were
                queued before, by their place in `requests`.
        """
        if isinstance(requests, (str, Mapping)) or not isinstance(requests, Iterable):
            raise InvalidRequest("requests", f"a {type(requests).__name__}", "a list of prompts; use submit for one")
        drafts = []
        for index, request in enumerate(requests):
            own = request if isinstance(request, Mapping) else {"prompt": request}
            try:
                drafts.append(self._prepare({**params, **own}))
            except InvalidRequest as error:
                raise InvalidRequest(f"requests[{index}].{error.field}", error.value, error.expected) from None
        if not drafts:
            raise InvalidRequest("requests", "an empty list", "at least one prompt")
        self._check_served(drafts)
        return self._queue(drafts)

    def batch(
        self,
        source: str | Path | IO[bytes] | Iterable[Any],
        output: str | Path,
        *,
        text: bool = False,
        limit: int | None = None,
        params: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchReport:
        """Compute all rows of a file or an iterable into a file, as `headrace batch` does; see its help, and README.

        Args:
            source: a path (JSON lines, gzipped or not; with `text` a prompt a line), or an iterable of prompts, token
                ids and mappings with `prompt`, parameters and `custom_id`.
            output: JSON lines in the form of the OpenAI Batch API, appended to as rows are done; zipped if its name
                ends in `.gz`.
            limit: only the first rows.
            params: for rows that do not say otherwise.
            options: those of `client.bulk.Batch.run`: errors, resume, retry_errors, overwrite, max_inflight, ordered.

        Raises:
            InvalidBatch: rows are wrong, or the output has other requests under the same names; nothing was queued.
            OutputRefused: the output must not or cannot be written.
        """
        named: set[str] | None = None
        with contextlib.suppress(RedisUnreachable, RedisRefused):  # the batch waits for a Redis that is away
            named = self.models() if (served := self._look_who_serves()) and served.now else None
        return Batch(self, source, params, text=text, limit=limit, models=named).run(output, **options)

    def map(
        self,
        prompts: Iterable[Any],
        *,
        max_inflight: int = MAX_INFLIGHT,
        return_exceptions: bool = False,
        **params: Any,
    ) -> Iterator[Any]:
        """The results of prompts in their order, read from any iterable no further than `max_inflight` ahead.

        Args:
            prompts: texts, token ids, or mappings with `prompt` and parameters of their own, which may be wrapped as
                pyarrow, numpy and pandas do: a column of a table, a data set, a generator.
            return_exceptions: give an error in the place of a result, instead of raising it there.
            params: for prompts that do not say otherwise.

        Raises:
            InvalidRequest, JobFailed, JobExpired, ...: at the prompt in question. What is outstanding is cancelled
                then, as it is when the iterator is closed.
        """
        return map_prompts(self, prompts, params, max_inflight=max_inflight, return_exceptions=return_exceptions)

    def job(self, job_id: str) -> Job:
        """A handle on a job that was submitted anywhere. Nothing is asked of Redis yet."""
        return Job(job_id, self)

    @overload
    def cancel(self, jobs: str | Handle) -> bool: ...  # type: ignore[overload-overlap]
    @overload
    def cancel(self, jobs: Iterable[str | Handle]) -> list[bool]: ...
    def cancel(self, jobs: str | Handle | Iterable[str | Handle]) -> bool | list[bool]:
        """Ask for a job, or for many, to be cancelled; jobs or their ids. Many take a few requests, not a few each.

        A running one stops at its next token and its slot is free, a queued one ends when a worker meets it. Returns
        whether that could still have an effect: a bool, or for many a list of them.

        Raises:
            UnknownJob: there is no such job; of many, none was cancelled in whose part of RECORD_JOBS one is unknown.
            RedisUnreachable, RedisRefused: Redis does not answer, or with an error.
        """
        if isinstance(jobs, (str, Handle)):
            return self._cancel([_id_of(jobs)])[0]
        job_ids = [_id_of(job) for job in jobs]
        parts = [job_ids[start : start + RECORD_JOBS] for start in range(0, len(job_ids), RECORD_JOBS)]
        return [flag for part in parts for flag in self._cancel(part)]

    def as_completed(self, jobs: Iterable[Job], timeout: float | None = None) -> Iterator[Job]:
        """The jobs as they end, in whatever way; `job.result()` then answers at once.

        Raises:
            ResultTimeout: some have not ended after `timeout` seconds in all.
            UnknownJob, RedisUnreachable: as for `Job.result`.
        """
        waiting = {job.id: job for job in jobs}
        check_home(waiting.values(), self.url)
        for job in [job for job in waiting.values() if job._outcome is not None]:
            yield waiting.pop(job.id)
        for news in self._watch(waiting, timeout):
            for job_id, outcome in news.outcomes.items():
                waiting[job_id]._outcome = outcome
                yield waiting.pop(job_id)

    def signature(self, prompt: str | Sequence[int], *, id: str | None = None, **params: Any) -> Signature:  # noqa: A002
        """A job as a signature of Celery's, for `group`, `chord` and `chain`; docs/client.md has examples.

        Takes what `submit` takes, checks it as `submit` does, and queues nothing; `timeout_s` counts from now on. It is
        immutable: what a task before it in a chain returned is not handed to it. Its result is `client.Result` as JSON.
        """
        draft = self._prepare({"prompt": prompt, "id": id, **params})
        return self.celery_app.signature(
            TASK_NAME,
            args=(draft.wire,),
            immutable=True,
            task_id=draft.id,
            queue=keys.queue(draft.model),
            priority=keys.PRIORITIES[draft.request.priority],
            argsrepr="<redacted>",
            kwargsrepr="{}",
        )

    @functools.cached_property
    def celery_app(self) -> Celery:
        """A Celery app on the same Redis: for `signature`, for `AsyncResult(id, app=...)`, for tasks of your own."""
        return results_app(self.settings, self.url)

    def status(self) -> Status:
        """Queues, workers and slots, now. Raises RedisUnreachable."""
        with self._reachable():
            return read_status(self._redis, self.model_name)

    def models(self) -> set[str]:
        """The models that jobs may name: those of this client, and those that are served, or were within a day.

        While no worker lives, jobs may name any. Raises RedisUnreachable.
        """
        served = self._look_who_serves()
        return self._own_models if served is None else self._own_models | served.now | served.lately

    # --- submitting ------------------------------------------------------------------------------------------------

    def _prepare(self, fields: dict[str, Any]) -> _Draft:
        """Check everything that can be known without the model, and choose id and seed."""
        job_id, model, timeout_s = fields.pop("id", None), fields.pop("model", None), fields.pop("timeout_s", None)
        for internal, instead in {"expires_at": "use timeout_s", "schema_version": "it is set for you"}.items():
            if internal in fields:
                raise InvalidRequest(internal, repr(fields[internal])[:80], f"no such parameter; {instead}")
        if timeout_s is not None:
            if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < 1e9:
                raise InvalidRequest("timeout_s", repr(timeout_s), "a number of seconds above 0, or None")
            fields["expires_at"] = time.time() + timeout_s
        request = parse_request({name: value for name, value in fields.items() if value is not None})
        job_model = _check_model(model) or self.model_name
        digest = _digest(request, job_model) if job_id is not None else ""
        if request.seed is None:
            # Chosen here, so that a job computed again after a crash draws the same numbers.
            request = request.model_copy(update={"seed": secrets.randbits(52)})
        return self._signed(_Draft(_check_id(job_id), job_model, request, digest))

    def _signed(self, draft: _Draft) -> _Draft:
        if signing_keys := self.settings.signing_keys:
            draft.wire = sign(signing_keys[0], draft.id, draft.model, draft.wire)
            draft.mark = mark(signing_keys[0], draft.id)
        return draft

    def _look_who_serves(self) -> Served | None:
        if time.monotonic() - self._served_at >= SERVED_S:
            with self._reachable():
                self._served = read_served(self._redis)
            self._served_at = time.monotonic()
        return self._served

    def _check_served(self, drafts: Iterable[_Draft]) -> None:
        """Refuse models that are spelt wrong. This client's own may wait for a worker; others too, while none lives."""
        others = {draft.model for draft in drafts} - self._own_models
        served = self._look_who_serves() if others else None
        if served and served.now and (unknown := sorted(others - served.now - served.lately)):
            expected = f"one that is served: {', '.join(sorted(served.now))}"
            raise InvalidRequest("model", repr(unknown[0]), expected)

    def _queue(self, drafts: list[_Draft]) -> list[Job]:
        accepted: set[str] = set()
        try:
            with self._reachable():
                self._check_room(drafts)
                self._check_ids(drafts)
                with self._app.producer_pool.acquire(block=True) as producer:
                    ordered = sorted(drafts, key=_urgency)
                    for start in range(0, len(drafts), RECORD_JOBS):
                        part = ordered[start : start + RECORD_JOBS]
                        new = self._record(part)
                        accepted |= {draft.id for draft in part} - new.keys()
                        for group in _groups(new.values()):
                            self._publish(group, producer)
                            accepted |= {draft.id for draft in group}
        except (RedisUnreachable, RedisRefused) as error:
            error.accepted = {i: Job(draft.id, self) for i, draft in enumerate(drafts) if draft.id in accepted}
            raise
        return [Job(draft.id, self) for draft in drafts]

    def _check_room(self, drafts: list[_Draft]) -> None:
        limit = self.settings.max_queue
        for model, new in Counter(draft.model for draft in drafts).items():
            pipe = self._redis.pipeline(transaction=False)
            for name in keys.queue_lists(model):
                pipe.llen(name)
            if sum(pipe.execute()) * GROUP_JOBS + new <= limit:
                continue  # there is room even if every message is full
            depth = sum(count_queued(self._redis, model))
            if depth + new > limit:
                raise QueueFull(keys.queue(model), depth, limit)

    def _check_ids(self, drafts: list[_Draft]) -> None:
        """Refuse ids that other requests have, before anything is queued."""
        named = [draft for draft in drafts if draft.digest]
        seen: dict[str, str] = {}
        pipe = self._redis.pipeline(transaction=False)
        for draft in named:
            pipe.hget(keys.job(draft.id), "digest")
        for draft, stored in zip(named, pipe.execute(), strict=True):
            if (stored or draft.digest) != draft.digest or seen.setdefault(draft.id, draft.digest) != draft.digest:
                raise _used(draft.id)

    def _record(self, drafts: list[_Draft]) -> dict[str, _Draft]:
        """Write the jobs' records. Returns those that have to be published, by id: not those that are repetitions."""
        named = [draft for draft in drafts if draft.digest]
        pipe = self._redis.pipeline()
        for draft in named:
            name = keys.job(draft.id)
            pipe.hsetnx(name, "digest", draft.digest)
            pipe.hmget(name, "digest", "published")
            for field, value in draft.record().items():
                pipe.hsetnx(name, field, value)
            pipe.expire(name, keys.UNFINISHED_TTL_S)
        for draft in drafts:
            if not draft.digest:  # an id that nobody else has: nothing can be there
                pipe.hset(keys.job(draft.id), mapping=draft.record())
                pipe.expire(keys.job(draft.id), keys.UNFINISHED_TTL_S)
        answers = pipe.execute()
        new = {draft.id: draft for draft in drafts}
        step = 3 + len(drafts[0].record())  # answers for each
        for draft, (digest, published) in zip(named, answers[1 : step * len(named) : step], strict=True):
            if digest != draft.digest:
                raise _used(draft.id)
            if published:
                new.pop(draft.id, None)
        return new

    def _publish(self, group: list[_Draft], producer: Any) -> None:
        """Send one message: a job alone goes as itself, so that Celery knows it by its id."""
        first, alone = group[0], len(group) == 1
        wires = [{"id": draft.id, "request": draft.wire} for draft in group]
        with sending([draft.id for draft in group], keys.queue(first.model)) as headers:
            self._app.send_task(
                TASK_NAME if alone else GROUP_TASK_NAME,
                args=[first.wire if alone else wires],
                task_id=first.id if alone else uuid.uuid4().hex,
                queue=queue(first.model),
                priority=keys.PRIORITIES[first.request.priority],
                argsrepr="<redacted>",  # it goes into headers and events, and the prompt must not
                kwargsrepr="{}",
                headers=headers if alone else {**headers, JOBS_HEADER: len(group)},
                ignore_result=not alone,
                producer=producer,
                # A list needs no declaration. If the connection is lost during one, kombu goes on with the channel that
                # it has closed, and fails with an AttributeError.
                declare=[],
            )
        self._announce(group)

    def _announce(self, group: list[_Draft]) -> None:
        """Note that a message was sent, and wake a worker that waits.

        Neither has to succeed: an id that is submitted again is then sent again, to the same single result, and a
        worker finds the message by itself a little later.
        """
        pipe = self._redis.pipeline(transaction=False)
        for draft in group:
            if draft.digest:
                pipe.hset(keys.job(draft.id), "published", "1")
        hint = keys.hint(group[0].model)
        pipe.lpush(hint, "1")
        pipe.ltrim(hint, 0, keys.HINTS - 1)
        pipe.expire(hint, keys.HINT_TTL_S)
        with contextlib.suppress(redis.RedisError):
            pipe.execute()

    # --- reading ---------------------------------------------------------------------------------------------------

    def _look(self, job_id: str) -> tuple[Outcome | None, State]:
        ((outcome, state),) = self._look_at([job_id])
        return outcome, cast("State", state)

    def _look_at(self, job_ids: list[str]) -> list[tuple[Outcome | None, str | None]]:
        """Outcomes and states of jobs. Raises UnknownJob, UnreadableRecord."""
        with self._reachable():
            pipe = self._redis.pipeline(transaction=False)
            for job_id in job_ids:
                pipe.get(keys.result(job_id))
                pipe.hget(keys.job(job_id), "state")
            answers = [_no_record(answer) for answer in pipe.execute(raise_on_error=False)]
        found = [(parse_outcome(record), state) for record, state in zip(answers[::2], answers[1::2], strict=True)]
        for job_id, (outcome, state) in zip(job_ids, found, strict=True):
            if outcome is None and state is None:
                raise self._unknown(job_id)
            if outcome is None and state not in ("queued", "running"):
                raise UnreadableRecord(job_id).about(Job(job_id, self))
        return found

    def _cancel(self, job_ids: list[str]) -> list[bool]:
        open_jobs = [j for j, (outcome, _) in zip(job_ids, self._look_at(job_ids), strict=True) if outcome is None]
        ended = set(job_ids).difference(open_jobs)
        if open_jobs:
            with self._reachable():
                pipe = self._redis.pipeline(transaction=False)
                for job_id in open_jobs:
                    pipe.set(keys.cancel(job_id), "1", ex=keys.UNFINISHED_TTL_S)
                pipe.mget([keys.result(job_id) for job_id in open_jobs])
                records = pipe.execute()[-1]
                # Those that have ended meanwhile: nobody else would take the key away.
                late = {j for j, record in zip(open_jobs, records, strict=True) if parse_outcome(record) is not None}
                for job_id in late:
                    pipe.expire(keys.cancel(job_id), 0)  # not DEL, to which a client has no right
                pipe.execute()
            ended |= late
        return [job_id not in ended for job_id in job_ids]

    def _watch(self, job_ids: Iterable[str], timeout: float | None, *, events: bool = False) -> Iterator[News]:
        """News of jobs, with their events if asked, until the outcome of each has come."""
        check_timeout(timeout)
        watch = Watch()
        for job_id in job_ids:
            watch.add(job_id, events=events)
        started, remind = time.monotonic(), REMIND_S
        while watch:
            left = LAST_POLL_S if timeout is None else max(0.0, started + timeout - time.monotonic())
            if news := self._turn(watch, left):
                yield news
            elif timeout is not None and time.monotonic() - started >= timeout:
                raise self._late(next(iter(watch)), timeout)
            elif timeout is None and time.monotonic() - started > remind:
                remind += REMIND_S
                self._remind(list(watch))
            if watch:
                time.sleep(min(watch.rest_s, left))

    def _ask(self, watch: Watch, block_s: float = 0.0) -> News:
        """One round trip. Raises RedisUnreachable, RedisRefused."""
        with self._reachable():
            pipe = self._redis.pipeline(transaction=False)
            for command in watch.request(block_s):
                pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            return watch.answer(pipe.execute())

    def _turn(self, watch: Watch, block_s: float) -> News:
        """Ask once. Raises UnknownJob, and RedisUnreachable when it is time to give up."""
        try:
            news = self._ask(watch, block_s)
        except RedisUnreachable:
            if watch.failed():
                raise
            return News()
        for job_id in news.unknown:
            raise self._unknown(job_id)
        return news

    def _checkpoints(self, job_id: str, max_bytes: int | None = None) -> dict[str, np.ndarray]:
        """With `max_bytes` only tensors that are known by name, and InvalidRequest where they take more together."""
        from safetensors import SafetensorError
        from safetensors.numpy import load  # numpy takes a while to import, and few need it

        with self._reachable(), connect(self.url, text=False) as connection:
            if max_bytes is None:
                fields = cast("dict[bytes, bytes]", connection.hgetall(keys.checkpoint(job_id)))
            else:
                fields = _read_dump(connection, job_id, max_bytes)
        if not fields:
            raise NoCheckpoints(job_id).about(Job(job_id, self))
        try:
            found = {name.decode(): load(data)["tensor"] for name, data in fields.items()}
        except (SafetensorError, KeyError, UnicodeDecodeError) as error:
            raise NoCheckpoints(job_id).about(Job(job_id, self)) from error
        order = [name for names in CHECKPOINT_TENSORS.values() for name in names]
        return {name: found[name] for name in dict.fromkeys([*order, *sorted(found)]) if name in found}

    def _unknown(self, job_id: str) -> UnknownJob:
        return UnknownJob(job_id).about(Job(job_id, self))

    def _late(self, job_id: str, timeout: float) -> ResultTimeout:
        outcome, state = self._look(job_id)
        model = self._model_of(job_id)
        if outcome is None and not self.status().serves(model):
            return NoWorker(job_id, timeout, state, keys.queue(model)).about(Job(job_id, self))
        return ResultTimeout(job_id, timeout, state).about(Job(job_id, self))

    def _remind(self, waiting: list[str]) -> None:
        with contextlib.suppress(RedisUnreachable):
            model = self._model_of(waiting[0])
            if not self.status().serves(model):
                log.warning(
                    "%d jobs wait and no worker serves queue %s; start one with `celery -A worker worker`",
                    len(waiting),
                    keys.queue(model),
                )

    def _model_of(self, job_id: str) -> str:
        with self._reachable():
            model = cast("str | None", self._redis.hget(keys.job(job_id), "model"))
        return model if model is not None and model == slug(model) else self.model_name

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        """Errors of connections, whichever library raised them, as one of ours."""
        try:
            yield
        except (redis.ConnectionError, redis.TimeoutError, OperationalError, ConnectionError) as error:
            if isinstance(error, RedisUnreachable):
                raise
            url = redact_url(current_url(self.url))
            if isinstance(error.__cause__, redis.ResponseError):  # kombu's, of a message that was refused
                raise RedisRefused(url, str(error)) from error
            raise RedisUnreachable(url, explain(self.url, error)) from error
        except redis.RedisError as error:
            raise RedisRefused(redact_url(current_url(self.url)), str(error)) from error


class _Draft:
    """A job that has been checked and not been queued."""

    def __init__(self, job_id: str, model: str, request: GenerateRequest, digest: str) -> None:
        self.id, self.model, self.request, self.digest = job_id, model, request, digest
        self.wire = request.to_wire()
        self.mark: str | None = None

    def record(self) -> dict[Any, Any]:
        """The first fields of the job's record."""
        record = {"state": "queued", "model": self.model, "submitted_at": f"{time.time():.6f}"}
        return record if self.mark is None else {**record, "mark": self.mark}


def _urgency(draft: _Draft) -> int:
    """The less, the sooner. What is sent first may fill a worker's slots before it hears of the rest."""
    return keys.PRIORITIES[draft.request.priority]


def _groups(drafts: Iterable[_Draft]) -> Iterator[list[_Draft]]:
    """The jobs of each message: of one queue and priority, in the order they came. They come sorted by urgency."""
    for _, same in itertools.groupby(drafts, _urgency):
        open_groups: dict[str, tuple[list[_Draft], int]] = {}
        for draft in same:
            group, used = open_groups.get(draft.model, ([], 0))
            size = len(json.dumps(draft.wire))
            if group and (len(group) == GROUP_JOBS or used + size > GROUP_BYTES):
                yield group
                group, used = [], 0
            open_groups[draft.model] = ([*group, draft], used + size)
        for group, _ in open_groups.values():
            yield group


def _read_dump(connection: redis.Redis, job_id: str, max_bytes: int) -> dict[bytes, bytes]:
    """A job's tensors one by one, as far as they are allowed; what is in Redis may be of any size."""
    fields, size = {}, 0
    for name in dict.fromkeys(name for names in CHECKPOINT_TENSORS.values() for name in names):
        data = cast("bytes | None", connection.hget(keys.checkpoint(job_id), name))
        if data is not None:
            fields[name.encode()] = data
            size += len(data)
        if size > max_bytes:
            expected = f"{max_bytes} at most; ask for fewer (8, the logits, is the largest), or shorten the prompt"
            raise InvalidRequest("checkpoints", f"over {max_bytes} bytes of tensors of job {job_id}", expected)
    return fields


def _no_record(answer: Any) -> str | None:
    """An answer of Redis's to a question for a record; "" for what is of another type than any record."""
    if isinstance(answer, Exception):
        if "WRONGTYPE" in str(answer):
            return ""
        raise answer
    return cast("str | None", answer)


def _digest(request: GenerateRequest, model: str) -> str:
    """What makes two requests the same one: all but when it expires, which moves with the clock."""
    wire = {"model": model, **request.model_copy(update={"expires_at": None}).to_wire()}
    return hashlib.sha256(json.dumps(wire, sort_keys=True).encode()).hexdigest()[:16]


def _used(job_id: str) -> InvalidRequest:
    return InvalidRequest("id", repr(job_id), "an id that no other request has; this one was used already")


def check_timeout(timeout: Any) -> None:
    """Refuse what is no timeout."""
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
        raise InvalidRequest("timeout", repr(timeout)[:80], "a number of seconds from 0, or None")


def check_home(jobs: Iterable[Handle], url: str) -> None:
    """Refuse jobs of another Redis."""
    for job in jobs:
        if job._url != url:
            raise InvalidRequest("jobs", f"job {job.id} of another Redis", "jobs of this client")


def _id_of(job: Any) -> str:
    job_id = job.id if isinstance(job, Handle) else job
    if not is_job_id(job_id):
        raise InvalidRequest("job", repr(job_id)[:80], "a job, or its id")
    return job_id


def _check_id(job_id: Any) -> str:
    if job_id is None:
        return uuid.uuid4().hex
    if not is_job_id(job_id):
        raise InvalidRequest("id", repr(job_id)[:80], "1 to 128 letters, digits, '.', '_', '-' or ':'")
    return job_id


def _check_model(model: Any) -> str | None:
    if model is None:
        return None
    if not isinstance(model, str) or not model or len(model) > 256:
        raise InvalidRequest("model", repr(model)[:80], "the name of a model that a worker serves")
    return slug(model)

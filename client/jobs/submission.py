"""Submitting: check requests, write the records of the jobs, and publish their messages.

Jobs that are submitted together share messages, because a message costs more than a short job. Each job still has its
own id, state and result.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import redis
from celery import Celery

from headrace.client.jobs.grouping import GROUP_JOBS, groups
from headrace.client.jobs.own_fields import check_id, check_model, check_timeout_s
from headrace.client.jobs.prepared import PreparedJob
from headrace.client.jobs.request_checks import check_request
from headrace.client.jobs.served import ServedModels
from headrace.client.jobs.server_check import ServerCheck
from headrace.client.jobs.together import MAX_RESPONSE_RESULTS, check_copies, check_response
from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME, JOBS_HEADER, TASK_NAME, queue
from headrace.client.wire.errors import InvalidRequest, QueueFull, RedisRefused, RedisUnreachable
from headrace.client.wire.job_index import JobIndex
from headrace.client.wire.queue_depth import count_queued
from headrace.client.wire.redis import redis_errors
from headrace.client.wire.requests import INTERNAL_NAMES, GenerateRequest, Operation, parse_request
from headrace.client.wire.tracing import sending
from headrace.client.wire.values import is_missing, show
from headrace.config import Settings

T = TypeVar("T")

#: Number of job records that are written in one round trip.
RECORD_JOBS = 512
#: Pauses between attempts to note that a message was sent.
ANNOUNCE_PAUSES_S = (0.1, 0.5, 1.0)
#: Fields that may differ between jobs that share their parameters.
OWN_FIELDS = frozenset({"prompt", "seed", "id"})


class Submitter:
    """Submits jobs to one Redis.

    Args:
        settings: of the client; `max_queue` and the signing key are used.
        connection: to the Redis at `url`.
        app: a Celery app that publishes to the same Redis.
        model_name: the model of requests that name none.
    """

    def __init__(self, settings: Settings, url: str, connection: redis.Redis, app: Celery, *, model_name: str) -> None:
        self._settings, self._url, self._redis, self._app, self._model_name = settings, url, connection, app, model_name
        #: The models that requests may name.
        self.models = ServedModels(connection, url, {model_name, *settings.models})
        #: The Redis, and its clock.
        self.server = ServerCheck(connection, url, allow_unsuitable=settings.redis_unsuitable == "allow")
        self._index = JobIndex()

    def prepare(self, fields: Mapping[str, Any], *, operation: Operation | None = None) -> PreparedJob:
        """Check everything that can be checked without the model, and choose the job id and the seed.

        Args:
            fields: what `Client.submit` takes.
            operation: what the job asks for in place of text.

        Raises:
            InvalidRequest: a field is wrong.
        """
        given = {name: value for name, value in fields.items() if not is_missing(value)}
        job_id, model, timeout_s = given.pop("id", None), given.pop("model", None), given.pop("timeout_s", None)
        for internal, advice in INTERNAL_NAMES.items():
            if internal in given:
                raise InvalidRequest(internal, show(given[internal]), f"no such parameter; {advice}")
        if timeout_s is not None:
            timeout_s = check_timeout_s(timeout_s)
        request = parse_request(given if operation is None else {**given, "operation": operation})
        check_request(request, self._settings.max_result_bytes)
        named, model = model, self._model_name if model is None else check_model(model)
        digest = _digest(request, model) if job_id is not None else ""
        if request.seed is None:
            # Chosen here, so that a job that is computed again after a crash draws the same numbers.
            request = request.model_copy(update={"seed": secrets.randbits(52)})
        key = next(iter(self._settings.signing_keys), None)
        return PreparedJob(
            uuid.uuid4().hex if job_id is None else check_id(job_id),
            model,
            request,
            digest=digest,
            key=key,
            timeout_s=timeout_s,
            clock=self.server.clock,
            named=named,
        )

    def prepare_all(self, requests: Iterable[Mapping[str, Any]]) -> Iterator[PreparedJob]:
        """`prepare` many requests. Parameters that one shares with the request before it are checked once.

        Parameters are shared if they are the same objects: comparing long ones would cost as much as checking them.
        """
        before: Mapping[str, Any] = {}
        job: PreparedJob | None = None
        for fields in requests:
            if job is not None and _share_parameters(before, fields):
                yield self._prepare_like(job, fields)
            else:
                before, job = fields, self.prepare(fields)
                yield job

    def prepare_together(self, requests: Sequence[Mapping[str, Any]]) -> Iterator[PreparedJob]:
        """`prepare_all` the prompts of one request, whose copies and results together are bounded.

        Raises:
            InvalidRequest: they are too large, or a field is wrong.
        """
        prompts = [fields.get("prompt") for fields in requests]
        params = {name: value for name, value in requests[0].items() if name not in OWN_FIELDS}
        check_copies(len(requests), params)
        check_response(prompts, params, MAX_RESPONSE_RESULTS * self._settings.max_result_bytes)
        return self.prepare_all(requests)

    def _prepare_like(self, job: PreparedJob, fields: Mapping[str, Any]) -> PreparedJob:
        """`prepare` a request whose parameters are those of `job`, which need no check."""
        own = parse_request({name: fields.get(name) for name in ("prompt", "seed")})
        request = job.request.model_copy(update={"prompt": own.prompt, "seed": own.seed})
        check_request(request, self._settings.max_result_bytes)
        job_id = None if is_missing(fields.get("id")) else check_id(fields["id"])
        digest = "" if job_id is None else _digest(request, job.model)
        if request.seed is None:
            request = request.model_copy(update={"seed": secrets.randbits(52)})
        return job.like(job_id, request, digest)

    def check_models(self, jobs: Iterable[PreparedJob]) -> None:
        """Refuse jobs for models or adapters that no worker has; see `ServedModels`."""
        named, wanted = dict[str, str](), set[tuple[str, str]]()
        for job in jobs:
            named[job.model] = job.named
            if job.request.adapter is not None:
                wanted.add((job.model, job.request.adapter))
        self.models.check(named)
        self.models.check_adapters(wanted)

    def submit(self, jobs: list[PreparedJob]) -> None:
        """Write the records of the jobs and publish their messages, the most urgent first.

        Raises:
            InvalidRequest: a job id belongs to another request; nothing was queued.
            QueueFull: a queue does not accept that many jobs; nothing was queued.
            RedisUnsuitable: Redis would lose the jobs; nothing was queued.
            RedisUnreachable, RedisRefused: Redis does not answer, or answers with an error. `accepted` has the ids of
                the jobs that were queued before, by their index in `jobs`.
        """
        self.server.before_submit()
        accepted: set[str] = set()
        try:
            with redis_errors(self._url):
                self._check_room(jobs)
                existing = self._check_ids(jobs)
                with self._app.producer_pool.acquire(block=True) as producer:
                    ordered = sorted(jobs, key=lambda job: job.urgency)
                    for start in range(0, len(jobs), RECORD_JOBS):
                        part = ordered[start : start + RECORD_JOBS]
                        new = self._write_records(part, existing)
                        accepted |= {job.id for job in part} - new.keys()
                        for group in groups(new.values()):
                            self._publish(group, producer)
                            accepted |= {job.id for job in group}
        except (RedisUnreachable, RedisRefused) as error:
            error.accepted = {index: job.id for index, job in enumerate(jobs) if job.id in accepted}
            raise

    def _check_room(self, jobs: list[PreparedJob]) -> None:
        limit = self._settings.max_queue
        for model, new in Counter(job.model for job in jobs).items():
            pipe = self._redis.pipeline(transaction=False)
            for name in keys.queue_lists(model):
                pipe.llen(name)
            if sum(pipe.execute()) * GROUP_JOBS + new <= limit:
                continue  # there is room even if every message holds GROUP_JOBS
            depth = sum(count_queued(self._redis, model))
            if depth + new > limit:
                raise QueueFull(keys.queue(model), depth, limit)

    def _check_ids(self, jobs: list[PreparedJob]) -> set[str]:
        """Refuse ids that belong to other requests, before anything is queued. Returns the ids that have records."""
        named = [job for job in jobs if job.digest]
        seen: dict[str, str] = {}
        pipe = self._redis.pipeline(transaction=False)
        for job in named:
            pipe.hget(keys.job(job.id), "digest")
        digests = pipe.execute()
        for job, stored in zip(named, digests, strict=True):
            if (stored or job.digest) != job.digest or seen.setdefault(job.id, job.digest) != job.digest:
                raise _id_is_used(job.id)
        return {job.id for job, stored in zip(named, digests, strict=True) if stored}

    def _write_records(self, jobs: list[PreparedJob], existing: Container[str] = ()) -> dict[str, PreparedJob]:
        """Write the records of the jobs, to last until the messages were sent. `existing` keep their lifetimes.

        Returns:
            The jobs that have to be published, by id: all but those that were published before under the same id.
        """
        if not jobs:
            return {}
        named = [job for job in jobs if job.digest]
        pipe = self._redis.pipeline()
        for job in named:
            name = keys.job(job.id)
            # What is there is complete and has a lifetime, and if the job has ended, it must not outlive the result. A
            # command that writes a field would make a record without a lifetime, if Redis loses it now.
            if job.id in existing:
                pipe.hmget(name, "digest", "published")
                continue
            pipe.hsetnx(name, "digest", job.digest)
            for field, value in job.record().items():
                pipe.hsetnx(name, field, value)
            pipe.expire(name, keys.UNSENT_TTL_S)
            pipe.hmget(name, "digest", "published")
        for job in jobs:
            if not job.digest:  # its id was chosen here, so there is no record yet
                pipe.hset(keys.job(job.id), mapping=job.record())
                pipe.expire(keys.job(job.id), keys.UNSENT_TTL_S)
        found = [answer for answer in pipe.execute() if isinstance(answer, list)]
        new = {job.id: job for job in jobs}
        if gone := [job for job, (digest, _) in zip(named, found, strict=True) if digest is None]:
            self._write_records(gone)  # Redis has lost them since they were looked for
        for job, (digest, published) in zip(named, found, strict=True):
            if digest not in (job.digest, None):
                raise _id_is_used(job.id)
            if published:
                new.pop(job.id, None)
        return new

    def _publish(self, group: list[PreparedJob], producer: Any) -> None:
        """Send one message. The message of a single job has the job's id, so that Celery knows the job by it."""
        first, is_single = group[0], len(group) == 1
        wires = [{"id": job.id, "request": job.wire} for job in group]
        with sending([job.id for job in group], keys.queue(first.model)) as headers:
            self._app.send_task(
                TASK_NAME if is_single else GROUP_TASK_NAME,
                args=[first.wire if is_single else wires],
                task_id=first.id if is_single else uuid.uuid4().hex,
                queue=queue(first.model),
                priority=first.urgency,
                argsrepr="<redacted>",  # headers and events contain argsrepr, and must not contain the prompt
                kwargsrepr="{}",
                headers=headers if is_single else {**headers, JOBS_HEADER: len(group)},
                ignore_result=not is_single,
                producer=producer,
                # A Redis list needs no declaration. If the connection is lost during one, kombu continues with the
                # channel that it has closed, and fails with an AttributeError.
                declare=[],
            )
        self._announce(group)

    def _announce(self, group: list[PreparedJob]) -> None:
        """Note in the records that the message was sent, list the jobs in the index, and wake an idle worker.

        A record that is missing now is not written again: Redis may have lost the message with it. A wake-up that is
        refused does no harm: a worker finds the message a little later.

        Raises:
            redis.RedisError: Redis does not answer, after ANNOUNCE_PAUSES_S. The records will expire.
        """
        if named := [job for job in group if job.digest]:
            gone = _patiently(lambda: self._mark_sent(named))
            group = [job for job in group if job.id not in gone]
        answers = _patiently(lambda: self._keep_records(group))
        pipe = self._redis.pipeline(transaction=False)
        for job, has_result in zip(group, answers[1 : 2 * len(group) : 2], strict=True):
            if has_result == 1:  # its record must not outlive the result
                pipe.expire(keys.job(job.id), self._settings.result_ttl_s)
        pipe.execute()

    def _mark_sent(self, jobs: list[PreparedJob]) -> set[str]:
        """Note that jobs with chosen ids were sent. Returns those that Redis has lost, which get no other record."""
        pipe = self._redis.pipeline()
        for job in jobs:
            pipe.hset(keys.job(job.id), "published", "1")
            pipe.expire(keys.job(job.id), keys.UNSENT_TTL_S)
            pipe.hget(keys.job(job.id), "digest")
        try:
            answers = pipe.execute(raise_on_error=False)
        except redis.ResponseError:  # Redis is full: at worst the same id is sent again, to the same single result
            return set()
        gone = {job.id for job, digest in zip(jobs, answers[2::3], strict=True) if digest is None}
        for job_id in gone:
            pipe.expire(keys.job(job_id), 0)  # not DEL: the Redis user of clients may not use it
        if gone:
            pipe.execute()
        return gone

    def _keep_records(self, group: list[PreparedJob]) -> list[Any]:
        """Lengthen the lifetimes of the records. The answers say of each job whether it has a record and a result."""
        pipe = self._redis.pipeline(transaction=False)
        for job in group:
            pipe.expire(keys.job(job.id), keys.UNFINISHED_TTL_S)
            pipe.exists(keys.result(job.id))
        for model in {job.model for job in group}:
            hint = keys.hint(model)
            pipe.lpush(hint, "1")
            pipe.ltrim(hint, 0, keys.HINTS - 1)
            pipe.expire(hint, keys.HINT_TTL_S)
        if group:
            self._index.add(pipe, group[0].model, [job.id for job in group], self.server.clock.now())
        return pipe.execute(raise_on_error=False)


def _patiently(call: Callable[[], T]) -> T:
    """Call a function again, after ANNOUNCE_PAUSES_S, while Redis cannot be reached."""
    for pause_s in ANNOUNCE_PAUSES_S:
        try:
            return call()
        except (redis.ConnectionError, redis.TimeoutError):
            time.sleep(pause_s)
    return call()


def _share_parameters(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (
        one.keys() == other.keys()
        and not is_missing(one.get("prompt"))
        and all(value is other[name] for name, value in one.items() if name not in OWN_FIELDS)
    )


def _digest(request: GenerateRequest, model: str) -> str:
    """A digest of the request and its model, but not of the time when it expires."""
    wire = {"model": model, **request.to_wire()}
    return hashlib.sha256(json.dumps(wire, sort_keys=True).encode()).hexdigest()[:16]


def _id_is_used(job_id: str) -> InvalidRequest:
    return InvalidRequest("id", repr(job_id), "an id that no other request has; this one was used already")

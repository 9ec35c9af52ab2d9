"""How many jobs of others a job waits for."""

from __future__ import annotations

from headrace.client.jobs.reading import JobReader
from headrace.client.jobs.status import Status
from headrace.client.wire import keys

#: Seconds without a result after which it is said that jobs wait behind those of others.
NOTICE_S = 2.0


def jobs_ahead(status: Status, model: str, urgency: int, own: int) -> int:
    """About how many jobs of others are computed before those of the caller, none of which runs yet.

    Args:
        status: of the caller's Redis.
        model: of the caller's jobs.
        urgency: of the caller's jobs, as Celery numbers priorities (`keys.PRIORITIES`).
        own: how many jobs the caller has.
    """
    queued = sum(
        int(getattr(each, priority))
        for each in status.queues
        for priority, number in keys.PRIORITIES.items()
        if each.model == model and number <= urgency
    )
    held = sum(worker.running + worker.waiting for worker in status.workers if worker.model == model)
    return max(0, queued + held - own)


def waiting_notice(reader: JobReader, job_id: str, model: str, urgency: int, own: int = 1) -> str | None:
    """A line for the user if the job, the oldest of the caller's, waits behind jobs of others; else None.

    Args:
        reader: of the caller's Redis.
        job_id: the id of the job.
        model: as for `jobs_ahead`.
        urgency: as for `jobs_ahead`.
        own: as for `jobs_ahead`.

    Raises:
        UnknownJob, UnreadableRecord, RedisUnreachable, RedisRefused: as `JobReader.poll`.
    """
    outcome, state = reader.poll(job_id)
    if outcome is not None or state != "queued":
        return None
    count = jobs_ahead(reader.status(), model, urgency, own)
    return f"waiting behind {count} job{'s' * (count > 1)} of others" if count else None

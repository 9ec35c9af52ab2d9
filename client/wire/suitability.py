"""Whether a Redis can hold jobs: it must not evict keys, must not be a cluster, and should write to disk.

A Redis that is a cache accepts jobs and deletes them when its memory is full, without an error. So clients, workers and
`headrace status` look at what the server says of itself, by INFO, before jobs depend on it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Literal

import redis
from pydantic import BaseModel

from headrace.client.wire.clock import RedisClock
from headrace.client.wire.embedded_redis import current_url
from headrace.client.wire.errors import RedisUnsuitable
from headrace.config.settings import redact_url

#: kombu uses ZRANGE ... BYSCORE REV and ZADD ... GT, which came with this version.
OLDEST_VERSION = (6, 2)

Persistence = Literal["append-only file", "snapshots", "none"]


class Finding(BaseModel):
    """Something about a Redis, and the line that changes it."""

    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}"


class ServerReport(BaseModel):
    """What a Redis says of itself. Fields are None where it says nothing.

    Attributes:
        server: product and version.
        eviction: the setting `maxmemory-policy`.
        persistence: how it writes its data to disk.
        problems: why it loses jobs or cannot hold them; clients and workers refuse it.
        warnings: what may lose jobs if the server ends.
        unchecked: why nothing is known; empty if it answered.
    """

    server: str | None = None
    eviction: str | None = None
    maxmemory: int | None = None
    cluster: bool | None = None
    persistence: Persistence | None = None
    problems: list[Finding] = []
    warnings: list[Finding] = []
    unchecked: str = ""


def read_report(connection: redis.Redis, clock: RedisClock) -> ServerReport:
    """Ask a Redis about itself, and its time for `clock`: one request, or two if it writes no append-only file.

    Raises:
        redis.ConnectionError, redis.TimeoutError: it does not answer.
    """
    pipe = connection.pipeline(transaction=False)
    pipe.time()
    pipe.info()
    sent_at = time.monotonic()
    now, info = pipe.execute(raise_on_error=False)  # a user may lack the right to ask
    clock.take(now, sent_at)
    if not isinstance(info, dict):
        return ServerReport(unchecked=str(info)[:200] if isinstance(info, Exception) else "INFO has an unknown form")
    save = None
    if _number(info, "aof_enabled") == 0:
        # Asked only now: where users have few rights, Redis logs each command that it denies.
        pipe.config_get("save")
        (answer,) = pipe.execute(raise_on_error=False)
        save = answer.get("save") if isinstance(answer, dict) else None
    return judge(info, save)


def judge(info: Mapping[str, Any], save: str | None) -> ServerReport:
    """Judge a Redis by its INFO.

    Args:
        info: all default sections. Servers that are compatible with Redis may lack fields.
        save: the setting `save`, for snapshots; None if it is not known.
    """
    policy, cluster = info.get("maxmemory_policy"), _number(info, "cluster_enabled")
    report = ServerReport(
        server=_product(info),
        eviction=str(policy) if policy else None,
        maxmemory=_number(info, "maxmemory"),
        cluster=None if cluster is None else bool(cluster),
        persistence=_persistence(_number(info, "aof_enabled"), save),
    )
    writable = info.get("role") == "slave" and _number(info, "slave_read_only") == 0
    report.problems = _problems(report, _version(info), writable_replica=writable)
    report.warnings = _warnings(report.persistence)
    return report


def _problems(
    report: ServerReport, version: tuple[int, int] | None, *, writable_replica: bool = False
) -> list[Finding]:
    found = []
    if writable_replica:  # one that is read-only refuses each job itself, and may be about to be promoted
        found.append(
            Finding(
                problem="it is a replica that can be written to: the next synchronization deletes the jobs",
                fix="set HEADRACE_REDIS_URL to its primary, and `replica-read-only yes` on the replica",
            )
        )
    if report.eviction not in (None, "noeviction"):
        found.append(
            Finding(
                problem=f"its maxmemory-policy is {report.eviction}, so it deletes jobs when its memory is full",
                fix="set `maxmemory-policy noeviction` in redis.conf or in the parameters of a managed Redis, and now "
                "by `redis-cli CONFIG SET maxmemory-policy noeviction`",
            )
        )
    if report.cluster:
        found.append(
            Finding(
                problem="it runs in cluster mode, where the keys of one job are on different nodes",
                fix="set `cluster-enabled no`, or use another Redis; replicas and Sentinels are supported",
            )
        )
    if version is not None and version < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        found.append(
            Finding(
                problem=f"it is version {version[0]}.{version[1]}, which lacks commands that workers use",
                fix=f"install Redis {oldest} or later, or Valkey",
            )
        )
    return found


def _warnings(persistence: Persistence | None) -> list[Finding]:
    problem = {
        "none": "it writes nothing to disk: when it ends, all jobs and results are lost",
        "snapshots": "it writes snapshots only: when it crashes, jobs since the last one are lost",
    }.get(persistence or "")
    fix = "set `appendonly yes` in redis.conf, and now by `redis-cli CONFIG SET appendonly yes`"
    return [Finding(problem=problem, fix=fix)] if problem else []


def _persistence(aof_enabled: int | None, save: str | None) -> Persistence | None:
    """How data is written to disk. If snapshots may be on, they count as on."""
    if aof_enabled is None:
        return None
    if aof_enabled:
        return "append-only file"
    return "none" if save is not None and not save.strip() else "snapshots"


def _product(info: Mapping[str, Any]) -> str | None:
    """Product and version. Compatible servers also give the version of Redis that they follow."""
    for product in ("valkey", "dragonfly", "garnet", "redis"):
        if version := info.get(f"{product}_version"):
            return f"{product} {str(version)[:40]}"
    return None


def _version(info: Mapping[str, Any]) -> tuple[int, int] | None:
    match = re.match(r"(\d{1,6})\.(\d{1,6})", str(info.get("redis_version", "")))
    return (int(match[1]), int(match[2])) if match else None


def _number(info: Mapping[str, Any], name: str) -> int | None:
    value = info.get(name)
    return value if type(value) is int else None


def check_suitable(url: str, report: ServerReport) -> None:
    """Refuse a Redis that loses jobs.

    Raises:
        RedisUnsuitable: it has a problem; the error has the lines to change.
    """
    if report.problems:
        raise RedisUnsuitable(redact_url(current_url(url)), "; also, ".join(map(str, report.problems)))

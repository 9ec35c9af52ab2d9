"""Reads the content of a message. Anybody who can reach the queue may have written it, so nothing in it is trusted."""

from __future__ import annotations

from typing import Any

import structlog

from headrace.client.wire import keys
from headrace.client.wire.celery import GROUP_TASK_NAME
from headrace.client.wire.errors import InvalidRequest, JobFailed
from headrace.client.wire.requests import WIRE_NAMES, GenerateRequest, is_job_id, parse_request
from headrace.client.wire.values import show, to_whole
from headrace.client.wire.version import SCHEMA_VERSION, is_readable

log = structlog.get_logger("headrace.worker")

BAD_SIGNATURE = (
    "the request has no signature that this worker accepts, and was not computed; give the client the first key of the "
    "worker's HEADRACE_SIGNING_KEY, and submit to the model that the worker serves"
)


#: In the delivery info of a message: the routing key that its sender wrote.
ADDRESSED_TO = "headrace_addressed_to"
#: Header: the model that a message is for. A message in the queue of another one is refused.
MODEL_HEADER = "model"


def model_of(delivery_info: Any) -> str | None:
    """Return the model of the queue that a message came from, or None if it came from no queue.

    For a queue that belongs to no model this is its name in parentheses, which is the name of no model.
    """
    queue = delivery_info.get("routing_key") if isinstance(delivery_info, dict) else None
    if not isinstance(queue, str):
        return None
    return keys.model_of(queue) if keys.names_model(queue) else f"({queue})"


def argument(task: str, args: Any, kwargs: Any) -> Any:
    """Return the argument that a message passes to one of headrace's tasks, or None if it passes none."""
    if isinstance(args, (list, tuple)) and args:
        return args[0]
    return kwargs.get("jobs" if task == GROUP_TASK_NAME else "request") if isinstance(kwargs, dict) else None


def read_wire(wire: Any, model: str | None = None) -> GenerateRequest:
    """Parse a request from a message. It may name its model, if that is `model`, the model of its queue.

    Raises:
        JobFailed: with the code `unsupported_version` or `invalid_request`.
    """
    if not isinstance(wire, dict):
        raise JobFailed("invalid_request", f"the message contains a {type(wire).__name__} instead of a request")
    version = wire.get("schema_version")
    if not is_readable(SCHEMA_VERSION if version is None else to_whole(version)):
        raise JobFailed(
            "unsupported_version",
            f"the request has schema version {show(version)[:20]} and this worker reads none above "
            f"{SCHEMA_VERSION}; upgrade the workers before the clients",
        )
    if model is not None and (named := wire.get("model")) not in (None, model):
        raise JobFailed(
            "invalid_request",
            f"model: got {str(named)[:80]!r} in the queue {keys.queue(model)!r}; the queue names the model: send the "
            f"request to the queue of the model that is meant, {keys.queue('<model>')}",
        )
    try:
        fields = wire if model is None else {name: wire[name] for name in wire if name != "model"}
        return parse_request(fields, public=WIRE_NAMES)
    except InvalidRequest as error:
        raise JobFailed("invalid_request", str(error)) from error


def read_group(group: Any) -> dict[str, Any]:
    """Return the requests of a message for `GROUP_TASK_NAME` by job id; `read_wire` validates each request.

    A member without a valid id is left out: no result could be stored for it. So is a repeated id. One log line counts
    them.
    """
    jobs: dict[str, Any] = {}
    members = group if isinstance(group, (list, tuple)) else [group]
    nameless = repeated = 0
    for member in members:
        job_id = member.get("id") if isinstance(member, dict) else None
        if not is_job_id(job_id):
            nameless += 1
        elif job_id in jobs:
            repeated += 1
        else:
            jobs[job_id] = member.get("request")
    if nameless or repeated:
        reason = "members of the message have no valid job id, or repeat one"
        log.error("job.refused", reason=reason, none=nameless, again=repeated)
    return jobs

"""The log events. Levels and fields are read from the calls that write them; the meanings are in this file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LEVELS = ("debug", "info", "warning", "error")
#: The packages that write log events.
PACKAGES = ("client", "config", "worker")
#: Events are named so; every other first argument of a log call is a sentence.
EVENT_NAME = re.compile(r"[a-z_]+\.[a-z_]+")


@dataclass(frozen=True)
class Event:
    """What the documentation says about an event.

    Attributes:
        meaning: when it is written.
        level: the level in words, for an event whose level depends on what happened.
        more_fields: fields that the call passes as `**details`, which cannot be read from the source.
    """

    meaning: str
    level: str = ""
    more_fields: tuple[str, ...] = ()


EVENTS: dict[str, Event] = {
    "record.unreadable": Event("the record of a file or batch cannot be read; it stays where it is and is in no list"),
    "model.loaded": Event(
        "the model is in memory and has passed its self-test; the line says what was understood of its "
        "files, and `notes` what was ignored",
        more_fields=(
            "family",
            "parameters",
            "dtype",
            "max_context",
            "positions",
            "tokenizer",
            "tokenizer_size",
            "added_tokens",
            "has_chat_template",
            "eos_token_ids",
            "eos_source",
            "bos_token_id",
            "defaults",
            "notes",
        ),
    ),
    "draft.loaded": Event(
        "the draft model of `HEADRACE_DRAFT_MODEL` is in memory; `cache_bytes` is what its cache takes of that of the "
        "model",
        more_fields=("parameters", "cache_bytes"),
    ),
    "draft.unused": Event(
        "the draft model is not used: `HEADRACE_DRAFT_TOKENS` is 0, or this machine's rows are not batch-invariant"
    ),
    "draft.failed": Event("the draft model met a fault and is not used any more; no job needs it"),
    "model.wanted": Event("a job came for a model that is not loaded"),
    "model.unloaded": Event("the model had no job for `HEADRACE_IDLE_UNLOAD_S`"),
    "model.changed": Event(
        "a model was loaded again and its results are other ones than `before`: its files were replaced"
    ),
    "model.differs": Event(
        "another worker serves a different model under the same name, so a job's answer depends on which takes it; "
        "once for each model that is loaded"
    ),
    "adapter.loaded": Event(
        "an adapter is in memory: a job named it first, its files were replaced, or it stays loaded"
    ),
    "adapter.unloaded": Event("others needed its memory, or its files were replaced; jobs that run on it end on it"),
    "adapter.failed": Event("an adapter cannot be loaded; only the jobs that name it fail"),
    "worker.ready": Event("the worker reads its queues"),
    "worker.stopping": Event("a shutdown begins: what runs is finished, and the other jobs go back to the queue"),
    "worker.draining": Event("the shutdown waits for jobs that run; after two seconds, then less and less often"),
    "worker.stopped": Event(
        "the worker has shut down in good order; the fields count messages handed back, and jobs since the start",
        more_fields=("succeeded", "failed", "cancelled", "expired"),
    ),
    "worker.model_failed": Event("a model cannot be loaded; `error` says what to do; the process ends"),
    "worker.probes_failed": Event("the port of the probes cannot be opened; `error` says what to do; the process ends"),
    "worker.traces_failed": Event("traces cannot be set up; `error` says what to do; the process ends"),
    "worker.failed": Event("the worker met a fault; the process ends and its jobs go to other workers"),
    "worker.abandoned": Event("Redis did not answer during the shutdown; the jobs go to other workers"),
    "engine.failed": Event("the engine met a fault; the process ends and its jobs go to other workers"),
    "engine.stalled": Event("one step takes too long: `/livez` fails and the jobs go to other workers"),
    "engine.resumed": Event("the step that was stalled has ended: `/livez` no longer fails"),
    "engine.step_failed": Event("a step failed; it is repeated in parts to find the job at fault"),
    "engine.step_out_of_memory": Event("a step ran out of memory; it is repeated in parts"),
    "engine.cache_out_of_memory": Event("there is no memory for a larger cache; jobs continue with less"),
    "message.accepted": Event("a message came from the queue"),
    "message.finished": Event("the results of all its jobs are stored"),
    "message.adopted": Event("a message was delivered again while its jobs are running here; they continue"),
    "message.lost": Event("a message's lease ran out while it waited for its ETA; another worker has it"),
    "messages.given_back": Event("messages that waited for an ETA or a rate limit went back to their queue"),
    "message.refused": Event("a message cannot be read; it went to the list `headrace:dead`"),
    "followers.failed": Event("a refused message is part of a chord or a chain, which could not be failed with it"),
    "messages.misplaced": Event(
        "messages for headrace are in a list of Redis that no worker reads; once for each list, until it is empty"
    ),
    "message.trimmed": Event(
        "the unsigned envelope of a message asked for more than its signature allows; that is ignored"
    ),
    "job.finished": Event(
        "the result of a job is stored",
        level="info; debug for successful jobs of a message with several",
        more_fields=("job_id", "model", "state", "prompt_tokens", "completion_tokens", "seconds", "trace_id"),
    ),
    "job.refused": Event("some members of a message have no job id, or the id of another member"),
    "job.quarantined": Event("a worker process ended while it ran this job; the job is now computed alone"),
    "job.failed": Event("a fault failed this job and no other"),
    "job.step_failed": Event("this job makes every step fail; it fails and no other"),
    "job.finish_failed": Event("the result of a job could not be made; this job fails and no other"),
    "job.prepare_failed": Event("the messages of a job could not be converted to a prompt; only this job fails"),
    "job.intake_failed": Event("a job could not be given to the engine; this job fails and no other"),
    "jobs.finished_before": Event(
        "jobs were delivered again, or lost their lease, after another worker had ended them"
    ),
    "redis.unanswered": Event("Redis does not answer; the worker tries again"),
    "redis.refused": Event("Redis refuses a command, for example because it is full; the worker tries again"),
    "redis.forbidden": Event("the Redis user lacks a right; the process ends"),
    "redis.unsuitable": Event("the Redis loses jobs; `error` has the lines to change; the process ends"),
    "redis.loses_jobs": Event("the same, where `HEADRACE_REDIS_UNSUITABLE` is `allow`; `hint` has the line to change"),
    "redis.not_durable": Event("the Redis may lose jobs when it ends; `hint` has the line to change"),
    "redis.unchecked": Event("the Redis user may not run INFO, so nobody knows whether this Redis loses jobs"),
    "clock.differs": Event(
        "this machine's clock and Redis' differ by more than 5 s; deadlines, leases and heartbeats go by Redis' clock"
    ),
    "redis.embedded": Event("no Redis was set and none runs here: the worker started the embedded one"),
    "ack.waiting": Event("acknowledgements wait for a connection to Redis"),
    "events.failed": Event("a fault in the events of a streamed job; the job continues"),
    "heartbeat.failed": Event("a fault in the heartbeat; jobs continue"),
    "probes.failed": Event("a fault in the probes; jobs continue"),
    "traces.failed": Event("a fault in the spans of a job; the job continues"),
    "http.request": Event("`headrace serve` answered a request", level="info; debug for `/health`"),
    "http.failed": Event("a fault of `headrace serve`: the answer is 500"),
    "http.connections_full": Event(
        "more connections than are allowed: those that wait longest for their request are closed; once a minute"
    ),
    "http.no_descriptors": Event("the process may open no more files, so connections wait; once a minute"),
    "batch.failed": Event("a batch of `headrace serve` ended without results"),
    "batch.waits": Event("a batch waits for Redis, for a worker, or for jobs of others; `reason` says which"),
    "batch.unsaved": Event("the state of a batch cannot be written to disk"),
}

#: Field -> its kind and meaning. A field means the same in every event.
FIELDS: dict[str, tuple[str, str]] = {
    "job_id": ("text", "of the job"),
    "message_id": ("text", "of the Celery message"),
    "limit": ("number", "of connections"),
    "batch": ("text", "the id of a batch of `headrace serve`"),
    "trace_id": ("32 hexadecimal digits", "of the job's OpenTelemetry trace"),
    "state": ("text", "how the job ended: as in [client.md](client.md#when-it-fails)"),
    "code": ("text", "why the job failed: as in [client.md](client.md#when-it-fails)"),
    "prompt_tokens": ("number", "tokens read, all samples together"),
    "completion_tokens": ("number", "tokens written, all samples together"),
    "seconds": ("seconds", "how long it took"),
    "step_age_s": ("seconds", "how long the present step has taken so far"),
    "limit_s": ("seconds", "how long a step may take: `HEADRACE_STALL_S`"),
    "jobs": ("number", "jobs that the event is about"),
    "messages": ("number", "messages that the event is about"),
    "rows": ("number", "samples in the step"),
    "attempts": ("number", "how often the job was started"),
    "running": ("number", "jobs that are computed"),
    "tokens": ("number", "the most tokens that running jobs may still take"),
    "held": ("number", "jobs that the worker holds, whether they run or wait"),
    "queued": ("object", "jobs that no worker holds, by model; null if Redis did not answer"),
    "returned": ("number", "messages that were handed back to the queue"),
    "succeeded": ("number", "jobs since the start that succeeded"),
    "failed": ("number", "jobs since the start that failed"),
    "cancelled": ("number", "jobs since the start that were cancelled"),
    "expired": ("number", "jobs since the start that expired"),
    "none": ("number", "members of a message without a job id"),
    "again": ("number", "members of a message with the id of another member"),
    "bytes": ("bytes", "size of the message"),
    "wanted_bytes": ("bytes", "size of the cache that was requested"),
    "cache_bytes": ("bytes", "size of the cache"),
    "file": ("text", "the name of the record in the directory of files or of batches"),
    "error": ("text", "the message of the exception, or its class alone"),
    "kind": ("text", "the class of the exception"),
    "trace": ("text", "the traceback, without the values of variables"),
    "places": ("list of texts", "the lines of the traceback, without the values of variables"),
    "reason": ("text", "why"),
    "problem": ("text", "what is wrong"),
    "skew_s": ("number", "how many seconds this machine's clock is ahead of Redis'"),
    "hint": ("text", "what to do"),
    "model": ("text", "the name of the model"),
    "adapter": ("text", "the name of the LoRA adapter"),
    "digest": ("text", "the SHA-256 of the adapter's files, the beginning of which is in fingerprints"),
    "rank": ("number", "the largest rank of the adapter's matrices"),
    "memory_bytes": ("bytes", "the memory that the adapter takes"),
    "here": ("text", "the parts of this worker's fingerprint that others do not have"),
    "others": ("text", "the same of the other workers, with their names"),
    "before": ("text", "the fingerprint of the model when it was last loaded"),
    "fingerprint": ("text", "the software, hardware and weights that compute results"),
    "queue": ("text", "the name of the queue in Celery"),
    "queues": ("list of texts", "the names of the queues in Celery"),
    "key": ("text", "the key of the list in Redis"),
    "url": ("text", "the address of Redis, without its password"),
    "tried": ("text", "the address where no Redis answered, without its password"),
    "method": ("text", "of the HTTP request"),
    "path": ("text", "of the HTTP request"),
    "status": ("number", "of the HTTP response"),
    "family": ("text", "the `model_type` of the model: `gpt2`, `gpt_bigcode`, `gpt_neo`"),
    "parameters": ("number", "weights of the model"),
    "dtype": ("text", "number format of the matrices"),
    "max_context": ("number", "longest prompt and new text together, in tokens"),
    "positions": ("number", "tokens that the model itself can read"),
    "tokenizer": ("text", "kind of the tokenizer"),
    "tokenizer_size": ("number", "tokens of the tokenizer"),
    "added_tokens": ("number", "how many of them were added to its vocabulary"),
    "has_chat_template": ("true or false", "whether the model takes `messages`"),
    "eos_token_ids": ("list", "tokens that end a text, at most 32 of them"),
    "eos_source": ("text", "what names these tokens: a file, or the tokenizer"),
    "bos_token_id": ("number", "token for which the empty prompt stands, or null"),
    "defaults": ("object", "parameters from `generation_config.json` for requests that do not set them"),
    "notes": ("list", "sentences about what was ignored or changed; see [Your own model](your-own-model.md)"),
}


@dataclass
class Written:
    """What the sources say about an event: the levels and fields of the calls that write it."""

    levels: set[str]
    fields: set[str]


def calls(root: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in the sources whose first argument has the form of an event's name."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                    name = str(node.args[0].value)
                    if EVENT_NAME.fullmatch(name):
                        yield name, node


def written(root: Path) -> dict[str, Written]:
    """The events that the sources write.

    A call counts if it is a method named as a level, for example `log.info`. The events of `EVENTS` whose level is
    described in words may be written by a function of any name.
    """
    found: dict[str, Written] = {}
    for event, call in calls(root):
        level = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        described = event in EVENTS and bool(EVENTS[event].level)
        if level in LEVELS or described:
            entry = found.setdefault(event, Written(set(), set()))
            entry.levels |= {level} & set(LEVELS)
            entry.fields |= {word.arg for word in call.keywords if word.arg}
    return found


def check(found: dict[str, Written]) -> None:
    """Raises ValueError: an event or a field has no description here, or a description has no event or field."""
    wrong = [f"events: {sorted(found.keys() ^ EVENTS.keys())}"] if found.keys() != EVENTS.keys() else []
    fields = set().union(*(entry.fields for entry in found.values()), *(event.more_fields for event in EVENTS.values()))
    wrong += [f"fields: {sorted(fields ^ FIELDS.keys())}"] if fields != FIELDS.keys() else []
    if wrong:
        raise ValueError(f"docs/log_events.py and the sources differ in {'; '.join(wrong)}")


def events_table(root: Path) -> str:
    """The table of events, in Markdown. Raises ValueError like `check`."""
    found = written(root)
    check(found)
    rows = ["| event | level | fields | meaning |", "|---|---|---|---|"]
    for name, event in EVENTS.items():
        level = event.level or ", ".join(level for level in LEVELS if level in found[name].levels)
        fields = [field for field in FIELDS if field in found[name].fields | set(event.more_fields)]
        rows.append(f"| `{name}` | {level} | {', '.join(f'`{field}`' for field in fields)} | {event.meaning} |")
    return "\n".join(rows)


def fields_table() -> str:
    """The table of fields, in Markdown."""
    rows = [f"| `{name}` | {kind} | {meaning} |" for name, (kind, meaning) in FIELDS.items()]
    return "\n".join(["| field | kind | meaning |", "|---|---|---|", *rows])

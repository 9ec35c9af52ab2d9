"""The ledger of a soak: a pure function of what was measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MiB = 2**20

#: Of the worker, the server and the client, the memory in use is judged: bytes in use in malloc, blocks of Python's
#: allocator, which hold objects up to 512 bytes, and resident bytes after `malloc_trim`, where fragmentation and caches
#: with a limit take some MiB. After 28,000 jobs this finds a leak of 600 bytes for each job in malloc, of 7 objects, or
#: of 1,500 bytes elsewhere. Resident memory before trimming rises and falls by 100 MiB, so it is only shown.
MALLOC_BYTES, BLOCKS, TRIMMED_BYTES = 16 * MiB, 200_000, 40 * MiB
#: The server keeps the record of each batch, some 130 blocks.
BLOCKS_PER_BATCH = 200
#: Redis' own count of its bytes is exact (`REDIS_BYTES`). Its resident memory is that and the holes that malloc has
#: between what is left; they are bounded by the largest amount of data that there ever was.
REDIS_RESIDENT_SHARE, REDIS_RESIDENT_BYTES = 1.25, 24 * MiB
#: Descriptors and connections: pools open one connection for each of the threads that called at the same time.
DESCRIPTORS = 6
THREADS = 4
#: Redis' own memory, without the buffers of connections.
REDIS_BYTES = 1 * MiB
#: A line of level info for a job has about 300 bytes; more than this for each job would fill a disk.
LOG_BYTES_PER_JOB = 4096


@dataclass(frozen=True)
class ProcessSample:
    """Resident bytes, open descriptors and threads of a process with its children."""

    rss: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class InUse:
    """Memory in use in a process, as `tests.chaos.soak_memory` measures it: two sizes in bytes, and a number."""

    resident: int
    malloc: int
    blocks: int


@dataclass(frozen=True)
class Sample:
    """Everything that is measured at one time, in seconds since the traffic began."""

    at: int
    phase: str
    processes: dict[str, ProcessSample]
    keys: dict[str, int]
    redis_bytes: int
    connections: int
    temporary_files: int
    client_files: int
    data_files: dict[str, int]
    log_bytes: int
    redis_peak: int = 0
    redis_scripts: int = 0
    in_use: dict[str, InUse] = field(default_factory=dict)


@dataclass(frozen=True)
class SoakFacts:
    """What a run recorded. `open` are accepted jobs without an end; `files_left` what the caller did not delete."""

    samples: list[Sample]
    accepted: dict[str, int]
    ends: dict[str, int]
    open: list[str]
    refused: dict[str, int]
    surprises: list[str]
    files_left: int = 0
    batches: int = 0
    logged: dict[str, int] = field(default_factory=dict)
    exited: dict[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class SoakLedger:
    """The judgement: `wrong` is empty if the run balances."""

    accepted: dict[str, int]
    ends: dict[str, int]
    refused: dict[str, int]
    batches: int
    logged: dict[str, int]
    baseline: dict[str, Any]
    end: dict[str, Any]
    largest: dict[str, Any]
    wrong: list[str]


def balance(facts: SoakFacts) -> SoakLedger:
    """Judge a run. Before its end, only the jobs are judged."""
    baseline, end = (next((s for s in facts.samples if s.phase == phase), None) for phase in ("baseline", "end"))
    wrong = [f"surprise: {surprise}" for surprise in facts.surprises]
    wrong += [f"{name} exited with {code}" for name, code in facts.exited.items()]
    wrong += [f"logged {count} times: {event}" for event, count in facts.logged.items() if "Traceback" in event]
    if end is not None and baseline is not None:
        wrong += [f"accepted, and neither ended nor told lost: {job}" for job in facts.open]
        wrong += compare(baseline, end, facts)
    return SoakLedger(
        accepted=dict(sorted(facts.accepted.items())),
        ends=dict(sorted(facts.ends.items())),
        refused=dict(sorted(facts.refused.items())),
        batches=facts.batches,
        logged=dict(sorted(facts.logged.items())),
        baseline={} if baseline is None else figures(baseline),
        end={} if end is None else figures(end),
        largest=largest(facts.samples),
        wrong=wrong,
    )


def compare(baseline: Sample, end: Sample, facts: SoakFacts) -> list[str]:
    """What is not back where it was."""
    wrong = []

    def check(name: str, before: int, after: int, slack: int) -> None:
        if after > before + slack:
            wrong.append(f"{name}: {before} before, {after} after; at most {slack} more are allowed")

    for name, before in baseline.processes.items():
        after = end.processes[name]
        check(f"descriptors of {name}", before.descriptors, after.descriptors, DESCRIPTORS)
        check(f"threads of {name}", before.threads, after.threads, THREADS)
    for name, used in baseline.in_use.items():
        now = end.in_use[name]
        check(f"resident bytes of {name} after trimming", used.resident, now.resident, TRIMMED_BYTES)
        check(f"bytes in use in malloc of {name}", used.malloc, now.malloc, MALLOC_BYTES)
        records = BLOCKS_PER_BATCH * facts.batches if name == "serve" else 0
        check(f"blocks of Python's allocator of {name}", used.blocks, now.blocks, BLOCKS + records)
    most = int(REDIS_RESIDENT_SHARE * end.redis_peak) + REDIS_RESIDENT_BYTES
    check("resident bytes of redis, beyond its largest data", most, end.processes["redis"].rss, 0)
    for kind in sorted(baseline.keys.keys() | end.keys.keys()):
        check(f"keys {kind}", baseline.keys.get(kind, 0), end.keys.get(kind, 0), 0)
    check("bytes in Redis", baseline.redis_bytes, end.redis_bytes, REDIS_BYTES)
    check("bytes of Redis' scripts", baseline.redis_scripts, end.redis_scripts, REDIS_BYTES)
    check("connections", baseline.connections, end.connections, DESCRIPTORS)
    check("temporary files", baseline.temporary_files, end.temporary_files, 0)
    check("files of the client", baseline.client_files, end.client_files, 0)
    # A record of each batch remains, as over OpenAI's API, and what the caller did not delete.
    expected = baseline.data_files | {"store": 1 + facts.batches + 2 * facts.files_left}
    for name in sorted(end.data_files):
        check(f"files in {name}", expected.get(name, 0), end.data_files[name], 0)
    check("bytes of logs", 0, end.log_bytes, LOG_BYTES_PER_JOB * max(100, sum(facts.accepted.values())))
    return wrong


def figures(sample: Sample) -> dict[str, Any]:
    """The figures of a sample in one level, for people."""
    found: dict[str, Any] = {"seconds": sample.at}
    for name, process in sample.processes.items():
        found[f"{name} MiB, descriptors, threads"] = (
            round(process.rss / MiB, 1),
            process.descriptors,
            process.threads,
        )
    for name, used in sample.in_use.items():
        found[f"{name} MiB after trimming, MiB in malloc, Python's blocks"] = (
            round(used.resident / MiB, 1),
            round(used.malloc / MiB, 1),
            used.blocks,
        )
    found["keys"] = sum(count for kind, count in sample.keys.items() if not kind.startswith("("))
    found["bytes in Redis"] = sample.redis_bytes
    found["connections"] = sample.connections
    found["temporary files"] = sample.temporary_files
    return found | {f"files in {name}": count for name, count in sample.data_files.items()}


def largest(samples: list[Sample]) -> dict[str, Any]:
    """The largest values while there was traffic."""
    if not samples:
        return {}
    found: dict[str, Any] = {}
    for name in samples[0].processes:
        seen = [sample.processes[name] for sample in samples]
        found[f"{name} MiB, descriptors, threads"] = (
            round(max(one.rss for one in seen) / MiB, 1),
            max(one.descriptors for one in seen),
            max(one.threads for one in seen),
        )
    kinds: Counter[str] = Counter()
    for sample in samples:
        for kind, count in sample.keys.items():
            kinds[kind] = max(kinds[kind], count)
    return found | {f"keys {kind}": count for kind, count in sorted(kinds.items())}


def table(ledger: SoakLedger) -> str:
    """The ledger as a table of text."""
    rows: list[tuple[str, Any]] = [
        *((f"accepted {kind}", count) for kind, count in ledger.accepted.items()),
        *((f"ended {state}", count) for state, count in ledger.ends.items()),
        *((f"refused {name}", count) for name, count in ledger.refused.items()),
        ("batches over HTTP", ledger.batches),
        *((f"logged {event}", count) for event, count in ledger.logged.items()),
        *((f"largest {name}", value) for name, value in ledger.largest.items()),
    ]
    for name, value in ledger.end.items():
        rows.append((f"{name}: baseline, end", f"{ledger.baseline.get(name)} {value}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join(
        [*lines, *(f"WRONG {error}" for error in ledger.wrong), "balanced" if not ledger.wrong else "NOT balanced"]
    )

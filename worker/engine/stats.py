"""What an engine is doing at one moment, for status, heartbeat and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdapterStats:
    """One adapter of an engine, whether it is in memory or not, and what has run on it."""

    name: str
    loaded: bool = False
    #: The largest rank, the memory that it takes, and the SHA-256 of its files; unknown unless it is loaded.
    rank: int = 0
    nbytes: int = 0
    digest: str = ""
    #: Jobs that hold it: they wait, run, or are being prepared.
    running: int = 0
    #: Jobs that succeeded since the engine was built, and their new tokens.
    jobs: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class EngineStats:
    """Load and counters of an engine."""

    #: Sequences that can run at once.
    slots: int
    running: int
    waiting: int
    #: New tokens since the engine was built.
    tokens: int
    #: Prompt tokens computed since then. Those whose keys and values were copied from another sequence do not count.
    prompt_tokens: int
    steps: int
    #: Tokens that speculative decoding proposed, by n-grams and by a draft model, and how many of them were accepted.
    proposed: int
    accepted: int
    #: Tokens of prompts, and how many of them were reused from the cache.
    prefix_queries: int
    prefix_hits: int
    #: Memory of the key-value cache.
    cache_bytes: int
    #: Share of the cache's budget that running sequences hold, without cached prefixes, from 0 to 1.
    cache_usage: float
    #: Seconds since the running step last made progress; 0 between steps.
    step_age_s: float
    #: The adapters that jobs may name, sorted.
    adapters: list[AdapterStats] = field(default_factory=list)


@dataclass(frozen=True)
class SequenceStats:
    """Progress of one running sequence."""

    job_id: str
    #: Seconds since it got its slot.
    age_s: float
    #: Tokens of its prompt, and how many of them are in the cache.
    prompt: int
    read: int
    #: New tokens, and `max_tokens` of the request.
    written: int
    most: int

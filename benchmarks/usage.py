"""Processor time and traffic that were used between two moments of a benchmark."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reading:
    """Resources used up to a moment, or between two; times are in seconds of one core."""

    at: float
    redis_s: float
    workers_s: float
    client_s: float
    #: Of all cores and all processes of the machine.
    busy_s: float
    commands: int
    bytes_in: int
    bytes_out: int

    def __sub__(self, earlier: Reading) -> Reading:
        before = asdict(earlier)
        return Reading(**{name: value - before[name] for name, value in asdict(self).items()})

    def shares(self) -> dict[str, float]:
        """Cores in use by Redis, by all workers, by this client and by other processes."""
        ours = {"redis": self.redis_s, "workers": self.workers_s, "client": self.client_s}
        others = max(0.0, self.busy_s - sum(ours.values()))
        return {name: used / self.at for name, used in {**ours, "others": others}.items()}

    def per_job(self, jobs: int) -> dict[str, float]:
        """Resources per job."""
        return {
            "redis_cpu_ms": 1000 * self.redis_s / jobs,
            "workers_cpu_ms": 1000 * self.workers_s / jobs,
            "client_cpu_ms": 1000 * self.client_s / jobs,
            "redis_commands": self.commands / jobs,
            "redis_bytes_in": self.bytes_in / jobs,
            "redis_bytes_out": self.bytes_out / jobs,
        }


def processor_s(pid: int | str) -> float:
    """Processor time that a process has used so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """Processor time that all processes of this machine have used so far: user, nice, system, irq and softirq."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split()[1:8]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def rate_in_the_middle(spans: Sequence[tuple[float, float, int]], began: float) -> float:
    """Tokens per second in the middle half of a run, in which it neither fills its slots nor runs out of jobs.

    Args:
        spans: for each job the time at which it ended, the seconds that it had its slot, and its new tokens, which are
            assumed to be spread evenly over these seconds.
        began: the time at which the run began.
    """
    ended = max(end for end, _, _ in spans)
    first, last = began + (ended - began) / 4, began + (ended - began) * 3 / 4
    made = sum(tokens * max(0.0, min(end, last) - max(end - took, first)) / took for end, took, tokens in spans)
    return made / (last - first)

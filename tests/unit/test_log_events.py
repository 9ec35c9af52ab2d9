"""The table of log events in docs/deployment.md, against the calls that write them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error"}
#: event -> levels and fields, as the table has them.
ROWS = re.findall(r"^\| (`[\w.]+`(?:, `[\w.]+`)*) \| ([^|]*) \| ([^|]*) \| [^|]* \|$",
                  (ROOT / "docs" / "deployment.md").read_text().split("## Logs")[1], re.MULTILINE)  # fmt: skip


def written() -> dict[str, tuple[set[str], set[str]]]:
    """Levels and fields of every event that the worker writes, read from the sources."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for path in (ROOT / "worker").rglob("*.py"):
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            level = getattr(call.func, "attr", "") if ast.unparse(call.func).startswith("log.") else ""
            level = "info" if ast.unparse(call.func) == "log_success" else level
            if level in LEVELS and call.args and isinstance(call.args[0], ast.Constant):
                levels, fields = found.setdefault(call.args[0].value, (set(), set()))
                levels.add(level)
                fields |= {word.arg for word in call.keywords if word.arg}
    return found


def test_every_event_is_in_the_table_and_nothing_else() -> None:
    listed = [event for events, _, _ in ROWS for event in re.findall(r"[\w.]+", events)]
    assert len(listed) == len(set(listed))
    assert set(listed) == {event for event in written() if re.fullmatch(r"\w+\.\w+", event)}
    assert len(listed) > 20


def test_levels_and_fields_are_right() -> None:
    there = written()
    for events, level, fields in ROWS:
        named = set(re.findall(r"`(\w+)`", fields))
        for event in re.findall(r"[\w.]+", events):
            levels, given = there[event]
            assert levels <= set(re.findall(r"\w+", level)), event
            assert given <= named, f"{event}: {sorted(given - named)}"
        assert named <= set().union(*(there[event][1] for event in re.findall(r"[\w.]+", events))) | DYNAMIC, events


#: Given as **details or **counts.
DYNAMIC = {"succeeded", "failed", "cancelled", "expired", "job_id", "state", "prompt_tokens", "completion_tokens"}
DYNAMIC |= {"seconds"}

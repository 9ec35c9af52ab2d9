"""The tables of log events and fields in docs/deployment.md, against the calls that write them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error"}
SECTION = (ROOT / "docs" / "deployment.md").read_text().split("## Logs")[1].split("\n## ")[0]
#: event -> levels and fields, as the table has them.
ROWS = re.findall(r"^\| (`[\w.]+`(?:, `[\w.]+`)*) \| ([^|]*) \| ([^|]*) \| [^|]* \|$", SECTION, re.MULTILINE)
#: Fields, as the other table has them.
FIELDS = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]* \| [^|]* \|$", SECTION, re.MULTILINE)
#: Names that stand for a method of the log, chosen by what is told.
ALIASES = {"log_success": {"info"}, "tell": {"debug", "info"}}


def written() -> dict[str, tuple[set[str], set[str]]]:
    """Levels and fields of every event that workers and servers write, read from the sources."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    sources = [path for package in ("worker", "client", "config") for path in (ROOT / package).rglob("*.py")]
    for path in sources:
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            name = ast.unparse(call.func)
            level = {name.removeprefix("log.")} & LEVELS if name.startswith("log.") else ALIASES.get(name, set())
            event = call.args[0].value if level and call.args and isinstance(call.args[0], ast.Constant) else ""
            if re.fullmatch(r"\w+\.\w+", str(event)):  # others are sentences, of the client's
                levels, fields = found.setdefault(str(event), (set(), set()))
                levels |= level
                fields |= {word.arg for word in call.keywords if word.arg}
    return found


def test_every_event_is_in_the_table_and_nothing_else() -> None:
    listed = [event for events, _, _ in ROWS for event in re.findall(r"[\w.]+", events)]
    assert len(listed) == len(set(listed))
    assert set(listed) == written().keys()
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
DYNAMIC |= {"seconds", "model", "trace_id"}


def test_every_field_is_in_the_table_of_fields_and_nothing_else() -> None:
    listed = [field for fields in FIELDS for field in re.findall(r"\w+", fields)]
    assert len(listed) == len(set(listed))
    assert set(listed) == set().union(*(fields for _, fields in written().values())) | DYNAMIC

"""Hooks of mkdocs: they put tables that are made from the code where a page has `<!-- generated: NAME -->`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
for _folder in (ROOT, ROOT / "docs"):  # the modules of this clone, whatever else is installed
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import log_events  # noqa: E402
from mkdocs.exceptions import PluginError  # noqa: E402

from benchmarks import tables  # noqa: E402
from headrace.client import HeadraceError  # noqa: E402
from headrace.client.error_codes import ERRORS, JOB_FAILURES  # noqa: E402
from headrace.config.settings import PREFIX, Settings  # noqa: E402
from headrace.config.settings_help import HELP, SettingHelp  # noqa: E402

MARKER = re.compile(r"^<!-- generated: (.+?) -->$", re.MULTILINE)


def settings_tables() -> str:
    """A heading and a table for each group of settings. Raises ValueError if a setting has no help or is unknown."""
    described = {name for group in HELP.values() for name in group}
    if described != Settings.model_fields.keys():
        raise ValueError(f"config/settings_help.py differs in {sorted(described ^ Settings.model_fields.keys())}")
    parts = []
    for heading, group in HELP.items():
        parts += [f"## {heading}", "", "| setting | default | values | meaning |", "|---|---|---|---|"]
        parts += [_setting_row(name, entry) for name, entry in group.items()]
        parts.append("")
    return "\n".join(parts)


def _setting_row(name: str, entry: SettingHelp) -> str:
    field = Settings.model_fields[name]
    value = int(field.default) if isinstance(field.default, bool) else field.default
    default = entry.default if value is None else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
    vllm = f" In vLLM: `{entry.vllm}`." if entry.vllm else ""
    return f"| `{PREFIX}{name.upper()}` | {default} | {_as_code(str(field.description))} | {entry.text}{vllm} |"


def _as_code(text: str) -> str:
    """The values in a description that stand in quotes, as code."""
    return re.sub(r"'([^' ]+)'", r"`\1`", text).replace("*", r"\*")


def errors_table() -> str:
    """The classes of errors by their codes, except `JobFailed`, whose code varies."""
    kinds = {kind.code: kind.__name__ for kind in _error_classes(HeadraceError)}
    rows = [f"| `{code}` | `{kinds[code]}` | {advice} |" for code, advice in ERRORS.items()]
    return "\n".join(["| code | class | what to do |", "|---|---|---|", *rows])


def _error_classes(base: type[HeadraceError]) -> Iterator[type[HeadraceError]]:
    for kind in base.__subclasses__():
        if kind.__module__.startswith("headrace.client."):
            if "code" in vars(kind):
                yield kind
            yield from _error_classes(kind)


def job_failures_table() -> str:
    """The codes of `JobFailed`."""
    rows = [f"| `{code}` | {advice} |" for code, advice in JOB_FAILURES.items()]
    return "\n".join(["| code | what to do |", "|---|---|", *rows])


def zoo_table() -> str:
    """The table of the last full run of tests/zoo."""
    return (ROOT / "tests" / "zoo" / "table.md").read_text(encoding="utf-8")


def benchmark_table(name: str) -> str:
    """The table of a run of `make bench`, kept in benchmarks/machines."""
    return tables.table(json.loads((tables.MACHINES / f"{name}.json").read_text(encoding="utf-8")))


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings_tables,
    "errors": errors_table,
    "job failures": job_failures_table,
    "log events": lambda: log_events.events_table(ROOT),
    "log fields": log_events.fields_table,
    "zoo": zoo_table,
    **{f"benchmark {path.stem}": partial(benchmark_table, path.stem) for path in tables.MACHINES.glob("*.json")},
}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page, before its Markdown is parsed."""

    def table(marker: re.Match[str]) -> str:
        try:
            return TABLES[marker[1]]()
        except (KeyError, ValueError) as error:
            raise PluginError(f"{page.file.src_path}: the table {marker[1]!r} cannot be made: {error!r}") from error

    return MARKER.sub(table, markdown)

"""The built guide: every page has its text, every block its code, and generated tables match the code."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from headrace.client.error_codes import ERRORS, JOB_FAILURES
from headrace.config.settings import PREFIX, Settings
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]


class Page(HTMLParser):
    """The text, the headings and the code blocks of a built page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self._open: list[str] = []
        self.text, self.headings, self.blocks = "", list[str](), list[str]()
        #: The cells of every table row, by the first cell.
        self.rows: dict[str, list[str]] = {}
        self._row: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "article" or self._open:
            if tag in ("article", "pre", "h1", "h2", "tr", "td", "nav"):
                self._open.append(tag)
            if tag == "pre":
                self.blocks.append("")
            if tag == "h1":
                self.headings.append("")
            if tag == "tr":
                self._row = []
            if tag == "td":
                self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass
            if tag == "tr" and self._row:
                self.rows[self._row[0].strip()] = [cell.strip() for cell in self._row]

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        self.text += data
        if "pre" in self._open:
            self.blocks[-1] += data
        if "h1" in self._open:
            self.headings[-1] += data
        if "td" in self._open:
            self._row[-1] += data


def nav_pages(nav: Any) -> list[str]:
    """The source paths that the navigation lists."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in nav_pages(part)]


NAV = nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def read(site: Path, source: str) -> Page:
    name = source.removesuffix(".md")
    path = site / "index.html" if name == "index" else site / name / "index.html"
    return Page(path.read_text())


@pytest.mark.parametrize("source", NAV)
def test_every_page_has_a_heading_text_and_whole_blocks(site: Path, source: str) -> None:
    page = read(site, source)
    assert page.headings
    assert all(heading.strip("¶ \n") for heading in page.headings)
    assert len(page.text.split()) > 80
    assert all(block.strip() for block in page.blocks)


@pytest.mark.parametrize("source", NAV)
def test_no_marker_is_left_over(site: Path, source: str) -> None:
    text = read(site, source).text
    assert not re.search(r"-+8 ?<", text), "a snippet was not included"
    assert "generated:" not in text
    html = (site / source.removesuffix(".md").removesuffix("index") / "index.html").read_text()
    assert "<!-- generated:" not in html


def test_the_sources_of_the_hooks_are_not_part_of_the_site(site: Path) -> None:
    assert not list(site.rglob("*.py"))


def test_the_page_of_examples_shows_every_example(site: Path) -> None:
    shown = read(site, "examples.md").blocks
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert len(shown) == len(examples) > 3
    for path in examples:
        assert any(path.read_text().strip() == block.strip() for block in shown), path.name


def test_the_page_of_settings_has_each_with_its_default(site: Path) -> None:
    rows = {name: cells for name, cells in read(site, "settings.md").rows.items() if name.startswith(PREFIX)}
    assert set(rows) == {PREFIX + name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        _, default, values, meaning = rows[PREFIX + name.upper()]
        assert meaning
        assert values.split()[0] == re.sub(r"'([^' ]+)'", r"\1", str(field.description)).split()[0]
        if field.default is not None:
            assert default == (f"{field.default:g}" if isinstance(field.default, float | bool) else str(field.default))
        else:
            assert default not in ("", "None")
    assert "max_num_seqs" in rows[PREFIX + "SLOTS"][3]


def test_the_page_of_errors_has_every_code(site: Path) -> None:
    rows = read(site, "errors.md").rows
    assert rows["queue_full"][1] == "QueueFull"
    assert set(rows) >= ERRORS.keys() | JOB_FAILURES.keys()


def test_the_page_of_log_events_has_them_with_levels_and_fields(site: Path) -> None:
    rows = read(site, "log-events.md").rows
    assert rows["message.finished"][1:3] == ["info", "message_id, seconds, jobs"]
    assert rows["engine.stalled"][1:3] == ["error", "step_age_s, limit_s"]
    assert set(rows["job.finished"][2].split(", ")) >= {"job_id", "state", "code", "seconds", "trace_id"}
    assert rows["seconds"][1:] == ["seconds", "how long it took"]


@pytest.fixture
def log_events() -> ModuleType:
    spec = importlib.util.spec_from_file_location("log_events_of_docs", ROOT / "docs" / "log_events.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_an_event_or_a_field_without_a_meaning_is_an_error(log_events: ModuleType, tmp_path: Path) -> None:
    found = log_events.written(ROOT)
    log_events.check(found)
    assert len(found) > 20
    missing = dict(found)
    del missing["worker.ready"]
    with pytest.raises(ValueError, match=r"events: \['worker.ready'\]"):
        log_events.check(missing)
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "new.py").write_text('log.info("worker.danced", partner=1)\nlog.info("A sentence.")\n')
    new = log_events.written(tmp_path)
    assert new["worker.danced"].levels == {"info"}
    with pytest.raises(ValueError, match=r"events: \['worker.danced'\]; fields: \['partner'\]"):
        log_events.check({**found, **new})


def test_every_option_and_command_of_celery_has_a_line_that_says_what_it_does() -> None:
    from celery.bin.worker import worker
    from celery.worker.control import Panel

    page = (ROOT / "docs" / "celery.md").read_text()
    rows = " ".join(line.split(" | ")[0] for line in page.splitlines() if line.startswith("| "))
    named = set(re.findall(r"`([^`]+)`", rows))
    options = {option for parameter in worker.params for option in parameter.opts}
    assert options - named == set()
    assert set(Panel.meta) - named == set()

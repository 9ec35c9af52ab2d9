"""The page's files, and the list of jobs: what is served to whom."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headrace.client.http.auth import PAGE_FILES, Limits
from headrace.client.jobs.listing import NEEDED_RIGHTS
from headrace.client.wire.errors import RedisRefused
from tests.http_app import HttpApp

KEYS = ("the-key-of-the-first-one", "the-key-of-the-second-one")
VOID = {"meta", "link", "input"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpApp]:
    found = HttpApp(tmp_path_factory.mktemp("files"), Limits(any_host=True, keys=KEYS))
    yield found
    found.close()


class _Page(HTMLParser):
    """Collects ids, references and labels, and checks that elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.uses: set[str] = set()
        self.labelled: list[bool] = []
        self.names: set[str] = set()
        self._open: list[str] = []
        self._labels: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert not [name for name in found if name.startswith("on") or name == "style"]
        self.names.add(tag)
        if "id" in found:
            self.ids.append(found["id"])
        self.uses |= {found[name] for name in ("aria-labelledby", "list", "for") if name in found}
        if tag == "label":
            self._labels.add(found.get("for", ""))
        if tag in ("input", "textarea", "select"):
            self.labelled.append("label" in self._open or found.get("id") in self._labels)
        if tag not in VOID and self._open[-1:] != ["svg"]:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open[-1] == tag:
            self._open.pop()
        else:
            assert tag == "path", f"</{tag}> closes {self._open[-1]}"


def test_the_page_is_valid_and_every_field_has_a_label(app: HttpApp) -> None:
    page = _Page()
    page.feed(app.ask("GET", "/").body.decode())
    page.close()
    assert [name for name, times in Counter(page.ids).items() if times > 1] == []
    assert page.uses <= set(page.ids)
    assert all(page.labelled)
    assert len(page.labelled) > 15
    assert {"h1", "nav", "main"} <= page.names
    scripts = "".join(app.ask("GET", path).body.decode() for path in PAGE_FILES if path.endswith(".js"))
    assert set(re.findall(r'\bat\("([\w-]+)"\)', scripts)) <= set(page.ids), "what the scripts look up exists"


@pytest.mark.parametrize("path", ["/", *PAGE_FILES])
def test_the_page_needs_no_key_and_nothing_from_elsewhere(app: HttpApp, path: str) -> None:
    answer = app.ask("GET", path)
    assert answer.status == 200
    assert answer.headers["content-type"].startswith(PAGE_FILES.get(path, "text/html"))
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    text = answer.body.decode()
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {"http://www.w3.org/2000/svg"}
    for used in re.findall(r"""(?:src|rel="stylesheet" href)="([^"]+)"|from "\./([^"]+)\"""", text):
        assert f"/{''.join(used)}" in PAGE_FILES
    assert not re.search(r"innerHTML\s*=[^=]|insertAdjacentHTML|document\.write|\beval\(", text)


def test_the_files_of_the_page_are_all_served() -> None:
    folder = Path(__file__).parents[4] / "client" / "http"
    assert {f"/{file.name}" for pattern in ("*.css", "*.js") for file in folder.glob(pattern)} == set(PAGE_FILES)


def test_the_list_of_jobs_needs_a_key_and_names_what_is_wrong(app: HttpApp) -> None:
    assert app.ask("GET", "/jobs.json").status == 401
    assert app.ask("POST", "/jobs/one/cancel").status == 401
    mine = {"authorization": f"Bearer {KEYS[0]}"}
    for query, param in ((b"state=done", "state"), (b"limit=101", "limit"), (b"limit=0", "limit")):
        answer = app.ask("GET", "/jobs.json", query=query, headers=mine)
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)
    assert app.ask("POST", "/jobs/nobody-knows-it/cancel", headers=mine).status == 404
    assert app.ask("GET", "/jobs.json", headers=mine).json() == {
        "data": [],
        "has_more": False,
        "after": "",
        "counts": {},
    }


def test_a_server_without_the_right_to_list_jobs_names_it(app: HttpApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise RedisRefused("redis://somewhere", f"NOPERM; {NEEDED_RIGHTS}")

    client = app.context.client
    monkeypatch.setattr(client, "job_page", refuse, raising=False)
    monkeypatch.setattr(client, "find_job", refuse, raising=False)
    mine = {"authorization": f"Bearer {KEYS[0]}"}
    for answer in (app.ask("GET", "/jobs.json", headers=mine), app.ask("POST", "/jobs/one/cancel", headers=mine)):
        assert answer.status == 503
        assert answer.json()["error"]["message"] == f"the server's Redis user may not list jobs: {NEEDED_RIGHTS}"

"""Authentication and limits of `headrace serve`, and its answers if no worker runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from headrace.worker.redis_server import EmbeddedRedis
from tests.integration.http_server import HttpServer
from tests.patience import PATIENCE_S

KEYS = ("first-key-0123456789", "second-key-0123456789")
SERVE = [sys.executable, "-m", "headrace.worker.cli", "serve", "--port", "0"]


@pytest.fixture(scope="module")
def http(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    """A server with keys and small limits; no worker serves its Redis."""
    flags = ["--api-key", KEYS[1], "--max-body-bytes", "2000", "--max-file-bytes", "3000", "--max-files-bytes", "5000"]
    flags += ["--requests-per-minute", "60", "--cors", "https://page.example"]
    with HttpServer(tmp_path_factory.mktemp("http"), server.url, *flags, HEADRACE_API_KEYS=KEYS[0]) as process:
        yield process


@pytest.fixture(scope="module")
def open_http(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    """Without keys."""
    with HttpServer(tmp_path_factory.mktemp("http"), server.url) as process:
        yield process


@pytest.mark.parametrize("header", ["", "Bearer wrong", "Bearer", f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", KEYS[0]])
def test_without_a_valid_key_only_health_is_answered(http: HttpServer, header: str) -> None:
    with http.http(**({"authorization": header} if header else {})) as plain:
        for path in ("/v1/models", "/v1/files", "/execute", "/nowhere"):
            response = plain.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert plain.get("/health").status_code == 503  # it is there, and says that no worker is


def test_each_key_has_its_own_files(http: HttpServer) -> None:
    first, second = http.openai(KEYS[0]), http.openai(KEYS[1])
    with first, second:
        file = first.files.create(file=("a.jsonl", b"a"), purpose="batch")
        assert [each.id for each in first.files.list()] == [file.id]
        assert list(second.files.list()) == []
        with pytest.raises(openai.NotFoundError):
            second.files.content(file.id)
        with pytest.raises(openai.NotFoundError):
            second.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(openai.AuthenticationError):
            http.openai("neither-of-the-two-keys").files.list()


def test_too_large_requests_and_files_are_refused(http: HttpServer) -> None:
    with http.http(authorization=f"Bearer {KEYS[0]}") as plain:
        large = b'{"prompt": "' + b"a" * 3_000_000 + b'"}'
        for content in (large, iter([large])):  # with its length said before, and without
            response = plain.post("/v1/completions", content=content)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
        upload = {"purpose": (None, "batch"), "file": ("a.jsonl", b"a" * 3_000_000)}
        assert plain.post("/v1/files", files=upload).status_code == 413
        for expected in (200, 200, 507):  # then the directory is full
            upload["file"] = ("a.jsonl", b"a" * 2_900)
            response = plain.post("/v1/files", files=upload)
            assert response.status_code == expected
        assert response.json()["error"]["code"] == "no_room"


def test_pages_of_the_allowed_origin_may_send_requests(http: HttpServer) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, allowed in (("https://page.example", "https://page.example"), ("https://other.example", None)):
        with http.http(origin=origin) as plain:
            preflight = plain.options("/v1/completions", headers=asked)
            assert preflight.headers.get("access-control-allow-origin") == allowed
            assert plain.get("/v1/models").headers.get("access-control-allow-origin") == allowed


def test_requests_over_the_rate_limit_are_refused(http: HttpServer) -> None:
    """The last test with these keys, because it uses up the sixty requests of the minute."""
    with http.http(authorization=f"Bearer {KEYS[1]}") as plain:
        answers = [plain.get("/nowhere") for _ in range(62)]
    assert 429 in {answer.status_code for answer in answers}
    late = next(answer for answer in answers if answer.status_code == 429)
    assert late.json()["error"] | {"message": ""} == {
        "message": "",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert late.headers["retry-after"] == "1"


def test_no_worker_and_no_redis_are_503(open_http: HttpServer, tmp_path: Path) -> None:
    with open_http.openai() as api:
        with pytest.raises(openai.InternalServerError) as nobody:
            api.completions.create(model="demo", prompt="Hello.")
        assert (nobody.value.status_code, nobody.value.code) == (503, "no_worker")
        assert nobody.value.response.headers["retry-after"] == "5"
        assert api.models.list().data == []
    with HttpServer(tmp_path, "redis://:s3cret@localhost:1/0") as alone, alone.http() as plain:
        response = plain.post("/v1/completions", json={"prompt": "Hello."})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "redis_unreachable")
        assert "localhost" not in response.text
        assert plain.get("/health").json() == {"status": "no_redis"}
        assert plain.get("/v1/files").json()["data"] == []
    assert "s3cret" not in alone.said()


def test_without_keys_requests_of_web_pages_are_refused(open_http: HttpServer) -> None:
    port = httpx.URL(open_http.url).port
    answers = {
        (): 200,
        (("origin", open_http.url),): 200,
        (("origin", "https://evil.example"),): 403,
        (("origin", "null"),): 403,
        (("host", f"localhost:{port}"),): 200,
        (("host", f"evil.example:{port}"),): 403,
        (("host", "[::1"),): 403,
    }
    for headers, status in answers.items():
        with open_http.http() as plain:
            assert plain.get("/v1/models", headers=dict(headers)).status_code == status, headers


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--host", "0.0.0.0"], "HEADRACE_API_KEYS"),
        (["--host", "192.0.2.7", "--insecure"], "that is free"),
        (["--api-key", "short"], "at least 16"),
    ],
)
def test_serving_a_network_without_keys_is_refused(tmp_path: Path, flags: list[str], part: str) -> None:
    done = subprocess.run(
        [*SERVE, "--files", str(tmp_path), *flags], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, part in done.stderr) == (2, True), done.stderr


def test_without_the_extra_the_error_names_it() -> None:
    hidden = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv[1:] = ['serve']; "
        "from headrace.worker.cli import run; run()"
    )
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 3
    assert "pip install '.[http]' -c constraints.txt` in a clone" in done.stderr


def test_the_server_loads_no_model() -> None:
    code = (
        "import headrace.client.http.serve, sys; assert not {'torch', 'numba', 'headrace.worker'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)

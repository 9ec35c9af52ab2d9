"""Fuzz target: requests to `headrace serve` from untrusted clients."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from hypothesis import strategies as st

from headrace.client import Client, InvalidBatch, InvalidRequest, JobFailed
from headrace.client.batch.check import check
from headrace.client.batch.output_lines import output_line, read_output_line
from headrace.client.batch.rows import ItemReader
from headrace.client.batch.sources import open_source
from headrace.client.wire.foreign import FOREIGN
from tests.fuzz.forms import FORMS, SCHEMAS
from tests.fuzz.harness import LONGEST_MESSAGE, Target, check_message
from tests.fuzz.jobs import GOOD
from tests.fuzz.values import ANY_TEXT, HOSTILE_TEXT, JSON, objects
from tests.http_app import Answer, HttpApp

TEXTS = HOSTILE_TEXT | ANY_TEXT
RESPONSE_FORMATS = objects(
    {
        "type": st.sampled_from(["text", "json_object", "json_schema", "grammar"]),
        "json_schema": objects({"name": TEXTS, "schema": SCHEMAS, "strict": st.booleans()}),
    }
)
PROMPTS = GOOD["prompt"] | st.lists(GOOD["prompt"], max_size=3)
COMPLETIONS = objects(
    {
        **dict.fromkeys(sorted(FOREIGN), JSON),
        **{name: good for name, good in GOOD.items() if name not in ("schema_version", "expires_at")},
        "prompt": PROMPTS,
        "model": st.sampled_from(["demo", "gpt-5", "a/b", "pirate", "demo/pirate"]),
        "stream": st.booleans(),
        "stream_options": st.just({"include_usage": True}),
        "user": st.just("u"),
        "best_of": st.integers(0, 3),
        "max_completion_tokens": JSON | st.integers(0, 4),
        "timeout_s": st.sampled_from([1, 0.5, 1e9]),
        "response_format": RESPONSE_FORMATS,
        "self": JSON,
        "function": JSON,
        "requests": JSON,
        "args": JSON,
    },
    needed=("prompt",),
)
PARTS = st.lists(
    objects({"type": st.just("text"), "text": HOSTILE_TEXT | ANY_TEXT}, needed=("type", "text")), max_size=2
)
MESSAGES = st.lists(
    objects(
        {"role": st.sampled_from(["system", "user"]) | ANY_TEXT, "content": TEXTS | PARTS},
        needed=("role", "content"),
    ),
    max_size=3,
)
CHATS = objects(
    {
        "messages": MESSAGES,
        "prompt": JSON,
        "logprobs": st.booleans() | JSON,
        "top_logprobs": st.integers(0, 21) | JSON,
        "n": st.integers(0, 3),
        "max_tokens": st.integers(0, 4),
        "stream": st.booleans(),
        "structured_outputs": FORMS | JSON,
        "response_format": RESPONSE_FORMATS,
        "echo": st.booleans() | JSON,
        "add_generation_prompt": st.booleans(),
        "continue_final_message": st.booleans(),
        "chat_template_kwargs": JSON,
        "tools": st.sampled_from([[], [{}]]),
        "return_tokens_as_token_ids": st.booleans(),
        "model": st.sampled_from(["demo", "pirate"]) | JSON,
        "adapter": GOOD["adapter"] | JSON,
    },
    needed=("messages",),
)
TOKENS = objects(
    {
        "prompt": GOOD["prompt"],
        "messages": MESSAGES,
        "tokens": GOOD["prompt"],
        "model": st.sampled_from(["demo", "gpt-5", "pirate"]),
        "return_token_strs": st.booleans(),
        "add_special_tokens": st.booleans(),
        "skip_special_tokens": st.booleans(),
    }
)
BATCHES = objects(
    {
        "input_file_id": st.sampled_from(["file-0", "../lock", "\0"]) | ANY_TEXT,
        "endpoint": st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
        "completion_window": st.just("24h"),
        "metadata": st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=3),
    },
    needed=("input_file_id", "endpoint", "completion_window"),
)
BODIES = COMPLETIONS | CHATS | TOKENS | BATCHES | JSON | st.binary(max_size=40)
PATHS = st.sampled_from(
    ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/execute", "/v1/batches", "/v1/files"]
)
TYPES = st.sampled_from(["application/json", "", "multipart/form-data; boundary=x", "text/plain"]) | ANY_TEXT
LISTS = ("/v1/batches", "/v1/files", "/v1/models", "/openapi.json", "/version")


@functools.cache
def _app() -> HttpApp:
    return HttpApp(Path(tempfile.mkdtemp()), adapters=("demo/pirate", "demo/poet"))


def _encoded(body: Any) -> bytes:
    try:
        return body if isinstance(body, bytes) else json.dumps(body).encode()
    except RecursionError:  # the recursion limit depends on the depth of the caller
        return b"[" * 5_000


def check_body(case: tuple[str, Any, str]) -> None:
    """A body is refused with an error object, or reaches the queue, which is full. It never causes a 500."""
    path, body, content_type = case
    answer = _app().ask("POST", path, _encoded(body), headers={"content-type": content_type})
    assert answer.status in (400, 404, 413, 415, 429), answer
    _check_error(answer)


def _check_error(answer: Answer) -> None:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= LONGEST_MESSAGE
    json.dumps(error, ensure_ascii=False).encode()
    if error["param"] is not None:
        assert len(error["param"]) <= 120, error


class Step(NamedTuple):
    """One thing that happens to a server: a request, a restart, or another program that writes into its directory."""

    kind: str
    text: str
    data: Any


STEPS = st.one_of(
    st.builds(Step, st.just("upload"), TEXTS, st.binary(max_size=20) | st.just(b"{}\n")),
    st.builds(Step, st.sampled_from(["get", "delete", "post"]), TEXTS, TEXTS),
    st.builds(
        Step,
        st.just("batch"),
        TEXTS,
        st.dictionaries(TEXTS, TEXTS, max_size=3) | JSON,
    ),
    st.builds(Step, st.just("cancel"), st.just(""), st.none()),
    st.builds(Step, st.just("ask"), PATHS, BODIES),
    st.builds(Step, st.just("restart"), st.just(""), st.none()),
    st.builds(
        Step,
        st.just("spoil"),
        st.sampled_from(["files", "batches"]),
        st.sampled_from([b"", b"{", b"null", b"[" * 5_000, b'{"id": "\\ud83d"}', b"\xff"]) | JSON.map(_encoded),
    ),
)


class Server:
    """A server in a directory of its own, and the batches that it accepted and that nobody has spoilt."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.app = directory, HttpApp(directory)
        self.batches: list[str] = []

    def take(self, step: Step) -> Answer | None:
        """Do one step. Returns the answer of the server, if it was asked."""
        text = step.text
        if step.kind == "upload":
            return self.app.upload(step.data, filename=text)
        if step.kind in ("get", "delete", "post"):
            paths = [
                f"/v1/files/{text}",
                f"/v1/files/{text}/content",
                f"/v1/batches/{text}",
                f"/v1/models/{text}",
                text,
            ]
            query = f"after={step.data}&limit={text}&order=asc".encode("utf-8", "surrogatepass")
            path = paths[len(text) % len(paths)]
            return self.app.ask(step.kind.upper(), path if path.startswith("/") else f"/{path}", query=query)
        if step.kind == "batch":
            file_id = self.app.upload().json()["id"]
            fields = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
            answer = self.app.ask("POST", "/v1/batches", _encoded({**fields, "metadata": step.data}))
            if answer.status == 200:
                self.batches.append(answer.json()["id"])
            return answer
        if step.kind == "cancel" and self.batches:
            return self.app.ask("POST", f"/v1/batches/{self.batches[-1]}/cancel")
        if step.kind == "ask":
            return self.app.ask("POST", text, _encoded(step.data))
        if step.kind == "restart":
            self.app.close()
            self.app = HttpApp(self.directory)
        elif step.kind == "spoil":
            self._spoil(text, step.data)
        return None

    def _spoil(self, folder: str, content: bytes) -> None:
        """Overwrite a record, as a crash or another program may, and start the server again."""
        for path in sorted((self.directory / folder).glob("*.json"))[:1]:
            path.write_bytes(content)
            self.batches = [batch for batch in self.batches if batch != path.stem]
        self.take(Step("restart", "", None))

    def check_lists(self) -> None:
        """All lists answer, and the list of batches has all that were accepted, the newest first."""
        for path in LISTS:
            answer = self.app.ask("GET", path)
            assert answer.status == 200, (path, answer)
            answer.body.decode()
        assert self.app.ask("GET", "/health").status == 200
        listed = [batch["id"] for batch in self.app.ask("GET", "/v1/batches", query=b"limit=100").json()["data"]]
        assert listed == self.batches[::-1]


def check_requests(steps: list[Step]) -> None:
    """No sequence of requests and restarts causes a 500, loses a batch, or spoils a list."""
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory))
        for step in steps:
            answer = server.take(step)
            assert answer is None or answer.status < 500, (step, answer)
        server.check_lists()
        server.take(Step("restart", "", None))
        server.check_lists()
        server.app.close()


DIGITS = st.sampled_from(["0", "9", "00", "1" + "0" * 20, "9" * 400, "9" * 5_000, "\u0663", "\u00b2", "\uff11"])
NUMBER_TEXTS = st.one_of(
    st.integers(-2, 20_000).map(str),
    st.lists(DIGITS | st.sampled_from(["+", "-", ".", "_", " ", "e3", "0x", "inf", "nan"]), max_size=4).map("".join),
    TEXTS,
)
#: Where a number is text: each with the error's parameter, and its least and its largest value.
PLACES = {
    "/v1/files": ("limit", 1, 10_000),
    "/v1/batches": ("limit", 1, 100),
    "form": ("expires_after", 3_600, 2_592_000),
    "range": ("range", 0, 10**15),
}


@functools.cache
def _stored() -> str:
    return str(_app().upload(b"0123456789").json()["id"])


def check_number(case: tuple[str, str]) -> None:
    """A number in a query, a form or a header is ASCII digits within its bounds, or an error that names it."""
    place, text = case
    parameter, least, most = PLACES[place]
    if place == "form":
        fields = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": text}
        answer = _app().ask(
            "POST", "/v1/files", _form(fields), headers={"content-type": "multipart/form-data; boundary=x"}
        )
    elif place == "range":
        answer = _app().ask("GET", f"/v1/files/{_stored()}/content", headers={"range": f"bytes={text}-"})
    else:
        answer = _app().ask("GET", place, query=f"limit={quote(text.encode('utf-8', 'surrogatepass'))}".encode())
    if not text and place not in ("form", "range"):
        assert answer.status == 200, answer  # `?limit=` asks for nothing
    elif answer.status in (200, 206, 416):
        number = text.strip() if place == "range" else text
        assert number.isascii(), answer
        assert number.isdigit(), answer
        assert len(number) <= 20, answer
        assert least <= int(number) <= most, answer
    else:
        assert answer.status == 400, answer
        assert answer.json()["error"]["param"] in (parameter, "url", None), answer
        _check_error(answer)


def _form(fields: dict[str, str]) -> bytes:
    head = "--x\r\nContent-Disposition: form-data; name="
    parts = [f'{head}"{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()]
    file = f'{head}"file"; filename="a"\r\n\r\n{{}}\r\n--x--\r\n'
    return "".join([*parts, file]).encode("utf-8", "surrogatepass")


ROWS = st.lists(
    objects(
        {
            "custom_id": TEXTS,
            "method": st.just("POST"),
            "url": st.sampled_from(["/v1/completions", "/v1/chat/completions"]) | TEXTS,
            "body": COMPLETIONS | CHATS,
        },
        needed=("custom_id", "method", "url", "body"),
    )
    | objects({"custom_id": TEXTS, "prompt": PROMPTS, "user": TEXTS}, needed=("prompt",))
    | JSON,
    min_size=1,
    max_size=3,
)


@functools.cache
def _client() -> Client:
    return Client(redis_url="redis://localhost:1/0")


def check_rows(rows: list[Any]) -> None:
    """An input of a batch is refused with faults that can be printed, or each row has a line that is read back."""
    data = b"\n".join(map(_encoded, rows))
    reader = ItemReader("demo", {}, adapters={"demo": {"pirate", "poet"}})
    source = open_source(data.split(b"\n"))
    try:
        check(source, reader, _client().submitter.prepare_together)
    except (InvalidBatch, InvalidRequest) as error:
        for fault in getattr(error, "faults", []):
            check_message(fault.message[:LONGEST_MESSAGE], fault.field)
            fault.field.encode()
        return
    for line, item in source.items():
        row = reader.read(line, item)
        if row is not None:
            written = output_line(row, "job", JobFailed("nan_logits", row.custom_id))
            assert len(written.decode().splitlines()) == 1
            read = read_output_line(written)
            assert read is not None
            assert (read.custom_id, read.digest, read.failed) == (row.custom_id, row.digest, True)


TARGETS = [
    Target("http", st.tuples(PATHS, BODIES, TYPES), check_body, full_cases=8_000, test_cases=60),
    Target("requests", st.lists(STEPS, min_size=1, max_size=6), check_requests, full_cases=3_000, test_cases=8),
    Target(
        "numbers",
        st.tuples(st.sampled_from(sorted(PLACES)), NUMBER_TEXTS),
        check_number,
        full_cases=5_000,
        test_cases=40,
    ),
    Target("rows", ROWS, check_rows, full_cases=5_000, test_cases=40),
]

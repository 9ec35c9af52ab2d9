"""Reading rows from lines, and checking a whole input."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.client import Client, InvalidBatch, InvalidRequest
from headrace.client.batch.check import MAX_FAULTS, ItemIndex, check, read_items
from headrace.client.batch.errors import InputChanged
from headrace.client.batch.formats.line_reader import MAX_LINE_BYTES
from headrace.client.batch.items import BatchItem
from headrace.client.batch.rows import ItemReader
from headrace.client.batch.sources import open_source
from headrace.config import Settings


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client without a Redis, because checking sends nothing."""
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as made:
        yield made


def rows_of(client: Client, source: Any, params: dict[str, Any] | None = None, **options: Any) -> list[BatchItem]:
    limit = options.pop("limit", None)
    reader = ItemReader(client.model_name, params or {}, **options)
    opened = open_source(source)
    check(opened, reader, client.submitter.prepare_together, limit=limit)
    return list(read_items(opened, reader, limit=limit))


def as_lines(*items: Any) -> io.BytesIO:
    return io.BytesIO("".join(json.dumps(item) + "\n" for item in items).encode())


def test_a_line_of_the_batch_api_and_a_plain_one_mean_the_same(client: Client) -> None:
    body = {"prompt": "Hello.", "max_tokens": 4, "user": "u", "stream": False, "best_of": 1, "suffix": None}
    batch = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (first,) = rows_of(client, as_lines(batch))
    (second,) = rows_of(client, as_lines({"custom_id": "a", "prompt": "Hello.", "max_tokens": 4}))
    assert first == second
    assert first.fields["prompt"] == "Hello."
    assert first.fields["max_tokens"] == 4
    assert first.fields["priority"] == "bulk"


def test_rows_that_ask_for_the_same_are_the_same(client: Client) -> None:
    import numpy as np
    import pandas as pd

    plain = rows_of(client, [{"prompt": "a", "max_tokens": 64}, {"prompt": "b"}])
    table = pd.DataFrame({"prompt": ["a", "b"], "max_tokens": [64, None], "stop": [None, pd.NA], "seed": [-1, -1]})
    nothing = {"priority": 0, "best_of": 1, "suffix": "", "temperature": float("nan"), "use_beam_search": np.False_}
    rows = [{**row, **nothing, "custom_id": None, "stream": False} for row in table.to_dict("records")]
    assert rows_of(client, rows) == plain
    assert rows_of(client, iter(rows)) == plain
    assert rows_of(client, as_lines(*plain_rows())) == plain
    batch = [
        {"custom_id": f"row-{number}", "body": {"prompt": prompt, "max_completion_tokens": size, "seed": -1, "n": None}}
        for number, prompt, size in ((1, "a", 64.0), (2, "b", None))
    ]
    assert rows_of(client, as_lines(*batch)) == plain


def plain_rows() -> list[dict[str, Any]]:
    return [{"prompt": "a", "max_tokens": 64.0, "seed": -1.0}, {"prompt": "b", "max_tokens": float("nan")}]


def test_gaps_leave_the_default_of_the_batch(client: Client) -> None:
    rows = rows_of(
        client,
        [{"prompt": "a", "max_tokens": float("nan")}, {"prompt": "b", "top_p": None}],
        {"max_tokens": 3, "top_p": 0.5},
    )
    assert [(row.fields["max_tokens"], row.fields["top_p"]) for row in rows] == [(3, 0.5)] * 2


def test_plain_rows_are_named_by_their_line(client: Client) -> None:
    source = io.BytesIO(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n"b"\n[15496, 13]')
    rows = rows_of(client, source)
    assert [(row.custom_id, row.fields["prompt"]) for row in rows] == [
        ("row-1", "a"),
        ("row-4", "b"),
        ("row-5", [15496, 13]),
    ]


def test_with_text_each_line_is_a_prompt(client: Client) -> None:
    rows = rows_of(client, io.BytesIO(b'  {"prompt": 1}\n\nsecond \n'), text=True)
    assert [row.fields["prompt"] for row in rows] == ['  {"prompt": 1}', "second "]


def test_parameters_apply_to_rows_that_do_not_set_them(client: Client) -> None:
    rows = rows_of(client, [{"prompt": "a"}, {"prompt": "b", "max_tokens": 9}], {"max_tokens": 3, "priority": "normal"})
    assert [row.fields["max_tokens"] for row in rows] == [3, 9]
    assert rows[0].fields["priority"] == "normal"


def test_seeds_follow_from_the_row_and_differ_between_rows(client: Client) -> None:
    rows = rows_of(client, ["same", "same"])
    again = rows_of(client, iter(["same", "same"]))
    assert [row.fields["seed"] for row in rows] == [row.fields["seed"] for row in again]
    assert rows[0].fields["seed"] != rows[1].fields["seed"]
    assert rows_of(client, [{"prompt": "a", "seed": 7}])[0].fields["seed"] == 7


def test_priority_and_patience_change_the_job_but_not_the_result(client: Client) -> None:
    (plain,) = rows_of(client, ["a"])
    (urgent,) = rows_of(client, ["a"], {"priority": "interactive", "timeout_s": 60})
    (other,) = rows_of(client, ["a"], {"max_tokens": 2})
    assert plain.digest == urgent.digest != other.digest
    assert plain.job_id("run") != urgent.job_id("run")
    assert plain.job_id("run") == rows_of(client, ["a"])[0].job_id("run") != plain.job_id("another")


class Scalar:
    """A value as a pyarrow array returns it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def as_py(self) -> Any:
        return self._value


def test_names_of_tokens_change_the_output_but_not_the_job(client: Client) -> None:
    plain, neutral, named = (
        rows_of(client, [{"custom_id": "a", "prompt": "a", **more}])[0]
        for more in ({}, {"return_tokens_as_token_ids": False}, {"return_tokens_as_token_ids": True})
    )
    assert plain == neutral
    assert (plain.as_token_ids, named.as_token_ids) == (False, True)
    assert plain.fields == named.fields
    assert plain.digest != named.digest  # so that a resumed run does not mix both in one output
    with pytest.raises(InvalidBatch, match="return_tokens_as_token_ids"):
        rows_of(client, [{"prompt": "a", "return_tokens_as_token_ids": 1}])


def test_columns_of_tables_give_prompts(client: Client) -> None:
    import numpy as np

    texts = ["one", "two"]
    for column in (np.array(texts), np.array(texts, dtype=object), [Scalar("one"), Scalar("two")]):
        assert [row.fields["prompt"] for row in rows_of(client, column)] == texts
    tokens = np.array([[15496, 13], [464, 7850]])
    assert [row.fields["prompt"] for row in rows_of(client, tokens)] == tokens.tolist()
    long = np.arange(4000).reshape(2, 2000) + np.array([[0], [1]])
    for source in ([{"prompt": row} for row in long], ({"prompt": list(row)} for row in long)):
        rows = rows_of(client, source)
        assert [list(row.fields["prompt"]) for row in rows] == long.tolist()
        assert rows[0].digest != rows[1].digest


def test_values_that_json_cannot_represent_are_faults_of_their_line(client: Client) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for wrong in ({"prompt": {1}}, {"prompt": "a", "logit_bias": {5: 1, "6": 1}}, {"prompt": "a", 5: 6}, deep):
        with pytest.raises(InvalidBatch) as caught:
            rows_of(client, ["right", wrong])
        assert [fault.line for fault in caught.value.faults] == [2]


@pytest.mark.parametrize(
    ("line", "field", "part"),
    [
        (b"not json", "line", "--text"),
        (b"{", "line", "invalid JSON"),
        (b"[" * 100_000, "line", "invalid JSON"),
        (b"\xff", "line", "UTF-8"),
        (b"7", "line", "object"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens", "at least 1"),
        (b'{"prompt": "a", "max_new_tokens": 5}', "max_new_tokens", "max_tokens"),
        (b'{"prompt": "a", "max_completion_tokens": 5}', "max_completion_tokens", "did you mean max_tokens"),
        (b'{"prompt": "a", "max_tokens": 64.5}', "max_tokens", "64.5"),
        (
            b'{"custom_id": "a", "body": {"prompt": "a", "max_tokens": 4, "max_completion_tokens": 5}}',
            "max_completion_tokens",
            "max_tokens is 4",
        ),
        (b'{"prompt": "a", "model": "~/demo"}', "model", "a path belongs into"),
        (b'{"max_tokens": 5}', "prompt", "text"),
        (b'{"prompt": "a", "id": "x"}', "id", "custom_id"),
        (b'{"prompt": "a", "stream": true}', "stream", "complete results"),
        (b'{"prompt": "a", "custom_id": 7}', "custom_id", "1 to 512"),
        (b'{"prompt": "a", "custom_id": "\\ud800"}', "custom_id", "unpaired surrogate"),
        (b'{"prompt": "a", "\\ud800": 1}', "\\ud800", "unpaired surrogate"),
        (b'{"method": "POST", "body": {"prompt": "\\ud800"}}', "prompt", "unpaired surrogate"),
        (b'{"body": {"prompt": "a"}}', "custom_id", "1 to 512"),
        (b'{"custom_id": "a", "body": "a"}', "body", "object"),
        (b'{"custom_id": "a", "url": "/v1/chat/completions", "body": {}}', "messages", "got nothing"),
        (b'{"custom_id": "a", "url": "/v1/chat/completions", "body": "a"}', "body", "an object with messages"),
        (b'{"custom_id": "a", "body": {"messages": [{}]}}', "messages", "send messages to /v1/chat/completions"),
        (b'{"custom_id": "a", "method": "GET", "body": {}}', "url", "got 'GET /v1/completions'; expected 'POST"),
        (b'{"custom_id": "a", "body": {}, "more": 1}', "more", "custom_id, method, url, body"),
        (b'{"custom_id": "a", "body": {"prompt": "a", "best_of": 4}}', "best_of", "all n samples"),
        (b'{"custom_id": "a", "body": {"prompt": "a", "model": "gpt-5"}}', "model", "demo"),
    ],
)
def test_the_fault_of_a_line_is_named(client: Client, line: bytes, field: str, part: str) -> None:
    with pytest.raises(InvalidBatch) as caught:
        rows_of(client, io.BytesIO(b'{"prompt": "right"}\n' + line + b"\n"), models={"demo"})
    (fault,) = caught.value.faults
    assert (fault.line, fault.field) == (2, field)
    assert part in fault.message


def test_every_fault_is_counted_and_the_first_are_listed_by_line(client: Client) -> None:
    wrong = [{"prompt": "a", "top_p": 2 + i, "custom_id": "same"} for i in range(2 * MAX_FAULTS)]
    with pytest.raises(InvalidBatch) as caught:
        rows_of(client, ["right", *wrong])
    error = caught.value
    assert error.count == 4 * MAX_FAULTS - 1  # each parameter, and each name but the first
    assert [fault.line for fault in error.faults] == sorted(fault.line for fault in error.faults)
    assert len(error.faults) == MAX_FAULTS
    assert error.faults[0].line == 2
    listed = sum(fault.times for fault in error.faults)
    assert str(error).endswith(f"and {4 * MAX_FAULTS - 1 - listed} more")


def test_equal_faults_are_told_once_with_their_number(client: Client) -> None:
    with pytest.raises(InvalidBatch) as caught:
        rows_of(client, ["right", *[{"prompt": "a", "top_p": 2}] * 300, {"prompt": "a", "top_p": 3}])
    assert [(fault.line, fault.times) for fault in caught.value.faults] == [(2, 300), (302, 1)]
    assert "line 2: top_p: got 2; expected a number above 0, at most 1 (1 is off) (and 299 more" in str(caught.value)


def test_a_repeated_custom_id_is_a_fault_that_names_its_first_line(client: Client) -> None:
    with pytest.raises(InvalidBatch, match="line 3: custom_id: the same as in line 1"):
        rows_of(client, [{"prompt": "a", "custom_id": "x"}, "b", {"prompt": "c", "custom_id": "x"}])
    with pytest.raises(InvalidBatch, match="line 2: custom_id: the same as in line 1"):
        rows_of(client, [{"prompt": "a", "custom_id": "row-2"}, "b"])


def test_repeated_custom_ids_are_found_in_inputs_larger_than_memory_limits() -> None:
    index = ItemIndex()
    for line in range(1, 300_001):  # about 10 MB, more than SQLite keeps in memory
        index.add(f"name-{line % 299_998}", "0f", line)
    assert sorted(index.duplicates()) == [(299_999, 1), (300_000, 2)]
    written = [("name-5", "0f"), ("name-6", "aa"), ("name-7", ""), ("another", "0f"), ("\udcff", "0f")]
    for _ in range(2):  # matches may be read again
        assert sorted(index.matches(written)) == [(5, True), (6, False), (7, True)]


def test_an_input_without_rows_is_a_fault(client: Client) -> None:
    for source in (io.BytesIO(b"\n\n"), [], iter(())):
        with pytest.raises(InvalidBatch, match="no requests"):
            rows_of(client, source)


def test_a_line_without_end_is_a_fault_and_is_not_read_into_memory(client: Client) -> None:
    source = io.BytesIO(b"x" * (3 * MAX_LINE_BYTES) + b'\n{"prompt": "a"}\n{}\n')
    with pytest.raises(InvalidBatch) as caught:
        rows_of(client, source)
    assert [fault.line for fault in caught.value.faults] == [1, 3]


def test_with_a_limit_only_the_first_rows_are_read(client: Client) -> None:
    rows = rows_of(client, io.BytesIO(b'{"prompt": "a"}\n\n{"prompt": "b"}\nwrong\n'), limit=2)
    assert [row.line for row in rows] == [1, 3]


def test_files_may_be_gzipped(client: Client, tmp_path: Path) -> None:
    data = b'{"prompt": "a"}\n{"prompt": "b"}\n'
    (tmp_path / "plain").write_bytes(data)
    (tmp_path / "zipped").write_bytes(gzip.compress(data[:16]) + gzip.compress(data[16:]))
    assert rows_of(client, tmp_path / "plain") == rows_of(client, str(tmp_path / "zipped"))
    (tmp_path / "torn").write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(InvalidBatch, match="cannot be read any further"):
        rows_of(client, tmp_path / "torn")
    with pytest.raises(InvalidBatch, match="cannot be read: No such file"):
        rows_of(client, tmp_path / "none")


def test_invalid_sources_are_refused(client: Client) -> None:
    for source in (7, {"prompt": "a"}):
        with pytest.raises(InvalidRequest, match="source"):
            rows_of(client, source)
    with pytest.raises(InvalidRequest, match="prompts"):
        rows_of(client, iter([object()]))


def test_an_input_that_changes_between_two_readings_is_detected(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    reader = ItemReader("demo", {})
    source = open_source(path)
    check(source, reader, client.submitter.prepare_together)
    path.write_text('{"prompt": "a"}\n{"pro\n')
    with pytest.raises(InputChanged, match="line 2"):
        list(read_items(source, reader))


def test_a_row_may_have_a_list_of_prompts(client: Client) -> None:
    body = {"prompt": ["Hello.", "Bye."], "max_tokens": 4}
    batch = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (first, second) = rows_of(client, as_lines(batch, {"prompt": [[1], [2]]}))
    assert [fields["prompt"] for fields in first.requests()] == ["Hello.", "Bye."]
    assert second.prompts == [[1], [2]]


@pytest.mark.parametrize(
    ("prompts", "field"),
    [(["a", "\ud800"], "prompt[1]"), ([[1], []], "prompt[1]"), (["a", [1]], "prompt"), (["a"] * 1_025, "prompt")],
)
def test_the_wrong_one_of_a_list_of_prompts_is_named(client: Client, prompts: list[Any], field: str) -> None:
    with pytest.raises(InvalidBatch) as caught:
        rows_of(client, as_lines({"prompt": prompts}))
    assert [fault.field for fault in caught.value.faults] == [field]


@pytest.mark.parametrize("url", ["/v1/responses", "/v1/embeddings"])
def test_an_endpoint_of_other_models_says_what_to_use_instead(client: Client, url: str) -> None:
    with pytest.raises(InvalidBatch, match=r"send messages to /v1/chat/completions, or a text .* to /v1/completions"):
        rows_of(client, as_lines({"custom_id": "a", "method": "POST", "url": url, "body": {"messages": []}}))


def test_all_requests_of_a_batch_have_one_endpoint(client: Client) -> None:
    text: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}
    chat = {**text, "custom_id": "b", "url": "/v1/chat/completions"}
    with pytest.raises(InvalidBatch) as caught:
        rows_of(client, as_lines(text, chat))
    (fault,) = caught.value.faults
    assert (fault.line, fault.field) == (2, "url")
    expected = "'POST /v1/completions', the endpoint of the batch; all of its requests have the same"
    assert fault.message == f"url: got 'POST /v1/chat/completions'; expected {expected}"
    with pytest.raises(InvalidBatch, match=r"expected 'POST /v1/chat/completions', the endpoint of the batch"):
        rows_of(client, as_lines(text), endpoint="/v1/chat/completions")  # as `POST /v1/batches` names it
    assert [row.endpoint for row in rows_of(client, as_lines(text, {**text, "custom_id": "c", "url": None}))] == [
        "/v1/completions"
    ] * 2

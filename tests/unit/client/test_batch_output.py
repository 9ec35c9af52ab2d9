"""Output files: what is written, and how files of killed processes are continued."""

from __future__ import annotations

import contextlib
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.client.batch.errors import OutputRefused
from headrace.client.batch.items import BatchItem
from headrace.client.batch.openai import completion
from headrace.client.batch.output import Output
from headrace.client.batch.output_lines import output_line, read_output_line
from headrace.client.batch.run import JoinedRows, RowPart
from headrace.client.wire.errors import InvalidRequest, JobFailed
from headrace.client.wire.results import Choice, Result, Timings, TokenLogprob, TopLogprob, Usage


def row(name: str, digest: str = "0123456789abcdef") -> BatchItem:
    return BatchItem(1, name, {"prompt": "p"}, digest)


def result(text: str = "out", logprobs: list[TokenLogprob] | None = None) -> Result:
    choice = Choice(index=0, text=text, token_ids=[1], finish_reason="length", logprobs=logprobs)
    usage = Usage(prompt_tokens=2, completion_tokens=1, total_tokens=3)
    timings = Timings(waiting_s=0, prefill_s=0, decode_s=0)
    return Result(id="j", model="demo", choices=[choice], usage=usage, seed=5, timings=timings, fingerprint="f")


def write(path: Path, names: list[str], *, failed: tuple[str, ...] = (), **how: bool) -> None:
    with Output(path) as output:
        list(output.scan(retry_errors=how.get("retry", False)))
        output.open(overwrite=how.get("overwrite", False))
        output.write([(row(name), JobFailed("bad", "why") if name in failed else result(name)) for name in names])
        if how.get("finish"):
            output.finish()


def names_in(path: Path) -> list[str]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line)["custom_id"] for line in data.splitlines()]


def test_a_line_is_as_the_batch_api_writes_it() -> None:
    line = json.loads(output_line(row("a"), "job", result("Zürich")))
    assert list(line) == ["id", "custom_id", "response", "error"]
    assert line["custom_id"] == "a"
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "Zürich"
    counts = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    assert body["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    line = json.loads(output_line(row("a"), "job", JobFailed("nan_logits", "bad weights")))
    assert line["response"] is None
    assert line["error"] == {"code": "nan_logits", "message": "bad weights"}


@pytest.mark.parametrize(
    ("failure", "param", "code"),
    [
        (JobFailed("context_length_exceeded", "too long"), "prompt", "context_length_exceeded"),
        (JobFailed("invalid_token_id", "logit_bias has 60000"), "logit_bias", "invalid_token_id"),
        (InvalidRequest("top_p", "0", "more"), "top_p", "invalid_request"),
    ],
)
def test_a_mistake_of_the_client_is_a_response_as_openais(failure: Exception, param: str, code: str) -> None:
    written = output_line(row("a"), "job", failure)
    line = json.loads(written)
    assert line["error"] is None
    assert (line["response"]["status_code"], line["response"]["request_id"]) == (400, "job")
    error = line["response"]["body"]["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    read = read_output_line(written)
    assert read is not None
    assert read.failed


def test_a_line_is_one_line_for_every_reader() -> None:
    text = "a\x85b\u2028c\u2029d"
    written = output_line(row("n\u2028"), "job", result(text)).decode()
    assert len(written.splitlines()) == 1
    line = json.loads(written)
    assert (line["custom_id"], line["response"]["body"]["choices"][0]["text"]) == ("n\u2028", text)


def test_the_jobs_of_a_list_of_prompts_are_one_row() -> None:
    several = BatchItem(3, "a", {"prompt": ["x", "y"], "seed": 1}, "d", prompts=["x", "y"], has_own_seed=False)
    first, second = several.requests()
    assert (first["prompt"], second["prompt"]) == ("x", "y")
    assert first["seed"] != second["seed"]
    assert [fields["seed"] for fields in replace(several, has_own_seed=True).requests()] == [1, 1]
    joined, one = JoinedRows(), row("b")
    parts = [RowPart(several, number, 2) for number in (0, 1)]
    assert joined.add([(parts[1], result("y")), (RowPart(one, 0, 1), result())], "run") == [(one, result())]
    ((done, outcome),) = joined.add([(parts[0], result("x").model_copy(update={"seed": 6}))], "run")
    assert done is several
    assert isinstance(outcome, Result)
    body = json.loads(output_line(several, "job", outcome))["response"]["body"]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "x"), (1, "y")]
    assert (body["id"], body["seed"], body["usage"]["total_tokens"]) == (f"cmpl-{several.job_id('run')}", None, 6)
    joined.add([(parts[0], result("x"))], "run")
    ((_, failed),) = joined.add([(parts[1], JobFailed("nan_logits", "y"))], "run")
    assert isinstance(failed, JobFailed)


def test_log_probabilities_are_as_the_completions_api_writes_them() -> None:
    first = TokenLogprob(token_id=1, token="He", logprob=None)
    second = TokenLogprob(token_id=2, token="llo", logprob=-1.0, top=[TopLogprob(token_id=3, token="y", logprob=-0.5)])
    scores = completion(result(logprobs=[first, second]))["choices"][0]["logprobs"]
    assert scores == {
        "tokens": ["He", "llo"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {"llo": -1.0, "y": -0.5}],
        "text_offset": [0, 2],
    }


def test_a_row_may_ask_for_names_that_are_token_ids() -> None:
    score = TokenLogprob(token_id=2, token="llo", logprob=-1.0, top=[TopLogprob(token_id=3, token="y", logprob=-0.5)])
    named = BatchItem(1, "a", {"prompt": "p"}, "0123456789abcdef", as_token_ids=True)
    body = json.loads(output_line(named, "job", result(logprobs=[score])))["response"]["body"]
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["token_id:2"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"token_id:2": -1.0, "token_id:3": -0.5}],
        "text_offset": [0],
    }


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_rows_are_appended_after_every_kind_of_end(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, ["a", "b"])
    whole = path.read_bytes()
    write(path, ["c"])
    assert names_in(path) == ["a", "b", "c"]
    data = path.read_bytes()
    for torn in (*range(len(whole), len(data), 7), len(data) - 1):  # the second process died at any byte
        path.write_bytes(data[:torn])
        write(path, ["d"])
        assert names_in(path)[:2] == ["a", "b"]
        assert names_in(path)[-1] == "d"
    for torn in range(0, len(whole), 11):  # or the first
        path.write_bytes(whole[:torn])
        write(path, ["d"])
        assert names_in(path)[-1] == "d"
    path.write_bytes(data + b"\0" * 4096)  # a power failure may leave zeros at the end
    write(path, ["d"])
    assert names_in(path) == ["a", "b", "c", "d"]


def test_each_row_can_be_read_before_the_file_is_closed(tmp_path: Path) -> None:
    for name in ("out.jsonl", "out.jsonl.gz"):
        output = Output(tmp_path / name)
        output.open(overwrite=False)
        output.write([(row("a"), result())])
        with gzip.open(tmp_path / name) if name.endswith("gz") else (tmp_path / name).open("rb") as file:
            assert json.loads(file.readline())["custom_id"] == "a"
        output.close()


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_failures_are_removed_when_they_are_retried(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, ["a", "b", "c"], failed=("b",))
    run = json.loads((tmp_path / f"{name}.run").read_text())["run"]
    write(path, ["b"], retry=True)
    assert sorted(names_in(path)) == ["a", "b", "c"]
    assert json.loads((tmp_path / f"{name}.run").read_text())["run"] != run  # so that they are new jobs
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f"{name}.run"]


def test_failures_go_to_the_error_file(tmp_path: Path) -> None:
    out, errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
    with Output(out, errors) as output:
        output.open(overwrite=False)
        output.write([(row("a"), result()), (row("b"), JobFailed("bad", "why"))])
    assert names_in(out) == ["a"]
    assert names_in(errors) == ["b"]
    with Output(out, errors) as output:
        list(output.scan(retry_errors=True))
        output.open(overwrite=False)
    assert names_in(errors) == []


def test_inline_failures_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, ["a", "b", "c"], failed=("a",))
    assert names_in(path) == ["a", "b", "c"]


def test_a_run_keeps_its_name_until_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    runs = []
    for _ in range(2):
        with Output(path) as output:
            output.open(overwrite=False)
            runs.append(output.run)
    assert runs[0] == runs[1]
    write(path, [], finish=True)
    assert not (tmp_path / "out.jsonl.run").exists()
    with Output(path) as output:
        assert output.run != runs[0]


def test_two_processes_cannot_write_to_one_output(tmp_path: Path) -> None:
    first = Output(tmp_path / "out.jsonl")
    with pytest.raises(OutputRefused, match="another process"):
        Output(tmp_path / "out.jsonl")
    first.close()
    Output(tmp_path / "out.jsonl").close()


def test_existing_output_is_overwritten_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, ["a"], finish=True)
    before = path.read_bytes()
    with pytest.raises(OutputRefused, match="--resume"), Output(path) as output:
        output.check_free(None, resume=False, overwrite=False)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    with Output(path) as output:
        output.check_free(None, resume=False, overwrite=True)
        output.open(overwrite=True)
    assert path.read_bytes() == b""


def test_the_input_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n')
    (tmp_path / "link").symlink_to(path)
    for name in ("in.jsonl", "link"):
        with pytest.raises(OutputRefused, match="is the input"), Output(tmp_path / name) as output:
            output.check_free(str(path), resume=True, overwrite=False)
    with pytest.raises(OutputRefused, match="is the input"), Output(tmp_path / "out.jsonl", path) as output:
        output.check_free(str(path), resume=True, overwrite=False)
    for name, source in (("new.jsonl", tmp_path), ("new.parquet", f"{tmp_path}/*.parquet"), ("new.parquet", tmp_path)):
        with pytest.raises(OutputRefused, match="is the input"), Output(tmp_path / name) as output:
            output.check_free(str(source), resume=True, overwrite=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "link"]
    assert path.read_text() == '{"prompt": "a"}\n'


def test_a_file_that_is_not_an_output_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for data in (b"my diary\nsecond line\n", output_line(row("a"), "j", result()) + b"x\n" + b"y\n"):
        path.write_bytes(data)
        with Output(path) as output, contextlib.suppress(OutputRefused):
            list(output.scan(retry_errors=False))
            if data.startswith(b"{"):
                continue  # a torn end of several lines
            pytest.fail("it was taken for an output")
        assert path.read_bytes() == data
    path.write_bytes(b"x\n" + output_line(row("a"), "j", result()))
    with Output(path) as output, pytest.raises(OutputRefused, match="not an output of a batch"):
        list(output.scan(retry_errors=False))


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputRefused, match=r"out\.jsonl\.run cannot be written: No such file"):
        Output(tmp_path / "none" / "out.jsonl")
    output = Output(tmp_path / "out.jsonl", tmp_path / "none" / "errors.jsonl")
    with pytest.raises(OutputRefused, match=r"errors\.jsonl cannot be written: No such file"):
        output.open(overwrite=False)
    output.close()

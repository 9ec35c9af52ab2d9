"""Flat rows in every format: what pandas, pyarrow and csv read from them, and what a resumed batch makes of them."""

from __future__ import annotations

import contextlib
import csv
import datetime
import decimal
import gzip
import json
import random
from pathlib import Path
from typing import Any

import fsspec
import pandas
import pyarrow
import pytest
from pyarrow import dataset, parquet

from headrace.client import Client
from headrace.client.batch import part_files
from headrace.client.batch.columns import Columns
from headrace.client.batch.errors import InvalidBatch, OutputRefused
from headrace.client.batch.formats import arrow_rows
from headrace.client.batch.formats.flat import flat_names
from headrace.client.batch.formats.writers import output_file, output_format
from headrace.client.batch.items import BatchItem
from headrace.client.batch.output import Output
from headrace.client.batch.part_files import PartFiles
from headrace.client.batch.run import Batch
from headrace.client.wire.errors import InvalidRequest, JobFailed
from headrace.client.wire.results import Choice, Result, Timings, Usage
from headrace.config import Settings

FORMATS = ["csv", "tsv", "jsonl", "csv.gz", "parquet", "arrow"]
TEXT = 'He said: "one\ttwo",\r\nand\u2028 left\n'


def row(name: str, columns: Any = None) -> BatchItem:
    return BatchItem(
        1, name, {"prompt": name}, "0123456789abcdef", columns={"place": "a,b"} if columns is None else columns
    )


def result(text: str = TEXT) -> Result:
    return Result(
        id="job",
        model="demo",
        choices=[Choice(index=0, text=text, token_ids=[1], finish_reason="stop", stop_reason=13, complete=False)],
        usage=Usage(prompt_tokens=2, completion_tokens=1, total_tokens=3),
        seed=1,
        timings=Timings(waiting_s=0, prefill_s=0, decode_s=0),
    )


def write(path: Any, names: list[str], failed: str = "", *, retry: bool = False, **options: Any) -> list[str]:
    """Write requests as a run does, and return the names of those that were there before."""
    with Output(path, form="flat", passed={"place": "string"}, **options) as output:
        before = [written.custom_id for written in output.scan(retry_errors=retry)]
        output.open(overwrite=False)
        output.write([(row(name), JobFailed("bad", "why") if name in failed else result()) for name in names])
    return before


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of an output, as other programs read them."""
    kind = path.suffixes[0]
    if kind in (".parquet", ".arrow"):
        return dataset.dataset(path, format=kind[1:]).to_table().to_pylist()
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        if kind == ".jsonl":
            return [json.loads(line) for line in file]
        return list(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","))


@pytest.mark.parametrize("extension", FORMATS)
def test_each_request_is_one_row_and_a_resumed_run_adds_the_others(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"out.{extension}"
    assert write(path, ["a", "b"], failed="b") == []
    assert write(path, ["c"]) == ["a", "b"]
    first, second, third = rows_in(path)
    assert (first["custom_id"], first["text"], first["finish_reason"], first["place"]) == ("a", TEXT, "stop", "a,b")
    assert (first["stop_reason"], str(first["complete"]).lower()) == ("13", "false"), "it has not the form of the row"
    assert [str(first[name]) for name in ("prompt_tokens", "completion_tokens")] == ["2", "1"]
    assert (second["error"], second["text"] or None, third["custom_id"]) == ("bad: why", None, "c")
    assert write(path, ["b"], retry=True) == ["a", "c"]
    assert sorted(each["custom_id"] for each in rows_in(path)) == ["a", "b", "c"]
    assert not any(each["error"] for each in rows_in(path))
    assert not [each.name for each in tmp_path.rglob("*") if "tmp" in each.name]


@pytest.mark.parametrize("extension", ["csv", "tsv", "jsonl", "csv.gz"])
def test_a_file_is_repaired_wherever_it_was_torn(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"out.{extension}"
    write(path, ["a"])
    whole = path.read_bytes()
    write(path, ["b"])
    data = path.read_bytes()
    for end in range(0, len(data), 17):
        path.write_bytes(data[:end])
        before = write(path, ["c"])
        if path.suffix != ".gz":  # of a torn gzip file more can be read than its complete members
            assert before == (["a"] if end >= len(whole) else [])
        assert [each["custom_id"] for each in rows_in(path)] == [*before, "c"]


def test_a_part_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.parquet"
    write(path, ["a"])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(path, ["b"])
    assert sorted(each.name for each in path.iterdir()) == [".part-00001.parquet.tmp", "part-00000.parquet"]
    assert [each["custom_id"] for each in rows_in(path)] == ["a"]
    assert write(path, []) == ["a"]
    assert [each.name for each in path.iterdir()] == ["part-00000.parquet"]
    assert write(path, ["b"]) == ["a"]
    assert [each["custom_id"] for each in rows_in(path)] == ["a", "b"]


def test_parts_are_written_when_they_are_full_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_files, "PART_ROWS", 2)
    now = [0.0]
    output = output_file(tmp_path / "out.parquet", None, {})
    assert isinstance(output, PartFiles)
    output._clock = lambda: now[0]
    output.open()
    output.write([(row(name, {}), "job", result()) for name in "abc"])
    assert [parquet.read_metadata(each).num_rows for each in tmp_path.glob("*/*")] == [2]
    now[0] = 61.0
    output.write([])
    assert sorted(parquet.read_metadata(each).num_rows for each in tmp_path.glob("*/*")) == [1, 2]


@pytest.mark.parametrize("name", ["out.parquet", "out.csv"])
def test_what_belongs_to_something_else_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, ["a"])
    with Output(path, passed={"other": "string"}) as output, pytest.raises(OutputRefused, match="--overwrite"):
        list(output.scan(retry_errors=False))
    assert [each["custom_id"] for each in rows_in(path)] == ["a"]
    foreign = tmp_path / "foreign.parquet"
    foreign.mkdir()
    parquet.write_table(pyarrow.table({"a": [1]}), foreign / "part-00000.parquet")
    with Output(foreign) as output, pytest.raises(OutputRefused, match=r"part-00000\.parquet is not a part of a batch"):
        list(output.scan(retry_errors=False))
    (foreign / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with Output(foreign) as output, pytest.raises(OutputRefused, match=r"notes\.txt.*write to a new directory"):
            output.check_free(None, resume=not overwrite, overwrite=overwrite)
    (tmp_path / "file.parquet").write_bytes(b"x")
    with Output(tmp_path / "file.parquet") as output, pytest.raises(OutputRefused, match="is a file"):
        output.check_free(None, resume=True, overwrite=False)


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl", "arrow"])
def test_an_output_of_another_file_system_has_parts(extension: str) -> None:
    url = f"memory://flat-{extension}/out.{extension}"
    assert write(url, ["a", "b"], failed="b") == []
    assert write(url, ["c"]) == ["a", "b"]
    assert write(url, ["b"], retry=True) == ["a", "c"]
    files = fsspec.filesystem("memory")
    names = [name.rsplit("/", 1)[-1] for name in files.find(f"/flat-{extension}")]
    assert names == ["_headrace.run", *(f"part-{number:05}.{extension}" for number in range(3))]
    with Output(url, form="flat", passed={"place": "string"}) as output:
        with pytest.raises(OutputRefused, match="exists; resume it"):
            output.check_free(None, resume=False, overwrite=False)
        assert len(list(output.scan(retry_errors=False))) == 3
        output.open(overwrite=False)
        output.finish()
    assert f"/flat-{extension}/out.{extension}/_headrace.run" not in files.find(f"/flat-{extension}")


# --- from the input to the output -----------------------------------------------------------------------------------

TABLE = {
    "prompt": ["a", "b", "c"],
    "day": [datetime.date(2024, 2, 29), None, datetime.date(1, 1, 1)],
    "raw": [b"\xff\x00", b"", None],
    "price": [decimal.Decimal("1.50"), None, decimal.Decimal("-2.00")],
    "at": pyarrow.array([123456789123456789, None, 1], pyarrow.timestamp("ns", "UTC")),
    "tags": [["x", None], [], None],
    "small": pyarrow.array([1, None, -128], pyarrow.int8()),
    "kind": pyarrow.array(["x", "y", None]).dictionary_encode(),
    "text": ["one", None, "three"],
    "far": [float("nan"), None, 0.1],
}


def through(tmp_path: Path, source: Any, name: str, **options: Any) -> Path:
    """Check an input, and write each of its rows with a result as a run does, in another order."""
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as client:
        batch = Batch(client, source, **options)
    path = tmp_path / name
    with Output(path, passed=batch._passed({output_format(path, None)})) as output:
        output.open(overwrite=True)
        output.write([(item, result("text")) for item in reversed(list(batch.rows()))])
    return path


def test_columns_keep_their_types_from_parquet_to_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pyarrow.table(TABLE), tmp_path / "in.parquet", row_group_size=2)
    read = []
    monkeypatch.setattr(arrow_rows, "_values_of", lambda column: read.append(column) or column.to_pylist())
    path = through(tmp_path, tmp_path / "in.parquet", "out.parquet")
    assert len(read) == 4  # the prompts of two row groups, twice: no other column became values of Python
    before, after = parquet.read_table(tmp_path / "in.parquet"), parquet.read_table(path)
    for field in before.schema:
        if field.name != "prompt":
            name = "input_text" if field.name == "text" else field.name
            assert after.schema.field(name).type == field.type
            pairs = zip(after.column(name).to_pylist(), before.column(field.name).to_pylist()[::-1], strict=True)
            assert all(a == b or (a != a and b != b) for a, b in pairs)
    line = rows_in(through(tmp_path, tmp_path / "in.parquet", "out.csv"))[2]
    assert (line["day"], line["raw"], line["price"], line["small"]) == ("2024-02-29", "/wA=", "1.50", "1")
    assert (line["at"][:29], json.loads(line["tags"])) == ("1973-11-29T21:33:09.123456789", ["x", None])


def test_columns_of_json_lines_get_the_type_of_their_values(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "n1": 1, "f": 1, "s": "x", "o": {"k": [1]}}, {"prompt": "b", "f": 0.5, "late": True}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    frame = pandas.read_parquet(through(tmp_path, tmp_path / "in.jsonl", "out.parquet", columns=Columns()))
    assert frame[["custom_id", "f", "s"]].values.tolist()[1] == ["row-1", 1.0, "x"]
    assert (json.loads(frame["o"][1]), frame["late"][0]) == ({"k": [1]}, True)
    assert rows_in(through(tmp_path, tmp_path / "in.jsonl", "out.csv", columns=Columns()))[0]["late"] == "true"
    (tmp_path / "in.jsonl").write_text('{"prompt": "a", "x": 1}\n{"prompt": "b", "x": "1"}\n')
    with pytest.raises(InvalidBatch, match=r"line 2: x: got int64 in line 1, string in line 2; .*JSON lines or CSV"):
        through(tmp_path, tmp_path / "in.jsonl", "out.parquet", columns=Columns())
    assert len(rows_in(through(tmp_path, tmp_path / "in.jsonl", "out.csv", columns=Columns()))) == 2


@pytest.mark.parametrize(
    ("more", "field"), [({"n": 2}, "n"), ({"logprobs": 1}, "logprobs"), ({"prompt": ["a", "b"]}, "prompt")]
)
def test_a_result_that_does_not_fit_into_a_row_is_refused(tmp_path: Path, more: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidBatch, match=rf"line 2: {field}: .*results\.jsonl"):
        through(tmp_path, [{"prompt": "a"}, {"prompt": "a", **more}], "out.csv")


def test_a_type_that_a_format_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="column 'gap' of type month_day_nano_interval"):
        output_file("out.parquet", None, {"gap": pyarrow.month_day_nano_interval()})


def test_names_of_columns_do_not_clash() -> None:
    assert flat_names(["text", "input_text", "a"]) == {"text": "input_input_text", "input_text": "input_text", "a": "a"}
    formats = {"a.csv": None, "b.jsonl": "flat", "c.feather": "flat", "d": "parquet", "e": None, "f.csv.gz": "flat"}
    assert [output_format(*each) for each in formats.items()] == ["csv", "flat", "arrow", "parquet", "openai", "csv"]
    with pytest.raises(InvalidRequest, match="xlsx"):
        output_format("a", "xlsx")


@pytest.mark.parametrize("extension", ["parquet", "arrow"])
def test_a_spoilt_part_is_refused_by_its_name(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"out.{extension}"
    write(path, ["a", "b", "c"])
    part, dice = path / f"part-00000.{extension}", random.Random(1)
    whole = part.read_bytes()
    for spoilt in (whole[:-9], b"", whole[: len(whole) // 2]):
        part.write_bytes(spoilt)
        with Output(path, passed={"place": "string"}) as output, pytest.raises(OutputRefused, match="part-00000"):
            list(output.scan(retry_errors=False))
    for _ in range(100):
        part.write_bytes(spoil(whole, dice))
        with Output(path, passed={"place": "string"}) as output, contextlib.suppress(OutputRefused):
            list(output.scan(retry_errors=False))


def spoil(data: bytes, dice: random.Random) -> bytes:
    """The data with some other bytes."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)

"""Tables as input of a batch: files that pyarrow, pandas and csv wrote give the same requests as JSON lines."""

import csv
import io
import json
from itertools import chain

import fsspec
import pandas
import pyarrow
import pytest
from pyarrow import feather, parquet

from headrace.client.batch.check import check, read_items
from headrace.client.batch.columns import Columns
from headrace.client.batch.errors import InvalidBatch
from headrace.client.batch.formats.readers import format_of
from headrace.client.batch.map import check_no_table
from headrace.client.batch.output_lines import output_line
from headrace.client.batch.rows import ItemReader
from headrace.client.batch.sources import ShardSource, open_source
from headrace.client.wire.errors import InvalidRequest

ROWS = [
    {"key": "a", "text": 'The "old"\nhouse, and', "max_tokens": 4, "place": "Oslo"},
    {"key": "b", "text": "3", "max_tokens": 5, "place": None},
    {"key": "c", "text": " Zürich\u2028lake ", "max_tokens": 6, "place": "a;b"},
]
COLUMNS = Columns("text", "key", ["max_tokens"])


def write_csv(path, delimiter=","):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "csv": write_csv,
    "tsv": lambda path: write_csv(path, "\t"),
    "parquet": lambda path: pandas.DataFrame(ROWS).to_parquet(path, row_group_size=2),
    "arrow": lambda path: path.write_bytes(stream_of(pyarrow.Table.from_pylist(ROWS))),
    "feather": lambda path: feather.write_feather(pyarrow.Table.from_pylist(ROWS), path),
    "json": lambda path: path.write_text(json.dumps(ROWS)),
    "jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
}


def stream_of(table):
    file = io.BytesIO()
    with pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def requests_of(path, name, columns=COLUMNS, shard=(0, 1)):
    source = ShardSource(open_source(path, name), *shard)
    reader = ItemReader("gpt2", {}, columns=columns)
    check(source, reader, iter)
    return list(read_items(source, reader))


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_in_every_format_are_the_same_requests(tmp_path, name):
    path = tmp_path / f"rows.{name}"
    WRITERS[name](path)
    items = requests_of(path, name)
    assert [item.custom_id for item in items] == ["a", "b", "c"]
    assert [item.fields["prompt"] for item in items] == [row["text"] for row in ROWS]
    assert [item.fields["max_tokens"] for item in items] == [4, 5, 6]
    assert [item.columns for item in items] == [{"place": row["place"]} for row in ROWS]
    WRITERS["jsonl"](tmp_path / "reference")
    assert [item.digest for item in items] == [item.digest for item in requests_of(tmp_path / "reference", "jsonl")]


def test_shards_together_are_the_whole_with_the_same_ids_and_seeds(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt\n" + "\n".join(f"prompt {index}" for index in range(7)))
    whole = requests_of(path, "csv", Columns())
    shards = [requests_of(path, "csv", Columns(), (index, 3)) for index in range(3)]
    assert [len(shard) for shard in shards] == [3, 2, 2]
    assert sorted(chain.from_iterable(shards), key=lambda item: item.line) == whole


def test_a_table_is_read_from_any_file_system():
    with fsspec.open("memory://tables/rows.parquet", "wb") as file:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    assert len(requests_of("memory://tables/rows.parquet", "parquet")) == 3
    with pytest.raises(InvalidBatch, match=r"memory://tables/none\.csv cannot be read"):
        open_source("memory://tables/none.csv")


def test_the_columns_of_a_row_are_in_its_output_line(tmp_path):
    WRITERS["csv"](tmp_path / "rows.csv")
    line = output_line(requests_of(tmp_path / "rows.csv", "csv")[0], "job", InvalidRequest("prompt", "none", "one"))
    assert json.loads(line)["columns"] == {"place": "Oslo"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("promt\nThe house\n", r"prompt_column.*'prompt'.*promt"),
        ("prompt,a\nThe house\n", r"row 1: .*1 fields; expected 2"),
        ("prompt,prompt\nx,y\n", r"rows\.csv: .* a column name twice: prompt;"),
        ("prompt,a\n,1\n", r"rows\.csv, row 1: prompt: .*null.*--skip-invalid"),
        ('prompt\n"The house\n', "unexpected end of data"),
        ("prompt\n" + "x" * 5_000_000, "field larger than field limit"),
    ],
)
def test_a_wrong_table_is_refused_with_its_row(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(InvalidBatch, match=message):
        requests_of(path, "csv", Columns())


@pytest.mark.parametrize("name", ["parquet", "arrow", "feather", "json"])
def test_a_truncated_table_is_refused(tmp_path, name):
    path = tmp_path / f"rows.{name}"
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidBatch, match="the file cannot be read"):
        requests_of(path, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"null\n", "NoneType"), (b"3\n", "int"), ('"The house"'.encode("utf-16"), "UTF-16.*iconv")],
)
def test_odd_lines_are_refused(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidBatch, match=message):
        requests_of(path, "jsonl", None)


@pytest.mark.parametrize("table", [pandas.DataFrame(ROWS), pyarrow.Table.from_pylist(ROWS)])
def test_a_whole_table_is_no_column_of_prompts(table):
    with pytest.raises(InvalidRequest, match=r"one of its columns \(key, text, max_tokens, place\)"):
        check_no_table(table)
    check_no_table(table["text"])


def test_the_format_follows_from_the_extension_unless_it_is_given():
    assert [format_of(path, None) for path in ("a.CSV", "s3://b/a.tsv.gz", "a.parquet", "a.json")] == [
        "csv", "tsv", "parquet", "jsonl"
    ]  # fmt: skip
    assert format_of("a.csv", "text") == "text"
    with pytest.raises(InvalidRequest, match="xlsx"):
        format_of("a.xlsx", "xlsx")

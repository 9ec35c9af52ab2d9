"""Tables as input of a batch: files that pyarrow, pandas and csv wrote give the same requests as JSON lines."""

import contextlib
import csv
import io
import json
import random
from dataclasses import replace
from itertools import chain

import fsspec
import pandas
import pyarrow
import pytest
from pyarrow import feather, parquet

from headrace.client import Client
from headrace.client.batch.check import check, read_items
from headrace.client.batch.columns import Columns
from headrace.client.batch.errors import InvalidBatch
from headrace.client.batch.formats.readers import format_of
from headrace.client.batch.map import check_no_table
from headrace.client.batch.output_lines import output_line
from headrace.client.batch.rows import ItemReader
from headrace.client.batch.run import Batch
from headrace.client.batch.sources import ShardSource, open_source
from headrace.client.wire.errors import InvalidRequest
from headrace.config import Settings

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


MARK = b"\xef\xbb\xbf"
ODD = [
    ("a.jsonl", b"null\n", r"a\.jsonl, line 1: line: got null; expected an object"),
    ("a.jsonl", b"3\n3\n", r"line 1: line: got a number; .*1 more with this error"),
    ("a.jsonl", b"[]\n", "line 1: prompt: got a list of 0 token ids"),
    ("a.jsonl", b'{"prompt": null}\n', "line 1: prompt: got nothing"),
    ("a.jsonl", b'{"prompt": 5}\n', "line 1: prompt: got a value of type int"),
    ("a.jsonl", b'{"prompt": "a", "custom_id": 7}\n', "custom_id: got a whole number; .*--id-column"),
    ("a.jsonl", b'{"prompt": "a", "id": 7}\n', "id: got a field; .*--id-column id"),
    (
        "a.jsonl",
        b'{"prompt": "a", "place": 1}\n{"prompt": "a", "place": 2}\n',
        "place: .*--prompt-column prompt.*1 more",
    ),
    ("a.jsonl", '"The house"'.encode("utf-16"), "UTF-16; .*iconv -f UTF-16 -t"),
    ("a.jsonl", '"The house"'.encode("utf-16-le"), "UTF-16-LE; .*iconv -f UTF-16-LE"),
    ("a.jsonl", MARK + b'"a"\n' + MARK + b'"b"\n', "line 2: line: got a byte order mark at its start; .*directory"),
    ("a.jsonl", b'"a"\r"b"\r', r"line 1: line: got line ends that are CR alone; .*tr '\\r' '\\n'"),
    ("a.csv", "prompt\nThe house\n".encode("utf-16"), "UTF-16; .*iconv -f UTF-16"),
    ("a.csv", MARK + b"prompt\na\n" + MARK + b"prompt\n", "row 2: line: got a byte order mark"),
    ("a.csv", "prompt\na\nZürich\n".encode("latin-1"), "row 2: .*bytes that are not UTF-8; .*iconv -f WINDOWS-1252"),
    ("a.csv", b"Promt\na\n", r"a\.csv: prompt_column: got 'prompt'.*for example Promt$"),
    ("a.parquet", pyarrow.table({"prompt": [1, 2]}), r"a\.parquet, row 1: prompt: got a value of type int; .*1 more"),
    ("a.parquet", pyarrow.table({"prompt": [{"x": 1}]}), "row 1: prompt: got a value of type dict"),
    ("a.parquet", pyarrow.table({"prompt": ["a", None]}), "row 2: prompt: got null; .*--skip-invalid"),
]


@pytest.mark.parametrize(("name", "content", "message"), ODD)
def test_odd_files_are_refused_with_their_line_and_the_way_out(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        parquet.write_table(content, path)
    settings = Settings(redis_url="redis://localhost:1/0")
    with Client(settings=settings) as client, pytest.raises(InvalidBatch, match=message):
        Batch(client, path)


def test_an_array_and_lines_are_told_apart_in_json(tmp_path):
    path = tmp_path / "rows.json"
    for text, kind in (
        ("\ufeff [\n {}]", "json"),
        ("[15496, 13]\n", "jsonl"),
        ('{"prompt": "a"}\n', "jsonl"),
        ("", "jsonl"),
    ):
        path.write_text(text)
        assert open_source(path).kind == kind
    path.write_text('[{"prompt": "a", "place": "Oslo"},\n {"prompt": "b"}]')
    assert [item.fields["prompt"] for item in requests_of(path, None, Columns())] == ["a", "b"]


def test_line_ends_of_an_old_mac_are_those_of_csv(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,x\ra,1\rb,2\r")
    assert [item.fields["prompt"] for item in requests_of(tmp_path / "a.csv", "csv", Columns())] == ["a", "b"]


def test_the_files_of_a_directory_are_one_input_if_their_schema_is_one(tmp_path):
    for name, values in {"b": [3], "a": [1, 2], "c": [None]}.items():
        table = pyarrow.table({"prompt": [f"{name}{i}" for i in range(len(values))], "x": values})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    (tmp_path / "_SUCCESS").write_text("")
    for path in (tmp_path, tmp_path / "*.parquet"):
        items = requests_of(path, None, Columns())
        assert [(item.custom_id, item.fields["prompt"], item.columns["x"]) for item in items] == [
            ("row-1", "a0", 1), ("row-2", "a1", 2), ("row-3", "b0", 3), ("row-4", "c0", None)
        ]  # fmt: skip
    parquet.write_table(pyarrow.table({"prompt": ["d", None], "x": [1, 2]}), tmp_path / "d.parquet")
    with pytest.raises(InvalidBatch, match=r"^d\.parquet, row 2: prompt: got null"):
        requests_of(tmp_path, None, Columns())
    parquet.write_table(pyarrow.table({"prompt": ["d"], "x": ["1"]}), tmp_path / "d.parquet")
    with pytest.raises(
        InvalidBatch, match=r"d\.parquet: column 'x' is string, and int64 in a\.parquet; .*each with its"
    ):
        requests_of(tmp_path, None, Columns())
    (tmp_path / "e.csv").write_text("prompt\n")
    with pytest.raises(InvalidBatch, match="different formats"):
        requests_of(tmp_path, None, Columns())


def test_a_wrong_parameter_of_all_rows_is_not_the_fault_of_each():
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as client:
        for params, message in (({"top_p": 7}, "got 7"), ({"max_tokenz": 7}, "did you mean max_tokens")):
            with pytest.raises(InvalidBatch, match=rf"^params\.{next(iter(params))}: .*{message}.*") as caught:
                Batch(client, ["a", "b", {"prompt": "c", "top_p": 0.5}], params, skip_invalid=True)
            assert len(caught.value.faults) == 1


def test_faulty_rows_are_put_aside_on_request(tmp_path):
    lines = [
        {"custom_id": "a", "prompt": "x"}, None, {"custom_id": "b", "prompt": None, "place": 1},
        {"custom_id": "a", "prompt": "y"}, {"custom_id": "c", "prompt": "z", "place": 2},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as client:
        batch = Batch(client, tmp_path / "a.jsonl", columns=Columns(), skip_invalid=True)
    items = list(batch.rows())
    assert [item.custom_id for item in items] == ["a", "row-2", "b", "row-4-repeated", "c", "row-6"]
    assert [item.mistake is None for item in items] == [True, False, False, False, True, False]
    assert items[2].columns == {"place": 1}
    written = [(item.custom_id, item.digest) for item in items]
    assert sorted(batch.checked.index.matches(written)) == [(line, True) for line in range(1, 7)]


@pytest.mark.parametrize("table", [pandas.DataFrame(ROWS), pyarrow.Table.from_pylist(ROWS)])
def test_a_table_in_memory_is_an_input(table, tmp_path):
    WRITERS["parquet"](tmp_path / "rows.parquet")
    assert requests_of(table, None) == requests_of(tmp_path / "rows.parquet", None)
    frame = pandas.DataFrame({"prompt": ["a", "b", "c"], "n": [7, None, 2**53]})
    assert [item.custom_id for item in requests_of(frame, None, Columns(custom_id="n"))] == ["7", "row-2", str(2**53)]
    with pytest.raises(InvalidRequest, match="values of one type"):
        open_source(pandas.DataFrame({"prompt": ["a", {1}]}))


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


PROMPTS = ["The house", "", 'a "b"\\\n\t\x00\x7f', "Zürich \u2028 \U0001f600", "custom_id", "\0prompt\0", "\0name\0"]


@pytest.mark.parametrize(
    "params", [{}, {"max_tokens": 4, "stop": ["\0prompt\0", "x"], "priority": "normal"}, {"seed": 7, "temperature": 0}]
)
@pytest.mark.parametrize("names", [None, ["a", 'é"', "\0name\0", "d", "e", "f", "g"]])
def test_rows_that_are_alike_are_read_once_and_are_the_same_requests(tmp_path, params, names):
    rows = [{"prompt": prompt} | ({"custom_id": names[i]} if names else {}) for i, prompt in enumerate(PROMPTS)]
    parquet.write_table(pyarrow.Table.from_pylist([row | {"x": 1} for row in rows]), tmp_path / "rows.parquet")
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as client:
        whole = list(Batch(client, rows, params).rows())
        table = list(Batch(client, tmp_path / "rows.parquet", params).rows())
    assert [replace(item, columns={}) for item in table] == whole
    assert [item.columns for item in table] == [{"x": 1}] * 7
    assert [item.job_id("run") for item in table] == [item.job_id("run") for item in whole]


def test_a_row_that_is_like_others_but_for_its_prompt_is_checked(tmp_path):
    good = ["a"] * 3
    for bad, message in (("a" * 131_073, "131073 bytes"), ("é" * 65_537, "131074 bytes")):
        parquet.write_table(pyarrow.table({"prompt": [*good, bad, *good]}), tmp_path / "rows.parquet")
        settings, match = Settings(redis_url="redis://localhost:1/0"), f"row 4: prompt: got text of {message}"
        with Client(settings=settings) as client, pytest.raises(InvalidBatch, match=match) as caught:
            Batch(client, tmp_path / "rows.parquet")
        assert caught.value.count == 1
    table = pyarrow.table({"prompt": good, "max_tokens": [1, 0, 2]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with Client(settings=settings) as client, pytest.raises(InvalidBatch, match="row 2: max_tokens: got 0") as caught:
        Batch(client, tmp_path / "rows.parquet", columns=Columns(params=["max_tokens"]))
    assert caught.value.count == 1


def test_a_directory_that_datasets_saved_is_an_input(tmp_path):
    import datasets

    whole = datasets.Dataset.from_dict({"prompt": [f"p{i}" for i in range(10)], "x": list(range(10))})
    whole.save_to_disk(tmp_path / "whole", num_shards=3)
    items = requests_of(tmp_path / "whole", None, Columns())
    assert [(item.fields["prompt"], item.columns["x"]) for item in items] == [(f"p{i}", i) for i in range(10)]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "whole"]}')
    with pytest.raises(
        InvalidBatch, match=rf"several data sets; expected one of them \(test, whole\).*{tmp_path}/test"
    ):
        requests_of(tmp_path, None, Columns())
    (tmp_path / "whole" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(InvalidBatch, match=r"not there \(data-00001-of-00003\.arrow\); copy them too"):
        requests_of(tmp_path / "whole", None, Columns())
    (tmp_path / "whole" / "state.json").write_text('{"epoch": 3}')
    with pytest.raises(InvalidBatch, match=r"state\.json is not one of `datasets`"):
        requests_of(tmp_path / "whole", None, Columns())


@pytest.mark.parametrize("name", ["parquet", "arrow", "feather", "csv", "json"])
def test_a_spoilt_table_is_read_or_refused(tmp_path, name):
    path, dice = tmp_path / f"rows.{name}", random.Random(1)
    WRITERS[name](path)
    whole = path.read_bytes()
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as client:
        for _ in range(100):
            changed = bytearray(whole)
            for _ in range(dice.randint(1, 4)):
                changed[dice.randrange(len(changed))] = dice.randrange(256)
            path.write_bytes(changed)
            with contextlib.suppress(InvalidBatch):
                batch = Batch(client, path, format=name, columns=COLUMNS, skip_invalid=dice.random() < 0.5)
                for item in batch.rows():
                    output_line(item, "job", RuntimeError("none"))


@pytest.mark.parametrize("params", [{}, {"max_tokens": 0}])
def test_a_column_of_continuations_is_scored_and_its_texts_stay_texts(tmp_path, params):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,continuation\n6 * 7 =, 42\nIs it?, true\nA list:,"[1, 2]"\n')
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as client:
        batch = Batch(client, path, params, columns=Columns(params=["continuation"]))
        rows = list(batch.rows())
        assert [row.fields["continuation"] for row in rows] == [" 42", " true", "[1, 2]"]
        jobs = client.submitter.prepare_together([row.fields for row in rows])
        assert [job.request.max_tokens for job in jobs] == [0, 0, 0]
        with pytest.raises(InvalidBatch, match="continuation: a flat row has one text and no log probabilities"):
            batch.run(tmp_path / "scores.csv")


def test_no_new_tokens_for_all_rows_are_refused_for_a_row_without_anything_to_score(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,continuation\nThe king, and\nThe queen,\n")
    columns = Columns(params=["continuation"])
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as client:
        with pytest.raises(InvalidBatch, match=r"params\.max_tokens: got 0; .* echo, prompt_logprobs or continuation"):
            Batch(client, path, {"max_tokens": 0}, columns=columns)
        assert Batch(client, path, {"max_tokens": 0, "prompt_logprobs": 0}, columns=Columns()).checked.rows == 2


def test_a_whole_table_or_a_gap_is_refused_where_prompts_or_pairs_are_expected():
    frame = pandas.DataFrame({"text": ["a", None], "answer": [" b", " c"]})
    with Client(settings=Settings(redis_url="redis://localhost:1/0")) as client:
        with pytest.raises(
            InvalidRequest, match=r"prompts: got a DataFrame; expected one of its columns \(text, answer\)"
        ):
            client.choose(frame, ["yes", "no"])
        with pytest.raises(InvalidRequest, match=r"prompts\[1\]: got .*; expected text"):
            client.choose(frame["text"], ["yes", "no"])
        with pytest.raises(InvalidRequest, match="prompts: got 5; expected text, or a list or column of texts"):
            client.choose(5, ["yes", "no"])
        with pytest.raises(InvalidRequest, match=r"pairs: got a DataFrame; expected pairs from two of its columns"):
            client.score_many(frame)

"""Batches from and to `s3://` on moto's S3 server, with s3fs."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))
os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}

import boto3
import pyarrow
import requests
import s3fs
from moto.server import ThreadedMotoServer
from pyarrow import dataset, parquet

from headrace.client import Client
from headrace.client.batch.errors import InvalidBatch, OutputRefused

ROWS = 40

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
host, port = server.get_host_and_port()
os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
boto3.client("s3").create_bucket(Bucket="tables")
files = s3fs.S3FileSystem()
table = pyarrow.table({"prompt": [f"The river {i}" for i in range(ROWS)], "place": ["Oslo"] * ROWS})
for name, part in (("a", table.slice(0, 25)), ("b", table.slice(25))):
    with files.open(f"tables/in/{name}.parquet", "wb") as file:
        parquet.write_table(part, file)
files.pipe_file("tables/prompts.csv", b"prompt,place\nThe old house,Oslo\n")


class Killed(BaseException):
    """Ends a run as if the process had died."""


def die(report) -> None:
    """Die once something was computed."""
    if report.succeeded > 10:
        raise Killed


def texts(path: str, source=None, form: str = "parquet") -> dict[str, str]:
    """The texts of an output by their names."""
    rows = dataset.dataset(path, filesystem=source, format=form).to_table().to_pylist()
    assert len({row["custom_id"] for row in rows}) == len(rows), "a row is there twice"
    assert all(row["place"] == "Oslo" and not row["error"] for row in rows)
    return {row["custom_id"]: row["text"] for row in rows}


def refusal(call) -> str:
    """The message of a refusal."""
    try:
        call()
    except (InvalidBatch, OutputRefused) as error:
        return str(error)
    raise AssertionError("it was not refused")


params = {"max_tokens": 4}
with Client(redis_url=os.environ["REDIS"]) as client, tempfile.TemporaryDirectory() as scratch:
    client.batch("s3://tables/in", f"{scratch}/local.parquet", params=params)
    for extension in ("parquet", "csv"):
        out = f"s3://tables/out.{extension}"
        try:
            client.batch("s3://tables/in", out, params=params, max_inflight=8, on_progress=die)
        except Killed:
            assert files.exists(f"{out}/_headrace.run")
        report = client.batch("s3://tables/in", out, params=params, resume=True)
        assert report.before > 10 and report.before + report.succeeded == ROWS, report
        assert not files.exists(f"{out}/_headrace.run")
        assert texts(f"tables/out.{extension}", files, extension) == texts(f"{scratch}/local.parquet")
    assert "exists; resume it" in refusal(lambda: client.batch("s3://tables/in", "s3://tables/out.parquet"))
    assert client.batch("s3://tables/prompts.csv", "s3://tables/one.jsonl", params=params).succeeded == 1
    missing = refusal(lambda: client.batch("s3://none/in.csv", f"{scratch}/x.csv"))
    unwritable = refusal(lambda: client.batch("s3://tables/prompts.csv", "s3://none/out.csv"))
    assert "s3://none" in missing and "s3://none" in unwritable, (missing, unwritable)
    assert len(boto3.client("s3").list_buckets()["Buckets"]) == 1, "a bucket was made"
    # From here on moto checks who asks, and nobody may do anything.
    requests.post(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth", data=b"0", timeout=30)
    s3fs.S3FileSystem.clear_instance_cache()
    denied = refusal(lambda: client.batch("s3://tables/prompts.csv", f"{scratch}/y.csv"))
    shut = refusal(lambda: client.batch(["The old house"], "s3://tables/new.parquet"))
    for message in (denied, shut):
        assert "check the credentials" in message, message
server.stop()
print(f"{ROWS} rows from two files to Parquet and CSV, each killed and resumed, equal local ones; 4 refusals are clear")

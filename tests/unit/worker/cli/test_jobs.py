"""`headrace jobs`, `job`, `cancel` and `purge`, on a Redis without a worker."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import redis
from click.testing import CliRunner, Result

from headrace.client import Client
from headrace.client.jobs import lost
from headrace.client.wire import keys
from headrace.client.wire.redis import connect
from headrace.worker.cli import main
from headrace.worker.cli.jobs import span


@pytest.fixture
def connection(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    own = redis_url.replace("db=0", "db=12")
    monkeypatch.setenv("HEADRACE_REDIS_URL", own)
    with connect(own) as made:
        yield made
        made.flushdb()


@pytest.fixture
def client(connection: redis.Redis) -> Iterator[Client]:
    with Client() as made:
        yield made


#: The parameters of each command, all of which the tests below use.
TESTED = {
    "jobs": {"state", "model", "older_than", "newer_than", "owner", "limit", "after", "everything", "as_json"},
    "job": {"job_id", "text", "prompt", "as_json"},
    "cancel": {"job_ids", "everything", "model", "yes", "as_json"},
    "purge": {"model", "yes", "as_json"},
}


def test_every_parameter_has_a_test() -> None:
    found = {name: {str(param.name) for param in main.commands[name].params} for name in TESTED}
    assert found == TESTED


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_jobs_are_listed_in_pages(client: Client) -> None:
    assert run("jobs").stderr == "no jobs\n"
    submitted = client.submit_many(["Hello."] * 5)
    shown = run("jobs", "--limit", "2")
    assert [line.split()[:3] for line in shown.stdout.splitlines()[1:]] == [
        [job.id, "queued", "demo"] for job in reversed(submitted[3:])
    ]
    after = shown.stderr.split("--after ")[1].strip()
    found = json.loads(run("jobs", "--limit", "2", "--after", after, "--json").stdout)
    assert [job["id"] for job in found["jobs"]] == [submitted[2].id, submitted[1].id]
    found = json.loads(run("jobs", "--all", "--json", "--state", "queued", "--model", "demo").stdout)
    assert (len(found["jobs"]), found["after"]) == (5, "")
    assert run("jobs", "--older-than", "2h").stderr == "no such jobs\n"
    assert len(json.loads(run("jobs", "--newer-than", "1d", "--owner", "", "--json").stdout)["jobs"]) == 5
    assert run("jobs", "--owner", "a1b2").stderr == "no such jobs\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jobs", "--older-than", "5x"], "got '5x'; expected a number of seconds, or for example 90s, 10m, 2h or 7d"),
        (["jobs", "--older-than", "nan"], "got 'nan'"),
        (["jobs", "--after", "x"], "after: got 'x'; expected the value that the page before gave"),
        (["jobs", "--newer-than", "1s", "--older-than", "9s"], "newer_than: got 1.0; expected more seconds than"),
        (["cancel"], "name the IDs of jobs, or use --all --model MODEL"),
        (["cancel", "x", "--all", "--model", "demo"], "name the IDs of jobs, or use --all"),
        (["cancel", "--all"], "--all and --model MODEL belong together"),
        (["cancel", "a b"], "job: got 'a b'; expected a job, or its id"),
        (["purge", "--model", "demo"], "the input is not a terminal; add --yes"),
    ],
)
def test_wrong_input_is_named(connection: redis.Redis, arguments: list[str], message: str) -> None:
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert message in " ".join(shown.stderr.split())


def test_a_job_is_shown_without_what_it_says(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.submit("A secret.", id="cli:one")
    shown = run("job", "cli:one")
    assert "state:         queued\nmodel:         demo\n" in shown.stdout
    assert "no worker serves demo; start one with `HEADRACE_MODEL=demo headrace up`" in shown.stderr
    assert "secret" not in shown.output + run("job", "cli:one", "--json").output
    assert "--- prompt\nA secret.\n" in run("job", "cli:one", "--prompt").stdout
    assert json.loads(run("job", "cli:one", "--json").stdout)["state"] == "queued"
    missing = run("job", "cli:none", "--json")
    assert (missing.exit_code, json.loads(missing.stdout)["error"]["code"]) == (1, "unknown_job")
    monkeypatch.setattr(lost, "SENDING_S", -1.0)
    monkeypatch.setattr(lost, "CONFIRM_S", 0.0)
    connect(client.url).delete(*keys.queue_lists("demo"))
    shown = run("job", "cli:one")
    assert (shown.exit_code, "submit it again" in shown.stderr) == (1, True)


def test_jobs_are_cancelled_and_purged(client: Client) -> None:
    one, two, *others = client.submit_many(["Hello."] * 6)
    shown = run("cancel", one.id, "cli:none", two.id)
    assert (shown.exit_code, shown.stdout) == (1, "2 jobs cancelled\n")
    assert "no job 'cli:none' on this Redis" in shown.stderr
    assert json.loads(run("cancel", one.id, "--json").stdout) == {
        "cancelled": [],
        "ended_before": [one.id],
        "unknown": [],
    }
    assert "error:         the job was cancelled before it started [cancelled]" in run("job", one.id).stdout
    assert run("purge", "--model", "demo", "--yes").stdout == "4 jobs ended as cancelled\n"
    assert {job.status() for job in others} == {"cancelled"}
    assert json.loads(run("purge", "--model", "demo", "--yes", "--json").stdout) == {"cancelled": 0}
    client.submit("Hello.")
    assert run("cancel", "--all", "--model", "demo", "--yes").stdout == "1 job cancelled\n"
    assert "there is no text: the job has not ended with one" in run("job", one.id, "--text").stderr


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (0.254, "0.25 s"), (1.6, "2 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (90_000, "1 d 1 h")],
)
def test_a_time_span_has_its_two_largest_units(seconds: float, shown: str) -> None:
    assert span(seconds) == shown
